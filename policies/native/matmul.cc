// The FFI handler of products: y = x @ (kernel * scales).T of one x with several kernels, and the gradient of x.
//
// Divides the products into tasks of some panels and rows, for the threads of XLA's pool; an Isa computes them.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include <xla/ffi/api/ffi.h>

#include "export.h"
#include "isa.h"
#include "panel.h"
#include "parallel.h"

namespace perparam {
namespace {

namespace ffi = xla::ffi;
using ffi::DataType;

constexpr int64_t kTasks = 8;      // per thread, so that a slow thread delays the others little

template <class T>
struct Aligned {
  std::unique_ptr<T, decltype(&std::free)> data{nullptr, std::free};
  T* reserve(size_t count) {
    data.reset(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)));
    return data.get();
  }
};

float widened(uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// Converts rows of x to what is multiplied, with an even number of columns in each run for pairs.
void convert_row(const ffi::AnyBuffer& from, int64_t row, int64_t length, const X& x, const std::vector<Run>& runs) {
  bool bfloat16 = from.element_type() == DataType::BF16;
  uint8_t* to = const_cast<uint8_t*>(x.at(row, 0));
  const uint8_t* source = static_cast<const uint8_t*>(from.untyped_data()) + row * length * (bfloat16 ? 2 : 4);
  if (x.pairs) {
    std::memset(to, 0, x.stride * 2);
    for (const Run& run : runs) std::memcpy(to + run.x_begin * 2, source + run.begin * 2, run.columns * 2);
  } else if (!bfloat16) {
    std::memcpy(to, source, length * 4);
  } else {
    for (int64_t k = 0; k < length; ++k)
      reinterpret_cast<float*>(to)[k] = widened(reinterpret_cast<const uint16_t*>(source)[k]);
  }
}

ffi::Error Multiply(ffi::ThreadPool pool, ffi::AnyBuffer x_buffer, ffi::AnyBuffer x_scales, ffi::RemainingArgs arguments,
                    ffi::RemainingRets results, ffi::Span<const uint16_t> table, int32_t values, int32_t rounding,
                    int64_t block_height, int64_t block_width, int64_t x_group, bool transposed) {
  const Isa& isa = *perparam::isa();
  if (table.size() != 256) return ffi::Error::InvalidArgument("a table has 256 entries");
  Format format{Values(values), Rounding(rounding), Table(table.begin()), block_height, block_width, transposed};

  int64_t length = x_buffer.dimensions()[1];
  bool bfloat16 = x_buffer.element_type() == DataType::BF16;
  X x{x_buffer.untyped_data(), x_buffer.dimensions()[0], length, nullptr, 0, false};
  // Kernels whose values are bfloat16, exactly or by rounding.
  bool narrow = format.rounding == Rounding::kNone ? format.values <= Values::kBfloat16 : format.rounding == Rounding::kBfloat16;
  x.pairs = isa.pairs && bfloat16 && narrow;
  if (x_scales.element_count() > 0) {
    x.scales = static_cast<const float*>(x_scales.untyped_data());
    x.scales_stride = x_scales.dimensions()[1];
  } else {
    x_group = 0;
  }

  std::vector<Kernel> kernels;
  int64_t panels = 0;
  for (size_t i = 0; i < results.size(); ++i) {
    auto kernel = arguments.get<ffi::AnyBuffer>(2 * i), scales = arguments.get<ffi::AnyBuffer>(2 * i + 1);
    auto result = results.get<ffi::AnyBuffer>(i);
    if (!kernel || !scales || !result) return ffi::Error::InvalidArgument("each result needs a kernel and its scales");
    auto sides = kernel->dimensions();
    bool scaled = scales->element_count() > 0;
    kernels.push_back({static_cast<const uint8_t*>(kernel->untyped_data()),
                       scaled ? static_cast<const float*>(scales->untyped_data()) : nullptr, sides[0], sides[1],
                       scaled ? scales->dimensions()[1] : 0, (*result)->untyped_data(),
                       (*result)->element_type() == DataType::BF16});
    panels += (kernels.back().outputs(format) + isa.width - 1) / isa.width;
  }
  if (kernels.empty() || x.rows == 0 || panels == 0) return ffi::Error::Success();

  std::vector<Run> runs = runs_of(format, kernels[0], x_group, x.pairs);
  bool padded = false;
  for (const Run& run : runs) padded |= x.pairs && run.x_begin + run.columns != run.begin + (run.columns + 1) / 2 * 2;
  Aligned<uint8_t> converted;
  // Rows that are 4 KiB apart share a set of the first cache, which holds fewer of them than a product takes.
  bool apart = x.rows > isa.rows && length * (x.pairs ? 2 : 4) % 4096 == 0;
  if (padded || apart || bfloat16 != x.pairs) {
    x.stride = runs.empty() ? 0 : runs.back().x_begin + (runs.back().columns + 1) / 2 * 2;
    if (x.stride % 1024 == 0) x.stride += 32;
    uint8_t* to = converted.reserve(x.rows * x.stride * (x.pairs ? 2 : 4));
    if (to == nullptr) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for the activations");
    x.data = to;
    int64_t rows = std::max<int64_t>(1, 65536 / std::max<int64_t>(length, 1));  // in a task
    parallel_for(pool, (x.rows + rows - 1) / rows, [&](int64_t i) {
      for (int64_t row = i * rows; row < std::min((i + 1) * rows, x.rows); ++row) convert_row(x_buffer, row, length, x, runs);
    });
  }

  int64_t row_tasks = (x.rows + kRows - 1) / kRows;
  int64_t rows = (x.rows + row_tasks - 1) / row_tasks;
  int64_t group = std::max<int64_t>(1, panels * row_tasks / (kTasks * std::max<int64_t>(pool.num_threads(), 1)));
  int64_t groups = (panels + group - 1) / group;
  parallel_for(pool, groups * row_tasks, [&](int64_t task) {
    int64_t panel = task / row_tasks * group, row = task % row_tasks * rows;
    int64_t end = std::min(panel + group, panels);
    int64_t first = 0;  // panel of the kernel
    for (const Kernel& kernel : kernels) {
      int64_t count = (kernel.outputs(format) + isa.width - 1) / isa.width;
      Panel computed(isa, format, kernel, x, runs);
      for (; panel < end && panel < first + count; ++panel)
        computed.compute((panel - first) * isa.width, row, std::min(rows, x.rows - row));
      first += count;
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace perparam

PERPARAM_EXPORT XLA_FFI_Error* perparam_matmul(XLA_FFI_CallFrame* call_frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(perparam_matmul, perparam::Multiply,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<xla::ffi::Span<const uint16_t>>("table")
                                  .Attr<int32_t>("values")
                                  .Attr<int32_t>("rounding")
                                  .Attr<int64_t>("block_height")
                                  .Attr<int64_t>("block_width")
                                  .Attr<int64_t>("x_group")
                                  .Attr<bool>("transposed"));
