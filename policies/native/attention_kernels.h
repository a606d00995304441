// The kernels of attention, for the instruction set of the translation unit that includes this.
#pragma once

#include "attention_panels.h"

namespace perparam {
namespace attention {
namespace {

template <int kNumber>
struct Number {
  static constexpr int value = kNumber;
};

constexpr float kLowest = -3.4028234663852886e38f;  // of scores of slots that are not seen

// Whether keys, values and weights are multiplied as pairs of bfloat16: weights are rounded to bfloat16, as they are
// where values are multiplied in q's dtype.
inline bool uses_pairs(const Attention& a) {
  return kHasPairs && a.kind == Kind::kBfloat16 && a.cache != Kind::kFloat32 && a.cache != Kind::kFloat16;
}

inline int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Parts of the memory of a block.
struct Memory {
  char *q, *weights;  // (rows, depth), (rows, kChunk): bfloat16 for pairs, otherwise float32
  float* scores;      // (rows, kChunk)
  float* factors;     // (rows,)
  char* panel;
  float* key_scales;    // (kChunk,)
  float* value_scales;  // (kChunk,)
  int32_t* positions;   // (kChunk,)
  size_t size;

  Memory(const Attention& a, int64_t rows, void* memory) {
    char* at = static_cast<char*>(memory);
    auto take = [&](int64_t bytes) {
      char* start = at;
      at += rounded_up(bytes, 64);
      return start;
    };
    const int64_t depth = rounded_up(a.d, kLanes);
    q = take(4 * rows * depth);
    scores = reinterpret_cast<float*>(take(4 * rows * kChunk));
    weights = uses_pairs(a) ? take(2 * rows * kChunk) : reinterpret_cast<char*>(scores);
    factors = reinterpret_cast<float*>(take(4 * rows));
    panel = take(4 * kChunk * depth);
    key_scales = reinterpret_cast<float*>(take(4 * kChunk));
    value_scales = reinterpret_cast<float*>(take(4 * kChunk));
    positions = reinterpret_cast<int32_t*>(take(4 * kChunk));
    size = size_t(at - static_cast<char*>(memory));
  }
};

size_t memory(const Attention& a, int64_t rows) { return Memory(a, rows, nullptr).size; }

// Products of kRows rows of x with kVectors vectors of a panel's columns, added to out times factors; or only the
// products without factors.  Sums take the panel's rows in order, beginning with what is there.
template <bool kPairs, int kRows, int kVectors>
inline void tile(int depth, const char* x, int64_t x_stride, const char* panel, int width, float* out,
                 int64_t out_stride, const float* factors) {
  Floats sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      sums[r][v] = factors ? load<Floats>(out + r * out_stride + v * kLanes) * all(factors[r]) : Floats{};
  const int steps = kPairs ? (depth + 1) / 2 : depth;
  for (int k = 0; k < steps; ++k) {
    Floats columns[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) columns[v] = load<Floats>(panel + 4 * (int64_t(k) * width + v * kLanes));
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
template <bool kPairs, int kVectors>
inline void columns_product(int64_t rows, int depth, const char* x, int64_t x_stride, const char* panel, int width,
                            float* out, int64_t out_stride, const float* factors) {
  auto some = [&](auto count, int64_t r) {
    tile<kPairs, decltype(count)::value, kVectors>(depth, x + 4 * r * x_stride, x_stride, panel, width,
                                                   out + r * out_stride, out_stride, factors ? factors + r : nullptr);
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

template <bool kPairs>
inline void product(int64_t rows, int depth, const char* x, int64_t x_stride, const char* panel, int width, float* out,
                    int64_t out_stride, const float* factors) {
  int column = 0;
  for (; column + kTileVectors * kLanes <= width; column += kTileVectors * kLanes)
    columns_product<kPairs, kTileVectors>(rows, depth, x, x_stride, panel + 4 * column, width, out + column, out_stride, factors);
  for (; column < width; column += kLanes)
    columns_product<kPairs, 1>(rows, depth, x, x_stride, panel + 4 * column, width, out + column, out_stride, factors);
}

// A chunk of slots, as a block of queries sees it.
struct Chunk {
  int64_t begin;
  int count;                // slots
  int64_t first, last;      // queries of the block that may see a slot; none: equal
  bool whole;               // they see all of kChunk slots
};

// The first chunk at or after `begin`, before `end`, that a query may see; otherwise its `begin` is `end`.
inline Chunk next_chunk(const Attention& a, const Block& block, int64_t begin, int64_t end) {
  const int32_t* slots = a.slot_positions + block.batch * a.slots;
  const int32_t* queries = a.positions + block.batch * a.queries + block.first;
  for (; begin < end; begin += kChunk) {
    const int count = int(end - begin < kChunk ? end - begin : kChunk);
    int32_t low = INT32_MAX, high = INT32_MIN;
    for (int i = 0; i < count; ++i) {
      const int32_t at = slots[begin + i];
      low = at < low ? at : low, high = at > high ? at : high;
    }
    int64_t first = block.count, last = 0;
    bool whole = count == kChunk;
    for (int64_t i = 0; i < block.count; ++i) {
      if (queries[i] < low || int64_t(queries[i]) - high >= a.window) continue;
      first = first < i ? first : i, last = i + 1;
      whole = whole && queries[i] >= high && int64_t(queries[i]) - low < a.window;
    }
    // Queries between them that see nothing are not in order.
    for (int64_t i = first; i < last; ++i) whole = whole && queries[i] >= low && int64_t(queries[i]) - high < a.window;
    if (first < last) return {begin, count, first, last, whole};
  }
  return {end, 0, 0, 0, false};
}

// Weights of a row's slots from its scores, and its state's largest score and sum; the factor of its earlier weights.
template <bool kPairs>
inline void weigh(const Attention& a, const Memory& m, State state, int64_t row, int32_t query, bool whole,
                  const float* key_scales, const float* value_scales, const int32_t* slots) {
  constexpr int kVectors = kChunk / kLanes;
  float* scores = m.scores + row * kChunk;
  Floats each[kVectors], top = all(kLowest), total{};
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    each[v] = load<Floats>(scores + v * kLanes) * all(a.scale);
    if (key_scales) each[v] = each[v] * load<Floats>(key_scales + v * kLanes);
    if (!whole) {
      const Words distance = (Words)all(query) - load<Words>(slots + v * kLanes);  // of later slots at least 2**31
      each[v] = select((Ints)(distance < (Words{} + uint32_t(a.window))), each[v], all(kLowest));
    }
    top = larger(top, each[v]);
  }
  const float before = state.largest[row], highest = largest(top), after = before > highest ? before : highest;
  // Before a slot is seen, the weights of all are 0, not those of equal scores.
  const bool none = after == kLowest;
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    Floats weight = none ? Floats{} : exponential(each[v] - all(after));
    total = total + weight;
    if (value_scales) weight = weight * load<Floats>(value_scales + v * kLanes);
    if (kPairs) {
      store(m.weights + 2 * (row * kChunk + v * kLanes), to_bfloat16(weight));
    } else {
      store(m.weights + 4 * (row * kChunk + v * kLanes), weight);
    }
  }
  const float factor = exponential(all(before - after))[0];
  m.factors[row] = factor;
  state.largest[row] = after;
  state.weights[row] = state.weights[row] * factor + sum(total);
}

// n numbers of the chunk, in `copy` and filled up if the chunk is not whole.
template <class T>
inline const T* filled(const T* from, int n, T rest, T* copy) {
  if (!from || n == kChunk) return from;
  for (int i = 0; i < kChunk; ++i) copy[i] = i < n ? from[i] : rest;
  return copy;
}

template <bool kPairs>
bool span_of(const Attention& a, const Block& block, int64_t begin, void* memory, State state) {
  const int64_t end = begin + kSpan < a.slots ? begin + kSpan : a.slots;
  Chunk chunk = next_chunk(a, block, begin, end);
  if (chunk.begin == end) return false;
  const int64_t group = a.heads / a.kv, depth = rounded_up(a.d, kLanes), rows = block.count * group;
  const Memory m(a, rows, memory);
  for (int64_t r = 0; r < rows; ++r) state.largest[r] = kLowest, state.weights[r] = 0;
  for (int64_t i = 0; i < rows * depth; i += kLanes) store(state.values + i, Floats{});
  const int size = size_of(a.cache);
  const int64_t head = block.batch * a.kv + block.head;
  const char *keys = a.keys + head * a.d * a.slots * size, *values = a.values + head * a.slots * a.d * size;
  const int32_t* queries = a.positions + block.batch * a.queries + block.first;
  while (chunk.begin < end) {
    const int64_t at = chunk.begin;
    const Source k{keys + at * size, a.slots * size, int(a.d), chunk.count, a.cache, a.table, a.has_sign};
    const Source v{values + at * a.d * size, a.d * size, chunk.count, int(a.d), a.cache, a.table, a.has_sign};
    const Chunk next = next_chunk(a, block, at + kChunk, end);
    const int64_t first = chunk.first * group, some = (chunk.last - chunk.first) * group;
    const int64_t step = kPairs ? depth / 2 : depth;
    Ahead ahead{v.data, v.stride, v.rows, v.columns * size};
    pack(k, kPairs, kChunk, m.panel, ahead);
    product<kPairs>(some, int(a.d), m.q + 4 * first * step, step, m.panel, kChunk, m.scores + first * kChunk, kChunk,
                    nullptr);
    auto* key_scales = filled(a.key_scales ? a.key_scales + head * a.slots + at : nullptr, chunk.count, 1.0f, m.key_scales);
    auto* value_scales = filled(a.value_scales ? a.value_scales + head * a.slots + at : nullptr, chunk.count, 1.0f, m.value_scales);
    auto* slots = filled(a.slot_positions + block.batch * a.slots + at, chunk.count, INT32_MAX, m.positions);
    for (int64_t i = chunk.first; i < chunk.last; ++i)
      for (int64_t r = i * group; r < (i + 1) * group; ++r)
        weigh<kPairs>(a, m, state, r, queries[i], chunk.whole, key_scales, value_scales, slots);
    ahead = {keys + next.begin * size, k.stride, k.rows, next.count * size};
    pack(v, kPairs, int(depth), m.panel, ahead);
    const int64_t weights = kPairs ? kChunk / 2 : kChunk;
    product<kPairs>(some, chunk.count, m.weights + 4 * first * weights, weights, m.panel, int(depth),
                    state.values + first * depth, depth, m.factors + first);
    chunk = next;
  }
  return true;
}

bool span(const Attention& a, const Block& block, int64_t begin, void* memory, State state) {
  if constexpr (kHasPairs)
    if (uses_pairs(a)) return span_of<true>(a, block, begin, memory, state);
  return span_of<false>(a, block, begin, memory, state);
}

// The row of a block in q and out: of query `row / group`, and of head `row % group` of the group.
inline int64_t row_of(const Attention& a, const Block& block, int64_t row) {
  const int64_t group = a.heads / a.kv, query = block.batch * a.queries + block.first + row / group;
  return query * a.heads + block.head * group + row % group;
}

void prepare(const Attention& a, const Block& block, void* memory) {
  const int64_t depth = rounded_up(a.d, kLanes), rows = block.count * (a.heads / a.kv);
  const Memory m(a, rows, memory);
  const bool pairs = uses_pairs(a);
  for (int64_t r = 0; r < rows; ++r) {
    const char* from = a.q + row_of(a, block, r) * a.d * size_of(a.kind);
    char* to = m.q + (pairs ? 2 : 4) * r * depth;
    if (pairs) {
      __builtin_memcpy(to, from, size_t(2 * a.d));
      __builtin_memset(to + 2 * a.d, 0, size_t(2 * (depth - a.d)));
    } else {
      widen(a.kind, from, nullptr, int(a.d), int(depth), reinterpret_cast<float*>(to));
    }
  }
}

void merge(int64_t rows, int64_t width, State total, State span) {
  for (int64_t r = 0; r < rows; ++r) {
    if (span.weights[r] == 0) continue;
    float *to = total.values + r * width, *from = span.values + r * width;
    if (total.weights[r] == 0) {
      total.largest[r] = span.largest[r], total.weights[r] = span.weights[r];
      __builtin_memcpy(to, from, size_t(4 * width));
      continue;
    }
    const float before = total.largest[r], one = span.largest[r], after = before > one ? before : one;
    const Floats factor = exponential(all(before - after)), other = exponential(all(one - after));
    for (int64_t i = 0; i < width; i += kLanes)
      store(to + i, fma(load<Floats>(from + i), other, load<Floats>(to + i) * factor));
    total.weights[r] = total.weights[r] * factor[0] + span.weights[r] * other[0];
    total.largest[r] = after;
  }
}

void finish(const Attention& a, const Block& block, State state) {
  const int64_t depth = rounded_up(a.d, kLanes), rows = block.count * (a.heads / a.kv);
  const int size = size_of(a.kind);
  for (int64_t r = 0; r < rows; ++r) {
    char* to = a.out + row_of(a, block, r) * a.d * size;
    const Floats factor = all(state.weights[r] == 0 ? 0.0f : 1.0f / state.weights[r]);
    for (int64_t i = 0; i < a.d; i += kLanes) {
      const Floats x = load<Floats>(state.values + r * depth + i) * factor + Floats{};  // not -0
      char numbers[4 * kLanes];
      if (a.kind == Kind::kFloat32) store(numbers, x);
      if (a.kind == Kind::kBfloat16) store(numbers, to_bfloat16(x));
      if (a.kind == Kind::kFloat16) store(numbers, to_float16(x));
      __builtin_memcpy(to + i * size, numbers, size_t(size * (a.d - i < kLanes ? a.d - i : kLanes)));
    }
  }
}

void exponentials(int64_t n, const float* x, float* y) {
  for (int64_t i = 0; i < n; i += kLanes) {
    float some[kLanes] = {};
    const size_t bytes = size_t(4 * (n - i < kLanes ? n - i : kLanes));
    __builtin_memcpy(some, x + i, bytes);
    store(some, exponential(load<Floats>(some)));
    __builtin_memcpy(y + i, some, bytes);
  }
}

constexpr AttentionIsa kAttention = {kLanes, memory, prepare, span, merge, finish, exponentials};

}  // namespace
}  // namespace attention
}  // namespace perparam
