// Attention over a cache of keys and values: what one call is, and what an instruction set provides for it.
//
// Slots are processed in chunks of kChunk, of which only those that a query sees are read.  A span of kSpan slots gives
// a State: the largest score, and the sums of weights and of weighted values relative to it.  The states of a query's
// spans are merged in the order of slots.  Chunks and spans begin at the same slots in every call, and what a query does
// not see leaves its state as it is: its result has the same bits alone and among others, for any number of threads,
// and for any number of empty slots.
#ifndef PERPARAM_ATTENTION_H_
#define PERPARAM_ATTENTION_H_

#include <cstddef>
#include <cstdint>

#include "table.h"

namespace perparam {

constexpr int kChunk = 64, kSpan = 1024;  // slots

enum class Kind : int32_t { kFloat32, kBfloat16, kFloat16, kInt8, kTable };  // how numbers are stored

struct Attention {
  int64_t batch, queries, heads, kv, d, slots;
  int32_t window;         // a query sees the keys less than this many positions before it
  float scale;            // of scores
  Kind kind;              // of q and out
  const char* q;          // (batch, queries, heads, d)
  char* out;              // (batch, queries, heads, d)
  Kind cache;             // of keys and values
  const Table* table;     // of keys and values, kInt8 and kTable
  const char* keys;       // (batch, kv, d, slots)
  const char* values;     // (batch, kv, slots, d)
  const float* key_scales;    // (batch, kv, slots), or null
  const float* value_scales;  // (batch, kv, slots), or null
  const int32_t* positions;   // (batch, queries)
  const int32_t* slot_positions;  // (batch, slots)
};

// Some queries of one kv head; their rows are those of each query's heads.
struct Block {
  int64_t batch, head;   // of keys and values
  int64_t first, count;  // queries
};

// Of `rows` rows, for slots that were merged: largest scores, sums of weights (0: no slot is seen), and of values.
struct State {
  float* largest;  // (rows,)
  float* weights;  // (rows,)
  float* values;   // (rows, width)
};

struct AttentionIsa {
  int lanes;  // the width of a state is d, rounded up to a multiple of this
  // Bytes of memory that a block of `rows` rows needs.
  size_t (*memory)(const Attention&, int64_t rows);
  // Copies the queries of a block into memory.
  void (*prepare)(const Attention&, const Block&, void* memory);
  // The state of the span of slots that begins at `begin`; false if no query sees one of them.
  bool (*span)(const Attention&, const Block&, int64_t begin, void* memory, State);
  // Adds a span's state to the state of earlier spans.
  void (*merge)(int64_t rows, int64_t width, State total, State span);
  // Writes the results of a block; 0 for queries that see no slot.
  void (*finish)(const Attention&, const Block&, State);
  // exp of n numbers, for tests.
  void (*exponential)(int64_t n, const float* x, float* y);
};

}  // namespace perparam

#endif
