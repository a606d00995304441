// What one instruction set provides: packing of weights into panels, and products of rows with a panel.
//
// A panel holds `width` outputs and the columns of one run, with the outputs in the lanes of vectors, so that a product
// needs no sums across lanes.  Its elements are
//
//   pairs   bfloat16 [column / 2][width][2], for instructions that multiply pairs of bfloat16 and add in float32
//   floats  float32  [column][width]
//
// The sum of an output over a run begins at zero and takes the columns in order (pairs: both products of a pair in one
// instruction); it is then multiplied with the scales and added to the output's total.  This order is the same for every
// number of rows and threads, which is why a row alone gives the same bits as the row in a batch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace perparam {

constexpr int kRun = 64;  // most columns in a run, even
constexpr int kMaxWidth = 32;

enum class Values : int32_t { kTable, kBfloat16, kFloat16, kFloat32 };  // how a kernel's values are stored
enum class Rounding : int32_t { kNone, kBfloat16, kFloat16 };           // to what a scaled weight is rounded

// A kernel as stored, row by row.
struct Source {
  const uint8_t* data;    // of the first row of the panel, at the first column of the run
  ptrdiff_t stride;       // bytes from row to row
  Values values;
  const uint16_t* table;  // kTable: the bfloat16 of each of the 256 bytes
  bool has_sign;          // kTable: bit 7 is a sign: table[i + 128] == -table[i]
  Rounding rounding;      // other than kNone: each value is multiplied with its row's scale and rounded
  const float* scales;    // (width,) for rounding
};

// One product of a few rows with a panel: totals[r, n] += x_scales[r] * scales[n] * sum(x[r, k] * panel[k, n]).
struct Tile {
  int rows;
  int columns;            // of the run; even for pairs
  const void* x;          // bfloat16 for pairs, else float32
  ptrdiff_t x_stride;     // elements
  const void* panel;
  const float* scales;    // (width,)
  const float* x_scales;  // one for each row, or null for 1
  ptrdiff_t x_scales_stride;
  float* totals;          // (rows, width)
};

struct Isa {
  const char* name;
  int width;  // outputs in a panel, at most kMaxWidth
  int rows;   // most rows of a tile
  bool pairs; // whether it multiplies pairs of bfloat16
  // Packs kRun columns of `width` rows; what is at `next` will be packed soon.
  void (*pack)(const Source& source, bool pairs, void* panel, const uint8_t* next);
  void (*multiply)(const Tile& tile, bool pairs);
};

}  // namespace perparam
