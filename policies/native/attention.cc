// The handler of attention over a cache: reads the operands of a call and divides its work among threads.

#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <vector>

#include <xla/ffi/api/ffi.h>

#include "export.h"
#include "isa.h"
#include "parallel.h"

namespace perparam {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kRows = 96;               // of a block
constexpr int64_t kTasks = 4;               // at least so many for each thread, where spans allow it
constexpr int64_t kSmall = 1 << 16;         // bytes of keys and values that one thread reads before another has begun

// Memory of a thread, kept for its next task; begins at a multiple of 64 bytes.
char* thread_memory(size_t bytes) {
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<char, Free> memory;
  thread_local size_t size = 0;
  if (size < bytes) {
    memory.reset();
    size = (bytes + 4095) / 4096 * 4096;
    memory.reset(static_cast<char*>(std::aligned_alloc(64, size)));
  }
  return memory.get();
}

// States of `rows` rows in memory of `size` floats.
struct States {
  int64_t rows, width;
  int64_t size() const { return rows * (width + 2) + 14; }  // the values begin at a multiple of 64 bytes
  State in(float* memory) const {
    return {memory, memory + rows, memory + (2 * rows + 15) / 16 * 16};
  }
};

void run(const Attention& a, const AttentionIsa& isa, ffi::ThreadPool& pool) {
  const int64_t group = a.heads / a.kv, width = (a.d + isa.lanes - 1) / isa.lanes * isa.lanes;
  const int64_t most = std::max<int64_t>(1, kRows / group), blocks = (a.queries + most - 1) / most;
  const int64_t spans = (a.slots + kSpan - 1) / kSpan, heads = a.batch * a.kv;
  const States states{std::min(most, a.queries) * group, width};
  const size_t block_memory = isa.memory(a, states.rows);
  auto block_of = [&](int64_t i) {
    // The last queries first: they see the most slots.
    const int64_t first = (blocks - 1 - i / heads) * most;
    return Block{i % heads / a.kv, i % a.kv, first, std::min(most, a.queries - first)};
  };
  // Spans of a block are divided among tasks where there are few blocks; the result does not depend on it.
  const int64_t wanted = kTasks * std::max<int64_t>(1, pool.num_threads());
  const int64_t parts = blocks > 1 ? 1 : std::min(spans, std::max<int64_t>(1, wanted / heads));
  const int64_t each = (spans + parts - 1) / parts;
  std::unique_ptr<float[]> partial;
  std::unique_ptr<std::atomic<int64_t>[]> waiting;
  std::unique_ptr<bool[]> seen;
  if (parts > 1) {
    partial.reset(new float[heads * spans * states.size()]);
    seen.reset(new bool[heads * spans]);
    waiting.reset(new std::atomic<int64_t>[heads]);
    for (int64_t i = 0; i < heads; ++i) waiting[i] = parts;
  }
  auto task = [&](int64_t i) {
    const int64_t index = i / parts, part = i % parts;
    const Block block = block_of(index);
    const int64_t rows = block.count * group;
    const size_t floats = sizeof(float) * ((states.size() + 15) / 16 * 16);
    char* memory = thread_memory(block_memory + 2 * floats);
    const State total = states.in(reinterpret_cast<float*>(memory + block_memory));
    const State own = states.in(reinterpret_cast<float*>(memory + block_memory + floats));
    auto partial_of = [&](int64_t span) { return states.in(partial.get() + (index * spans + span) * states.size()); };
    std::fill(total.weights, total.weights + rows, 0.0f);
    isa.prepare(a, block, memory);
    for (int64_t span = part * each; span < std::min(spans, (part + 1) * each); ++span) {
      const bool any = isa.span(a, block, span * kSpan, memory, parts > 1 ? partial_of(span) : own);
      if (parts > 1) {
        seen[index * spans + span] = any;
      } else if (any) {
        isa.merge(rows, width, total, own);
      }
    }
    if (parts > 1) {
      if (waiting[index].fetch_sub(1) > 1) return;
      for (int64_t span = 0; span < spans; ++span)
        if (seen[index * spans + span]) isa.merge(rows, width, total, partial_of(span));
    }
    isa.finish(a, block, total);
  };
  const int64_t tasks = heads * blocks * parts;
  if (tasks * a.d * std::min(a.slots, each * kSpan) <= kSmall) {
    for (int64_t i = 0; i < tasks; ++i) task(i);
  } else {
    parallel_for(pool, tasks, task);
  }
}

bool kind_of(ffi::DataType type, Kind* kind) {
  switch (type) {
    case ffi::DataType::F32: *kind = Kind::kFloat32; return true;
    case ffi::DataType::BF16: *kind = Kind::kBfloat16; return true;
    case ffi::DataType::F16: *kind = Kind::kFloat16; return true;
    case ffi::DataType::S8: *kind = Kind::kInt8; return true;
    case ffi::DataType::U8: *kind = Kind::kTable; return true;
    default: return false;
  }
}

const float* floats_of(const ffi::Buffer<ffi::F32>& buffer) {
  return buffer.element_count() ? buffer.typed_data() : nullptr;
}

// Scales are of size 0 for a cache without them.
ffi::Error Attend(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                  ffi::Buffer<ffi::F32> key_scales, ffi::Buffer<ffi::F32> value_scales,
                  ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> slots, ffi::Buffer<ffi::U16> table,
                  ffi::Result<ffi::AnyBuffer> out, int32_t window, float scale) {
  auto q_shape = q.dimensions(), k_shape = keys.dimensions();
  if (q_shape.size() != 4 || k_shape.size() != 4) return ffi::Error::InvalidArgument("q and keys have 4 axes");
  Attention a{};
  a.batch = q_shape[0], a.queries = q_shape[1], a.heads = q_shape[2], a.d = q_shape[3];
  a.kv = k_shape[1], a.slots = k_shape[3];
  a.window = window, a.scale = scale;
  a.q = static_cast<const char*>(q.untyped_data()), a.out = static_cast<char*>(out->untyped_data());
  a.keys = static_cast<const char*>(keys.untyped_data()), a.values = static_cast<const char*>(values.untyped_data());
  a.key_scales = floats_of(key_scales), a.value_scales = floats_of(value_scales);
  a.positions = positions.typed_data(), a.slot_positions = slots.typed_data();
  if (!kind_of(q.element_type(), &a.kind) || !kind_of(keys.element_type(), &a.cache) ||
      values.element_type() != keys.element_type() || out->element_type() != q.element_type() ||
      a.kind == Kind::kInt8 || a.kind == Kind::kTable)
    return ffi::Error::InvalidArgument("no kernel for these dtypes");
  const size_t scales = a.key_scales ? a.batch * a.kv * a.slots : 0;
  if (a.kv == 0 || a.heads % a.kv || k_shape[0] != a.batch || k_shape[2] != a.d ||
      values.element_count() != keys.element_count() || out->element_count() != q.element_count() ||
      positions.element_count() != size_t(a.batch * a.queries) || slots.element_count() != size_t(a.batch * a.slots) ||
      key_scales.element_count() != scales || value_scales.element_count() != scales ||
      table.element_count() != 256)
    return ffi::Error::InvalidArgument("shapes do not fit");
  // Of other caches too: the table of the call is zeros then, and is not read.
  const Table values_of_bytes(table.typed_data());
  a.table = &values_of_bytes;
  run(a, *isa()->attention, pool);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace perparam

PERPARAM_EXPORT XLA_FFI_Error* perparam_attention(XLA_FFI_CallFrame* call_frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(perparam_attention, perparam::Attend,
                              perparam::ffi::Ffi::Bind()
                                  .Ctx<perparam::ffi::ThreadPool>()
                                  .Arg<perparam::ffi::AnyBuffer>()
                                  .Arg<perparam::ffi::AnyBuffer>()
                                  .Arg<perparam::ffi::AnyBuffer>()
                                  .Arg<perparam::ffi::Buffer<perparam::ffi::F32>>()
                                  .Arg<perparam::ffi::Buffer<perparam::ffi::F32>>()
                                  .Arg<perparam::ffi::Buffer<perparam::ffi::S32>>()
                                  .Arg<perparam::ffi::Buffer<perparam::ffi::S32>>()
                                  .Arg<perparam::ffi::Buffer<perparam::ffi::U16>>()
                                  .Ret<perparam::ffi::AnyBuffer>()
                                  .Attr<int32_t>("window")
                                  .Attr<float>("scale"));

// exp as attention computes it, for tests; x is at most 0.
PERPARAM_EXPORT void perparam_exponential(int64_t n, const float* x, float* y) {
  perparam::isa()->attention->exponential(n, x, y);
}
