// Panels of an attention's products: a chunk of keys or values, converted for the instructions that multiply it.
//
// A source has rows and columns: keys (d, slots), values (slots, d).  Products sum over its rows, and have its columns in
// the lanes of vectors.  A panel is
//
//   floats  float32  [row][width]
//   pairs   bfloat16 [row / 2][width][2]
//
// with `width` columns, a multiple of kLanes; what is not in the source is 0, or the value of the byte 0.
#ifndef PERPARAM_ATTENTION_PANELS_H_
#define PERPARAM_ATTENTION_PANELS_H_

#include "attention.h"
#include "attention_vectors.h"
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#include "decoder_avx512.h"
#endif

namespace perparam {
namespace attention {
namespace {

using namespace vectors;

struct Source {
  const char* data;
  int64_t stride;  // bytes from row to row
  int rows, columns;
  Kind kind;
  const Table* table;
};

inline int size_of(Kind kind) {
  switch (kind) {
    case Kind::kFloat32: return 4;
    case Kind::kBfloat16: case Kind::kFloat16: return 2;
    default: return 1;
  }
}

// kLanes numbers as float32.
template <Kind kKind>
inline Floats widened(const char* from, const Table* table) {
  if constexpr (kKind == Kind::kFloat32) return load<Floats>(from);
  if constexpr (kKind == Kind::kBfloat16) return from_bfloat16(load<Halves>(from));
  if constexpr (kKind == Kind::kFloat16) return from_float16(load<Halves>(from));
  if constexpr (kKind == Kind::kInt8) return __builtin_convertvector(__builtin_convertvector(load<Bytes>(from), Ints), Floats);
  Halves values{};
  if constexpr (kKind == Kind::kTable)
    for (int i = 0; i < kLanes; ++i) values[i] = table->whole[uint8_t(from[i])];
  return from_bfloat16(values);
}

template <Kind kKind>
inline void widen_row(const char* from, const Table* table, int columns, int width, float* to) {
  constexpr int kSize = kKind == Kind::kFloat32 ? 4 : kKind == Kind::kBfloat16 || kKind == Kind::kFloat16 ? 2 : 1;
  int column = 0;
  for (; column + kLanes <= columns; column += kLanes) store(to + column, widened<kKind>(from + kSize * column, table));
  if (column < columns) {
    char rest[4 * kLanes] = {};
    __builtin_memcpy(rest, from + kSize * column, size_t(kSize) * (columns - column));
    store(to + column, widened<kKind>(rest, table));
    column += kLanes;
  }
  for (; column < width; column += kLanes) store(to + column, Floats{});
}

// Columns as float32; `to` has `width` of them.
inline void widen(Kind kind, const char* from, const Table* table, int columns, int width, float* to) {
  switch (kind) {
    case Kind::kFloat32: return widen_row<Kind::kFloat32>(from, table, columns, width, to);
    case Kind::kBfloat16: return widen_row<Kind::kBfloat16>(from, table, columns, width, to);
    case Kind::kFloat16: return widen_row<Kind::kFloat16>(from, table, columns, width, to);
    case Kind::kInt8: return widen_row<Kind::kInt8>(from, table, columns, width, to);
    case Kind::kTable: return widen_row<Kind::kTable>(from, table, columns, width, to);
  }
}

// Memory that is read soon, of which each call of `some` fetches a part.
struct Ahead {
  const char* row = nullptr;
  int64_t stride = 0;
  int rows = 0, bytes = 0, byte = 0;

  Ahead() = default;
  explicit Ahead(const Source& s) : row(s.data), stride(s.stride), rows(s.rows), bytes(s.columns * size_of(s.kind)) {}

