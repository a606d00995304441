// The FFI handler of products of groups of rows: each group of rows of x with its own kernel of each stack.
//
// Stacks are (groups, rows, columns), and only the kernels of groups with rows are read. A task is some panels of the
// kernels of one group, for all rows of the group up to kRows: each panel is decoded once for them.

#include <algorithm>
#include <cstring>
#include <vector>

#include <xla/ffi/api/ffi.h>

#include "export.h"
#include "isa.h"
#include "operands.h"
#include "panel.h"
#include "parallel.h"

namespace perparam {
namespace {

constexpr int64_t kDecoding = 16;  // decoding a panel takes about as long as its products with so many rows

// Rows of one group, and the panels [begin, end) of the group's kernels.
struct Task {
  int64_t group, row, count, begin, end;
  int64_t cost() const { return (end - begin) * (count + kDecoding); }
};

// For each group the rows that it has of `rows`, in parts of up to kRows, each with all panels. Negative sizes are 0, and
// groups end with the rows.
std::vector<Task> parts_of(const int32_t* sizes, int64_t groups, int64_t rows, int64_t panels) {
  std::vector<Task> parts;
  for (int64_t group = 0, row = 0; group < groups; ++group) {
    int64_t left = std::min<int64_t>(std::max<int64_t>(sizes[group], 0), rows - row);
    for (int64_t count; left > 0; row += count, left -= count) {
      int64_t equal = (left + kRows - 1) / kRows;  // parts, as equal as can be
      count = (left + equal - 1) / equal;
      parts.push_back({group, row, count, 0, panels});
    }
  }
  return parts;
}

// The parts, divided by panels into tasks that take about as long as each other: kTasks for each thread.
std::vector<Task> tasks_of(const std::vector<Task>& parts, int64_t threads) {
  int64_t total = 0;
  for (const Task& part : parts) total += part.cost();
  int64_t most = total / (kTasks * std::max<int64_t>(threads, 1)) + 1;
  std::vector<Task> tasks;
  for (const Task& part : parts) {
    int64_t count = std::min((part.cost() + most - 1) / most, part.end);
    for (int64_t i = 0; i < count; ++i)
      tasks.push_back({part.group, part.row, part.count, part.end * i / count, part.end * (i + 1) / count});
  }
  return tasks;
}

// The kernel of a group in a stack.
Kernel of_group(const Kernel& stack, const Format& format, int64_t group) {
  Kernel kernel = stack;
  kernel.data += group * stack.rows * stack.columns * format.size();
  if (stack.scales)
    kernel.scales += group * ((stack.rows + format.block_height - 1) / format.block_height) * stack.grid_columns;
  return kernel;
}

ffi::Error MultiplyGroups(ffi::ThreadPool pool, ffi::AnyBuffer x_buffer, ffi::AnyBuffer x_scales,
                          ffi::Buffer<ffi::S32> sizes, ffi::RemainingArgs arguments, ffi::RemainingRets results,
                          ffi::Span<const uint16_t> table, int32_t values, int32_t rounding, int64_t block_height,
                          int64_t block_width, int64_t x_group, bool transposed) {
  const Isa& isa = *perparam::isa();
  if (table.size() != 256) return ffi::Error::InvalidArgument("a table has 256 entries");
  Format format{Values(values), Rounding(rounding), Table(table.begin()), block_height, block_width, transposed};

  std::vector<Kernel> stacks;
  if (ffi::Error error = find_kernels(arguments, results, 3, stacks); error.failure()) return error;
  int64_t panels = 0, groups = static_cast<int64_t>(sizes.element_count());
  for (size_t i = 0; i < stacks.size(); ++i) {
    if (arguments.get<ffi::AnyBuffer>(2 * i)->dimensions()[0] != groups)
      return ffi::Error::InvalidArgument("each group needs a size and a kernel of each stack");
    panels += panels_of(isa, format, stacks[i]);
  }
  int64_t rows = x_buffer.dimensions()[0];
  if (rows == 0 || panels == 0) return ffi::Error::Success();

  std::vector<Task> parts = parts_of(sizes.typed_data(), groups, rows, panels);
  int64_t end = parts.empty() ? 0 : parts.back().row + parts.back().count;
  for (const Kernel& stack : stacks) {
    int64_t bytes = stack.outputs(format) * (stack.bfloat16_result ? 2 : 4);
    std::memset(static_cast<char*>(stack.result) + end * bytes, 0, (rows - end) * bytes);
  }
  if (parts.empty()) return ffi::Error::Success();
  Activations activations;
  if (ffi::Error error = activations.prepare(pool, isa, format, x_buffer, x_scales, x_group, stacks[0]); error.failure())
    return error;

  std::vector<Task> tasks = tasks_of(parts, pool.num_threads());
  parallel_for(pool, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task& task = tasks[i];
    std::vector<Kernel> kernels;
    for (const Kernel& stack : stacks) kernels.push_back(of_group(stack, format, task.group));
    multiply_panels(isa, format, kernels, activations, task.begin, task.end, task.row, task.count);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace perparam

PERPARAM_EXPORT XLA_FFI_Error* perparam_grouped_matmul(XLA_FFI_CallFrame* call_frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(perparam_grouped_matmul, perparam::MultiplyGroups,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<xla::ffi::Span<const uint16_t>>("table")
                                  .Attr<int32_t>("values")
                                  .Attr<int32_t>("rounding")
                                  .Attr<int64_t>("block_height")
                                  .Attr<int64_t>("block_width")
                                  .Attr<int64_t>("x_group")
                                  .Attr<bool>("transposed"));
