// The FFI handler of products: y = x @ (kernel * scales).T of one x with several kernels, and the gradient of x.
//
// Divides the products into tasks of some panels and rows, for the threads of XLA's pool; an Isa computes them.

#include <algorithm>
#include <vector>

#include <xla/ffi/api/ffi.h>

#include "export.h"
#include "isa.h"
#include "operands.h"
#include "panel.h"
#include "parallel.h"

namespace perparam {
namespace {

ffi::Error Multiply(ffi::ThreadPool pool, ffi::AnyBuffer x_buffer, ffi::AnyBuffer x_scales, ffi::RemainingArgs arguments,
                    ffi::RemainingRets results, ffi::Span<const uint16_t> table, int32_t values, int32_t rounding,
                    int64_t block_height, int64_t block_width, int64_t x_group, bool transposed) {
  const Isa& isa = *perparam::isa();
  if (table.size() != 256) return ffi::Error::InvalidArgument("a table has 256 entries");
  Format format{Values(values), Rounding(rounding), Table(table.begin()), block_height, block_width, transposed};

  std::vector<Kernel> kernels;
  if (ffi::Error error = find_kernels(arguments, results, 2, kernels); error.failure()) return error;
  int64_t panels = 0;
  for (const Kernel& kernel : kernels) panels += panels_of(isa, format, kernel);
  if (x_buffer.dimensions()[0] == 0 || panels == 0) return ffi::Error::Success();
  Activations activations;
  if (ffi::Error error = activations.prepare(pool, isa, format, x_buffer, x_scales, x_group, kernels[0]); error.failure())
    return error;

  int64_t all = activations.x.rows;
  int64_t row_tasks = (all + kRows - 1) / kRows;
  int64_t rows = (all + row_tasks - 1) / row_tasks;
  int64_t group = std::max<int64_t>(1, panels * row_tasks / (kTasks * std::max<int64_t>(pool.num_threads(), 1)));
  int64_t groups = (panels + group - 1) / group;
  parallel_for(pool, groups * row_tasks, [&](int64_t task) {
    int64_t panel = task / row_tasks * group, row = task % row_tasks * rows;
    int64_t end = std::min(panel + group, panels);
    multiply_panels(isa, format, kernels, activations, panel, end, row, std::min(rows, all - row));
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
