// The kernels of attention, for the instruction set of the translation unit that includes this.
#ifndef PERPARAM_ATTENTION_KERNELS_H_
#define PERPARAM_ATTENTION_KERNELS_H_

#include "attention_products.h"

namespace perparam {
namespace attention {
namespace {

constexpr float kLowest = -3.4028234663852886e38f;  // of scores of slots that are not seen

// Whether keys, values and weights are multiplied as pairs of bfloat16: weights are rounded to bfloat16, as they are
// where values are multiplied in q's dtype.
inline bool uses_pairs(const Attention& a) {
  return kHasPairs && a.kind == Kind::kBfloat16 && a.cache != Kind::kFloat32 && a.cache != Kind::kFloat16;
}

inline int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Blocks of at most this many rows read the keys of a span row by row, in stretches that memory is fast at: 64 slots
// of one row are 64 or 128 bytes.  Others have more to compute than to read, and keep the scores of a chunk in registers.
constexpr int64_t kFewRows = 16;

// Parts of the memory of a block.
struct Memory {
  char *q, *weights;  // (rows, depth), (rows, kChunk): bfloat16 for pairs, otherwise float32
  float* scores;      // (rows, stride)
  int64_t stride;     // kSpan for few rows, otherwise kChunk
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
    const int64_t depth = rounded_up(a.d, kLanes), chunk = kChunk * depth, slab = kSlab * kSpan;
    stride = rows <= kFewRows ? kSpan : kChunk;
    q = take(4 * rows * depth);
    scores = reinterpret_cast<float*>(take(4 * rows * stride));
    weights = take(4 * rows * kChunk);
    factors = reinterpret_cast<float*>(take(4 * rows));
    panel = take(4 * (chunk > slab ? chunk : slab));
    key_scales = reinterpret_cast<float*>(take(4 * kChunk));
    value_scales = reinterpret_cast<float*>(take(4 * kChunk));
    positions = reinterpret_cast<int32_t*>(take(4 * kChunk));
    size = size_t(at - static_cast<char*>(memory));
  }
};

size_t memory(const Attention& a, int64_t rows) { return Memory(a, rows, nullptr).size; }

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
inline void weigh(const Attention& a, const Memory& m, State state, int64_t row, const float* scores, int32_t query,
                  bool whole, const float* key_scales, const float* value_scales, const int32_t* slots) {
  constexpr int kVectors = kChunk / kLanes;
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

// What a block reads of a span's keys and values.
struct Operands {
  const Attention& a;
  const Block& block;
  int64_t head = block.batch * a.kv + block.head;  // among those of the batch

  Source keys(int64_t slot, int count, int row = 0, int rows = 0) const {
    const int size = size_of(a.cache);
    return {a.keys + ((head * a.d + row) * a.slots + slot) * size, a.slots * size, rows ? rows : int(a.d), count, a.cache,
            a.table};
  }
  Source values(int64_t slot, int count) const {
    const int size = size_of(a.cache);
    return {a.values + (head * a.slots + slot) * a.d * size, a.d * size, count, int(a.d), a.cache, a.table};
  }
};

// Scores of all rows with the keys of `count` slots, kSlab rows of keys at a time.
template <bool kPairs>
inline void scores_by_slabs(const Operands& from, const Memory& m, int64_t rows, int64_t slot, int count) {
  const Attention& a = from.a;
  const int width = int(rounded_up(count, kChunk));
  const int64_t step = rounded_up(a.d, kLanes) / (kPairs ? 2 : 1);
  for (int64_t r = 0; r < rows; ++r)
    for (int i = 0; i < width; i += kLanes) store(m.scores + r * m.stride + i, Floats{});
  if (stream<kPairs>(rows, from.keys(slot, count), m.q, step, m.scores, m.stride, kSlab, int(a.d))) return;
  for (int row = 0; row < a.d; row += kSlab) {
    auto some = [&](int at) { return int(a.d - at < kSlab ? a.d - at : kSlab); };
    Ahead ahead(row + kSlab < a.d ? from.keys(slot, count, row + kSlab, some(row + kSlab)) : from.values(slot, kSlab));
    pack(from.keys(slot, count, row, some(row)), kPairs, width, m.panel, ahead);
    const char* x = m.q + 4 * (row / (kPairs ? 2 : 1));
    product<kPairs, To::kSums>(rows, some(row), x, step, m.panel, width, m.scores, m.stride);
  }
}

template <bool kPairs>
bool span_of(const Attention& a, const Block& block, int64_t begin, void* memory, State state) {
  const int64_t end = begin + kSpan < a.slots ? begin + kSpan : a.slots;
  Chunk chunk = next_chunk(a, block, begin, end);
  if (chunk.begin == end) return false;
  const int64_t group = a.heads / a.kv, depth = rounded_up(a.d, kLanes), rows = block.count * group;
  const Memory m(a, rows, memory);
  const Operands from{a, block};
  for (int64_t r = 0; r < rows; ++r) state.largest[r] = kLowest, state.weights[r] = 0;
  for (int64_t i = 0; i < rows * depth; i += kLanes) store(state.values + i, Floats{});
  const int32_t* queries = a.positions + block.batch * a.queries + block.first;
  const bool few = rows <= kFewRows;
  const int64_t start = chunk.begin, q_step = kPairs ? depth / 2 : depth, step = kPairs ? kChunk / 2 : kChunk;
  if (few) {
    int64_t last = end;
    for (Chunk each = chunk; each.begin < end; each = next_chunk(a, block, each.begin + kChunk, end))
      last = each.begin + each.count;
    scores_by_slabs<kPairs>(from, m, rows, start, int(last - start));
  }
  while (chunk.begin < end) {
    const int64_t at = chunk.begin, first = chunk.first * group, some = (chunk.last - chunk.first) * group;
    const Chunk next = next_chunk(a, block, at + kChunk, end);
    const Source values = from.values(at, chunk.count);
    if (!few) {
      Ahead ahead(values);
      pack(from.keys(at, chunk.count), kPairs, kChunk, m.panel, ahead);
      product<kPairs, To::kNew>(some, int(a.d), m.q + 4 * first * q_step, q_step, m.panel, kChunk,
                                m.scores + first * m.stride, m.stride);
    }
    auto scales = [&](const float* all_scales, float* copy) {
      return filled(all_scales ? all_scales + from.head * a.slots + at : nullptr, chunk.count, 1.0f, copy);
    };
    const float *key_scales = scales(a.key_scales, m.key_scales), *value_scales = scales(a.value_scales, m.value_scales);
    auto* slots = filled(a.slot_positions + block.batch * a.slots + at, chunk.count, INT32_MAX, m.positions);
    for (int64_t r = first; r < first + some; ++r)
      weigh<kPairs>(a, m, state, r, m.scores + r * m.stride + (few ? at - start : 0), queries[r / group], chunk.whole,
                    key_scales, value_scales, slots);
    const char* weights = m.weights + 4 * first * step;
    float* sums = state.values + first * depth;
    if (some <= kTileRows) {
      for (int64_t r = 0; r < some; ++r)
        for (int64_t i = r * depth; i < (r + 1) * depth; i += kLanes)
          store(sums + i, load<Floats>(sums + i) * all(m.factors[first + r]));
      if (stream<kPairs>(some, values, weights, step, sums, depth, kChunk,
                         next.begin == at + kChunk && next.count == kChunk ? 2 * kChunk : 0)) {
        chunk = next;
        continue;
      }
      for (int64_t r = 0; r < some; ++r) m.factors[first + r] = 1;
    }
    Ahead ahead = next.begin == end ? Ahead() : few ? Ahead(from.values(next.begin, next.count)) : Ahead(from.keys(next.begin, next.count));
    pack(values, kPairs, int(depth), m.panel, ahead);
    product<kPairs, To::kScaled>(some, chunk.count, weights, step, m.panel, int(depth), sums, depth, m.factors + first);
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
    const bool none = state.weights[r] == 0;  // and its values are what was in memory
    const Floats factor = all(none ? 0.0f : 1.0f / state.weights[r]);
    for (int64_t i = 0; i < a.d; i += kLanes) {
      const Floats x = none ? Floats{} : load<Floats>(state.values + r * depth + i) * factor + Floats{};  // not -0
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

#endif
