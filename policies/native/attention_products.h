// Products of rows, of queries or of weights, with a chunk of keys or values.
#ifndef PERPARAM_ATTENTION_PRODUCTS_H_
#define PERPARAM_ATTENTION_PRODUCTS_H_

#include "attention_panels.h"

namespace perparam {
namespace attention {
namespace {

constexpr int kSlab = 16;  // rows of a source that are multiplied in turn where there is no panel

template <int kNumber>
struct Number {
  static constexpr int value = kNumber;
};

enum class To { kNew, kSums, kScaled };  // products alone, added to what is there, or to factors times what is there

// Products of kRows rows of x with kVectors vectors of columns.  Sums take the columns' numbers in order, beginning with
// what is there.
template <bool kPairs, To kTo, int kRows, int kVectors, class Columns>
__attribute__((always_inline)) inline void tile(int depth, const char* x, int64_t x_stride, const Columns& from,
                                                float* out, int64_t out_stride,
                                                const float* factors, int64_t ahead = 0) {
  Floats sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = kTo == To::kNew ? Floats{} : load<Floats>(out + r * out_stride + v * kLanes);
      if (kTo == To::kScaled) sums[r][v] = sums[r][v] * all(factors[r]);
    }
  const int steps = kPairs ? (depth + 1) / 2 : depth;
  for (int k = 0; k < steps; ++k) {
    Floats columns[kVectors];
    from.get(k, ahead, columns);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      Floats each = all(load<float>(x + 4 * (r * x_stride + k)));  // a float32, or the bits of a pair
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
        if constexpr (kPairs) {
          sums[r][v] = (Floats)_mm512_dpbf16_ps((__m512)sums[r][v], (__m512bh)each, (__m512bh)columns[v]);
          continue;
        }
#endif
        sums[r][v] = fma(each, columns[v], sums[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(out + r * out_stride + v * kLanes, sums[r][v]);
}

constexpr int kTileRows = kRegisters == 32 ? 6 : 3, kTileVectors = 4;

// `tile` for any number of rows; strides are in float32, or pairs.
template <bool kPairs, To kTo, int kVectors, class Columns>
inline void columns_product(int64_t rows, int depth, const char* x, int64_t x_stride, const Columns& from, float* out,
                            int64_t out_stride, const float* factors) {
  auto some = [&](auto count, int64_t r) {
    tile<kPairs, kTo, decltype(count)::value, kVectors>(depth, x + 4 * r * x_stride, x_stride, from,
                                                        out + r * out_stride, out_stride, kTo == To::kScaled ? factors + r : nullptr);
  };
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) some(Number<kTileRows>{}, r);
  switch (rows - r) {
    case 1: return some(Number<1>{}, r);
    case 2: return some(Number<2>{}, r);
    case 3: return some(Number<3>{}, r);
    case 4: return some(Number<4>{}, r);
    case 5: return some(Number<5>{}, r);
  }
}

template <bool kPairs, To kTo>
inline void product(int64_t rows, int depth, const char* x, int64_t x_stride, const char* panel, int width, float* out,
                    int64_t out_stride, const float* factors = nullptr) {
  int column = 0;
  for (; column + kTileVectors * kLanes <= width; column += kTileVectors * kLanes)
    columns_product<kPairs, kTo, kTileVectors>(rows, depth, x, x_stride, FromPanel{panel + 4 * column, width}, out + column, out_stride, factors);
  for (; column < width; column += kLanes)
    columns_product<kPairs, kTo, 1>(rows, depth, x, x_stride, FromPanel{panel + 4 * column, width}, out + column, out_stride, factors);
}

// `product` of at most four rows, added to what is there, without a panel: in slabs of kSlab rows of the source,
// each kTileVectors vectors of columns at a time.
template <bool kPairs, int kRows, class Columns>
void stream_rows(const Source& s, Columns from, const char* x, int64_t x_stride, float* out, int64_t out_stride,
                 int ahead, int all_rows) {
  constexpr int kWidth = kTileVectors * kLanes;
  const char* data = s.data;
  for (int row = 0; row < s.rows; row += kSlab) {
    const int depth = s.rows - row < kSlab ? s.rows - row : kSlab;
    const int64_t next = row + kSlab + ahead <= all_rows ? ahead * s.stride : 0;
    for (int column = 0; column < s.columns; column += kWidth) {
      from.data = data + row * s.stride + Columns::kSize * column;
      tile<kPairs, To::kSums, kRows, kTileVectors>(depth, x + 4 * (row / (kPairs ? 2 : 1)), x_stride, from, out + column,
                                                   out_stride, nullptr, next);
    }
  }
}

template <bool kPairs, class Columns>
inline bool stream_columns(int64_t rows, const Source& s, const Columns& from, const char* x, int64_t x_stride,
                           float* out, int64_t out_stride, int ahead, int all_rows) {
  switch (rows) {
    case 1: stream_rows<kPairs, 1>(s, from, x, x_stride, out, out_stride, ahead, all_rows); return true;
    case 2: stream_rows<kPairs, 2>(s, from, x, x_stride, out, out_stride, ahead, all_rows); return true;
    case 3: stream_rows<kPairs, 3>(s, from, x, x_stride, out, out_stride, ahead, all_rows); return true;
    case 4: stream_rows<kPairs, 4>(s, from, x, x_stride, out, out_stride, ahead, all_rows); return true;
    default: return false;
  }
}

// Returns false, without a product, for columns that are not whole vectors.  Prefetches rows `ahead` rows before it reads
// them, if they are among the first `all_rows`, those of the source and what follows.
template <bool kPairs>
inline bool stream(int64_t rows, const Source& s, const char* x, int64_t x_stride, float* out, int64_t out_stride,
                   int ahead, int all_rows) {
  if (s.columns % (kTileVectors * kLanes) || (kPairs && s.rows % 2)) return false;
  auto by = [&](const auto& from) {
    return stream_columns<kPairs>(rows, s, from, x, x_stride, out, out_stride, ahead, all_rows);
  };
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
  if constexpr (kPairs) {
    if (s.kind == Kind::kBfloat16) return by(PairsOfBfloat16(s));
    return s.table->has_sign ? by(PairsByTable<true>(s)) : by(PairsByTable<false>(s));
  }
#endif
  switch (s.kind) {
    case Kind::kFloat32: return by(Widened<Kind::kFloat32>(s));
    case Kind::kBfloat16: return by(Widened<Kind::kBfloat16>(s));
    case Kind::kFloat16: return by(Widened<Kind::kFloat16>(s));
    case Kind::kInt8: return by(Widened<Kind::kInt8>(s));
    default: return false;
  }
}

}  // namespace
}  // namespace attention
}  // namespace perparam

#endif