  void some(int lines) {
    for (; lines > 0 && rows > 0; --lines) {
      __builtin_prefetch(row + byte, 0, 3);
      byte += 64;
      if (byte >= bytes) byte = 0, row += stride, --rows;
    }
  }
  // Lines to fetch in each of n calls.
  int lines(int n) const { return (rows * ((bytes + 63) / 64) + n - 1) / n; }
};

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)

// The words or bytes of two rows in turn: a0 b0 a1 b1 …
alignas(64) constexpr uint16_t kInTurn[2][32] = {
    {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
    {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};

// The same for bytes, in the order in which unpacking them to words leaves columns in order: it takes the first half of
// each 16 bytes, then the second.
struct BytesInTurn {
  alignas(64) uint8_t of[2][64] = {};

  constexpr BytesInTurn() {
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < 64; ++i) of[half][i] = uint8_t(64 * (i % 2) + 32 * half + 16 * (i % 16 / 8) + 4 * (i / 16) + i % 8 / 2);
  }
};
constexpr BytesInTurn kBytesInTurn;

inline __mmask64 first_of(int count) { return count >= 64 ? ~0ull : count <= 0 ? 0ull : (1ull << count) - 1; }

// Bytes of two rows to pairs of bfloat16.
template <bool kHasSign>
struct PairDecoder : TableDecoder<kHasSign> {
  __m512i turns[2];  // for the first 32 columns of two rows and for the others

  explicit PairDecoder(const Table& table) : TableDecoder<kHasSign>(table) {
    for (int half = 0; half < 2; ++half) turns[half] = _mm512_load_si512(kBytesInTurn.of[half]);
  }
};

template <bool kHasSign, bool kWhole>
inline void pack_table(const Source& s, int width, uint16_t* panel, Ahead& ahead) {
  const PairDecoder<kHasSign> decoder(*s.table);
  const int lines = ahead.lines((s.rows + 1) / 2);
  for (int row = 0; row < s.rows; row += 2, panel += 2 * width) {
    const char *a = s.data + row * s.stride, *b = a + s.stride;
    ahead.some(lines);
    for (int column = 0; column < width; column += 64) {
      __m512i x, y;
      if (kWhole) {
        x = _mm512_loadu_si512(a + column), y = _mm512_loadu_si512(b + column);
      } else {
        __mmask64 inside = first_of(s.columns - column), second = row + 1 < s.rows ? inside : 0;
        x = _mm512_maskz_loadu_epi8(inside, a + column), y = _mm512_maskz_loadu_epi8(second, b + column);
      }
      for (int half = 0; half < 2; ++half) {
        __m512i pairs[2];
        decoder.decode(_mm512_permutex2var_epi8(x, decoder.turns[half], y), pairs[0], pairs[1]);
        for (int i = 0, at = column + 32 * half; i < 2; ++i, at += 16)
          if (kWhole || at < width) _mm512_storeu_si512(panel + 2 * at, pairs[i]);
      }
    }
  }
}

template <bool kWhole>
inline void pack_bfloat16(const Source& s, int width, uint16_t* panel, Ahead& ahead) {
  const __m512i turns[2] = {_mm512_load_si512(kInTurn[0]), _mm512_load_si512(kInTurn[1])};
  const int lines = ahead.lines((s.rows + 1) / 2);
  for (int row = 0; row < s.rows; row += 2, panel += 2 * width) {
    const char *a = s.data + row * s.stride, *b = a + s.stride;
    ahead.some(lines);
    for (int column = 0; column < width; column += 32) {
      __m512i x, y;
      if (kWhole) {
        x = _mm512_loadu_si512(a + 2 * column), y = _mm512_loadu_si512(b + 2 * column);
      } else {
        __mmask32 inside = __mmask32(first_of(s.columns - column)), second = row + 1 < s.rows ? inside : 0;
        x = _mm512_maskz_loadu_epi16(inside, a + 2 * column), y = _mm512_maskz_loadu_epi16(second, b + 2 * column);
      }
      _mm512_storeu_si512(panel + 2 * column, _mm512_permutex2var_epi16(x, turns[0], y));
      if (kWhole || column + 16 < width)
        _mm512_storeu_si512(panel + 2 * column + 32, _mm512_permutex2var_epi16(x, turns[1], y));
    }
  }
}

inline void pack_pairs(const Source& s, int width, uint16_t* panel, Ahead& ahead) {
  const bool whole = s.columns == width && width % 64 == 0 && s.rows % 2 == 0;
  if (s.kind == Kind::kBfloat16)
    return whole ? pack_bfloat16<true>(s, width, panel, ahead) : pack_bfloat16<false>(s, width, panel, ahead);
  if (s.table->has_sign)
    return whole ? pack_table<true, true>(s, width, panel, ahead) : pack_table<true, false>(s, width, panel, ahead);
  return whole ? pack_table<false, true>(s, width, panel, ahead) : pack_table<false, false>(s, width, panel, ahead);
}

#endif

inline void pack(const Source& s, bool pairs, int width, void* panel, Ahead& ahead) {
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
  if (pairs) return pack_pairs(s, width, static_cast<uint16_t*>(panel), ahead);
#endif
  (void)pairs;
  float* to = static_cast<float*>(panel);
  const int lines = ahead.lines(s.rows);
  for (int row = 0; row < s.rows; ++row) {
    ahead.some(lines);
    widen(s.kind, s.data + row * s.stride, s.table, s.columns, width, to + int64_t(row) * width);
  }
}

// The columns of a product, from a panel.
struct FromPanel {
  const char* panel;
  int width;

  template <int kVectors>
  void get(int64_t k, int64_t, Floats (&columns)[kVectors]) const {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) columns[v] = load<Floats>(panel + 4 * (k * width + v * kLanes));
  }
};

// The columns of a product in float32, from where they are stored.
template <Kind kKind>
struct Widened {
  static constexpr int kSize = kKind == Kind::kFloat32 ? 4 : kKind == Kind::kInt8 ? 1 : 2;
  const char* data;
  int64_t stride;

