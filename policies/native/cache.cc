// The FFI handler that writes new keys or values into a cache, whose memory the result shares.
//
// XLA's CPU backend updates a slice of 16-bit floats by writing the whole array again.

#include <algorithm>
#include <cstring>

#include <xla/ffi/api/ffi.h>

#include "export.h"

namespace perparam {
namespace {

namespace ffi = xla::ffi;

// `old` with `update` from `start` on along `axis`; like XLA, it moves a start that leaves no room for the update.
ffi::Error Put(ffi::AnyBuffer old, ffi::AnyBuffer update, ffi::Buffer<ffi::S32> start, ffi::Result<ffi::AnyBuffer> result,
               int64_t axis) {
  auto sides = old.dimensions(), part = update.dimensions();
  if (axis < 0 || axis >= int64_t(sides.size()) || part.size() != sides.size() || start.element_count() != 1 ||
      update.element_type() != old.element_type() || result->element_type() != old.element_type() ||
      result->element_count() != old.element_count())
    return ffi::Error::InvalidArgument("an update has the dtype and the axes of what it updates");
  int64_t outer = 1, inner = ffi::ByteWidth(old.element_type());
  for (int64_t i = 0; i < int64_t(sides.size()); ++i) {
    if (i != axis && part[i] != sides[i]) return ffi::Error::InvalidArgument("an update has all of the other axes");
    (i < axis ? outer : inner) *= i == axis ? 1 : sides[i];
  }
  const int64_t all = sides[axis] * inner, some = part[axis] * inner;
  if (some > all) return ffi::Error::InvalidArgument("an update is no larger than what it updates");
  const int64_t first = std::clamp<int64_t>(*start.typed_data(), 0, sides[axis] - part[axis]) * inner;

  auto* to = static_cast<char*>(result->untyped_data());
  auto* from = static_cast<const char*>(update.untyped_data());
  if (to != old.untyped_data()) std::memcpy(to, old.untyped_data(), outer * all);
  for (int64_t i = 0; i < outer; ++i) std::memcpy(to + i * all + first, from + i * some, some);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace perparam

PERPARAM_EXPORT XLA_FFI_Error* perparam_put(XLA_FFI_CallFrame* call_frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(perparam_put, perparam::Put,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("axis"));
