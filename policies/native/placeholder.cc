// Stands in for dispatch.cc and matmul.cc until they exist: one handler, which adds 1 to each float, and the scalar set.

#include <xla/ffi/api/ffi.h>

#include <cstdlib>
#include <cstring>

#include "export.h"

namespace {

namespace ffi = xla::ffi;

ffi::Error AddOne(ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::F32> y) {
  for (size_t i = 0; i < x.element_count(); ++i) y->typed_data()[i] = x.typed_data()[i] + 1.0f;
  return ffi::Error::Success();
}

}  // namespace

// The declaration makes the symbol visible, which XLA's macro leaves to the flags.
PERPARAM_EXPORT XLA_FFI_Error* perparam_add_one(XLA_FFI_CallFrame* call_frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(perparam_add_one, AddOne,
                              ffi::Ffi::Bind().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>());

PERPARAM_EXPORT const char* perparam_instructions() {
  const char* forced = std::getenv("PERPARAM_CPU");
  return forced == nullptr || std::strcmp(forced, "scalar") == 0 ? "scalar" : nullptr;
}