  explicit Widened(const Source& s) : data(s.data), stride(s.stride) {}

  template <int kVectors>
  void get(int64_t k, int64_t, Floats (&columns)[kVectors]) const {
    const char* from = data + k * stride;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) columns[v] = widened<kKind>(from + kSize * v * kLanes, nullptr);
  }
};

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)

// The pairs of a product, from where bfloat16 are stored.
struct PairsOfBfloat16 {
  static constexpr int kSize = 2;
  const char* data;
  int64_t stride;
  __m512i turns[2];

  explicit PairsOfBfloat16(const Source& s)
      : data(s.data), stride(s.stride), turns{_mm512_load_si512(kInTurn[0]), _mm512_load_si512(kInTurn[1])} {}

  void get(int64_t k, int64_t, Floats (&columns)[4]) const {
    const char *a = data + 2 * k * stride, *b = a + stride;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512i x = _mm512_loadu_si512(a + 64 * half), y = _mm512_loadu_si512(b + 64 * half);
      columns[2 * half] = (Floats)_mm512_permutex2var_epi16(x, turns[0], y);
      columns[2 * half + 1] = (Floats)_mm512_permutex2var_epi16(x, turns[1], y);
    }
  }
};

// The pairs of a product, from bytes and their table.
template <bool kHasSign>
struct PairsByTable {
  static constexpr int kSize = 1;
  const char* data;
  int64_t stride;
  PairDecoder<kHasSign> decoder;

  explicit PairsByTable(const Source& s) : data(s.data), stride(s.stride), decoder(*s.table) {}

  // Prefetches, `ahead` bytes after what it reads: 64 bytes of a row are too few for the processor to do so in time.
  void get(int64_t k, int64_t ahead, Floats (&columns)[4]) const {
    const char *a = data + 2 * k * stride, *b = a + stride;
    __builtin_prefetch(a + ahead, 0, 3);
    __builtin_prefetch(b + ahead, 0, 3);
    const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512i pairs[2];
      decoder.decode(_mm512_permutex2var_epi8(x, decoder.turns[half], y), pairs[0], pairs[1]);
      columns[2 * half] = (Floats)pairs[0], columns[2 * half + 1] = (Floats)pairs[1];
    }
  }
};

#endif

}  // namespace
}  // namespace attention
}  // namespace perparam

#endif
