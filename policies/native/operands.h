// What the handlers of products share: kernels and activations as an Isa takes them.

#ifndef PERPARAM_OPERANDS_H_
#define PERPARAM_OPERANDS_H_

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include <xla/ffi/api/ffi.h>

#include "isa.h"
#include "panel.h"
#include "parallel.h"

namespace perparam {
namespace {

namespace ffi = xla::ffi;
using ffi::DataType;

constexpr int64_t kTasks = 8;  // per thread, so that a slow thread delays the others little

template <class T>
struct Aligned {
  std::unique_ptr<T, decltype(&std::free)> data{nullptr, std::free};
  T* reserve(size_t count) {
    data.reset(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)));
    return data.get();
  }
};

// The kernels of a call, (rows, columns) or stacks (groups, rows, columns): for each result a buffer of values and one of
// scales, perhaps empty.
ffi::Error find_kernels(const ffi::RemainingArgs& arguments, ffi::RemainingRets& results, size_t rank,
                        std::vector<Kernel>& kernels) {
  for (size_t i = 0; i < results.size(); ++i) {
    auto kernel = arguments.get<ffi::AnyBuffer>(2 * i), scales = arguments.get<ffi::AnyBuffer>(2 * i + 1);
    auto result = results.get<ffi::AnyBuffer>(i);
    if (!kernel || !scales || !result || kernel->dimensions().size() != rank)
      return ffi::Error::InvalidArgument("each result needs a kernel and its scales");
    bool scaled = scales->element_count() > 0;
    kernels.push_back({static_cast<const uint8_t*>(kernel->untyped_data()),
                       scaled ? static_cast<const float*>(scales->untyped_data()) : nullptr, kernel->dimensions()[rank - 2],
                       kernel->dimensions()[rank - 1], scaled ? scales->dimensions().back() : 0, (*result)->untyped_data(),
                       (*result)->element_type() == DataType::BF16});
  }
  return ffi::Error::Success();
}

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

// The activations of a call, converted to what is multiplied, and the runs of their columns.
struct Activations {
  X x{};
  std::vector<Run> runs;

  // x_group: columns of x with one scale; kernel: any of the call.
  ffi::Error prepare(ffi::ThreadPool& pool, const Isa& isa, const Format& format, const ffi::AnyBuffer& buffer,
                     const ffi::AnyBuffer& scales, int64_t x_group, const Kernel& kernel) {
    int64_t length = buffer.dimensions()[1];
    bool bfloat16 = buffer.element_type() == DataType::BF16;
    x = {buffer.untyped_data(), buffer.dimensions()[0], length, nullptr, 0, false};
    // Kernels whose values are bfloat16, exactly or by rounding.
    bool narrow =
        format.rounding == Rounding::kNone ? format.values <= Values::kBfloat16 : format.rounding == Rounding::kBfloat16;
    x.pairs = isa.pairs && bfloat16 && narrow;
    if (scales.element_count() > 0) {
      x.scales = static_cast<const float*>(scales.untyped_data());
      x.scales_stride = scales.dimensions()[1];
    } else {
      x_group = 0;
    }
    runs = runs_of(format, kernel, x_group, x.pairs);
    bool padded = false;
    for (const Run& run : runs) padded |= x.pairs && run.x_begin + run.columns != run.begin + (run.columns + 1) / 2 * 2;
    // Rows that are 4 KiB apart share a set of the first cache, which holds fewer of them than a product takes.
    bool apart = x.rows > isa.rows && length * (x.pairs ? 2 : 4) % 4096 == 0;
    if (!padded && !apart && bfloat16 == x.pairs) return ffi::Error::Success();
    x.stride = runs.empty() ? 0 : runs.back().x_begin + (runs.back().columns + 1) / 2 * 2;
    if (x.stride % 1024 == 0) x.stride += 32;
    uint8_t* to = converted_.reserve(x.rows * x.stride * (x.pairs ? 2 : 4));
    if (to == nullptr) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for the activations");
    x.data = to;
    int64_t rows = std::max<int64_t>(1, 65536 / std::max<int64_t>(length, 1));  // in a task
    parallel_for(pool, (x.rows + rows - 1) / rows, [&](int64_t i) {
      for (int64_t row = i * rows; row < std::min((i + 1) * rows, x.rows); ++row) convert_row(buffer, row, length, x, runs);
    });
    return ffi::Error::Success();
  }

 private:
  Aligned<uint8_t> converted_;
};

// The panels of a kernel.
int64_t panels_of(const Isa& isa, const Format& format, const Kernel& kernel) {
  return (kernel.outputs(format) + isa.width - 1) / isa.width;
}

// Computes panels [begin, end), counted from the first kernel to the last, for `count` rows.
void multiply_panels(const Isa& isa, const Format& format, const std::vector<Kernel>& kernels, const Activations& activations,
                     int64_t begin, int64_t end, int64_t row, int64_t count) {
  int64_t first = 0;  // panel of the kernel
  for (const Kernel& kernel : kernels) {
    int64_t panels = panels_of(isa, format, kernel);
    Panel computed(isa, format, kernel, activations.x, activations.runs);
    for (; begin < end && begin < first + panels; ++begin) computed.compute((begin - first) * isa.width, row, count);
    first += panels;
  }
}

}  // namespace
}  // namespace perparam

#endif
