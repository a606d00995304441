// What one instruction set provides to products: packing of weights into panels, and products of rows with panels.
//
// A panel holds the columns of one run of `width` outputs. Outputs are in the lanes of vectors, so that a product needs no
// sums across lanes. Its elements are
//
//   pairs   bfloat16 [columns / 2][width][2], for instructions that multiply pairs of bfloat16 and add in float32
//   floats  float32  [columns][width]
//
// A run is at most kRun columns for which each output has one scale, and each row of x too. The sum over a run begins at
// zero and takes the columns in order (both products of a pair in one instruction); it is then multiplied with the scales
// and added to the output's total. The order depends on neither the number of rows nor the number of threads, which is
// why a row alone has the same bits as in a batch.

#ifndef PERPARAM_ISA_H_
#define PERPARAM_ISA_H_

#include <cstddef>
#include <cstdint>

#include "attention.h"

namespace perparam {

constexpr int kRun = 128;       // most columns in a run
constexpr int kUnit = 64;       // columns are decoded in multiples of it, which is one of the columns of every vector
constexpr int kMaxWidth = 32;   // most outputs in a panel
constexpr int kFewRows = 4;     // up to this number of rows, weights are multiplied without being packed in memory

// How the values of a kernel are stored. Float8 and int8 have a table; E4M3FN and E5M2 also have arithmetic.
enum class Values : int32_t { kTable, kE4M3, kE5M2, kBfloat16, kFloat16, kFloat32 };

// To what the scaled weight is rounded; kNone: the value is not scaled before the product.
enum class Rounding : int32_t { kNone, kFloat32, kBfloat16, kFloat16 };

// A piece of a kernel as stored: `width` rows and `columns`, a multiple of kUnit up to kRun, all readable.
struct Source {
  const uint8_t* data;
  int columns;
  ptrdiff_t stride;       // bytes from row to row
  Values values;
  const Table* table;     // of dtypes of one byte
  Rounding rounding;
  const float* scales;    // (width,) that multiply the values before they are rounded
};

// A few rows of x, and their totals: totals[r][n] += x_scales[r] * scales[n] * sum(x[r][k] * weight[k][n]).
struct Rows {
  int count;
  const void* x;            // the first column of the run: bfloat16 for pairs, else float32
  ptrdiff_t x_stride;       // elements from row to row
  const float* x_scales;    // of the run, or null: 1
  ptrdiff_t x_scales_stride;
  const float* scales;      // (width,) of the run
  float* totals;            // (count, width)
};

// Functions of one instruction set; each takes pairs only if `pairs` is true.
struct Isa {
  const char* name;
  int width;   // outputs in a panel
  int rows;    // most rows of `multiply`
  bool pairs;  // whether it has instructions for pairs of bfloat16
  // Decodes to a panel, aligned to 64 bytes.
  void (*pack)(const Source& source, bool pairs, void* panel);
  // Adds the products of rows with a panel of `columns`, an even number for pairs.
  void (*multiply)(const Rows& rows, bool pairs, const void* panel, int columns);
  // The same for all columns of a source and up to kFewRows rows, without a panel.
  void (*multiply_few)(const Rows& rows, bool pairs, const Source& source);
  // Rounds `width` totals to bfloat16, to nearest, ties to even.
  void (*round)(const float* totals, uint16_t* result);
  const AttentionIsa* attention;
};

// Each returns null where the library was compiled for other processors.
const Isa* isa_scalar();
const Isa* isa_avx2();
const Isa* isa_avx512();
const Isa* isa_avx512bf16();
const Isa* isa_neon();
const Isa* isa_neonbf16();

// The functions in use: the best that this processor has, or those that PERPARAM_CPU names; null: it names others.
const Isa* isa();

}  // namespace perparam

#endif
