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
#include "parallel.h"

namespace perparam {
namespace {

namespace ffi = xla::ffi;
using ffi::DataType;

constexpr int64_t kChunk = 2048;   // columns that are packed before they are multiplied: 128 KiB of pairs
constexpr int64_t kRows = 512;     // most rows of a task: 64 KiB of totals
constexpr int64_t kTasks = 8;      // per thread, so that a slow thread delays the others little

template <class T>
struct Aligned {
  std::unique_ptr<T, decltype(&std::free)> data{nullptr, std::free};
  T* reserve(size_t count) {
    data.reset(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)));
    return data.get();
  }
};

// Columns with one scale for each output and each row.
struct Run {
  int64_t begin;    // in the kernel
  int columns;
  int64_t x_begin;  // in the rows of x as multiplied
  int64_t scale;    // what it adds to the index of a scale
  int64_t x_scale;  // index of the scale of a row of x
};

// How to read the kernels of a call; the same for all.
struct Format {
  Values values;
  Rounding rounding;
  Table table;
  int64_t block_height, block_width;
  bool transposed;  // sums over the rows of the kernel
  int size() const { return values == Values::kFloat32 ? 4 : values >= Values::kBfloat16 ? 2 : 1; }
};

struct Kernel {
  const uint8_t* data;
  const float* scales;  // null: 1
  int64_t rows, columns, grid_columns;
  void* result;
  bool bfloat16_result;
  int64_t outputs(const Format& format) const { return format.transposed ? columns : rows; }
};

// x as multiplied: (rows, stride), bfloat16 for pairs, else float32.
struct X {
  const void* data;
  int64_t rows, stride;
  const float* scales;  // (rows, scales_stride), null: 1
  int64_t scales_stride;
  bool pairs;
  const uint8_t* at(int64_t row, int64_t column) const {
    return static_cast<const uint8_t*>(data) + (row * stride + column) * (pairs ? 2 : 4);
  }
};

float widened(uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

std::vector<Run> runs_of(const Format& format, const Kernel& kernel, int64_t x_group, bool pairs) {
  int64_t length = format.transposed ? kernel.rows : kernel.columns;
  int64_t block = format.transposed ? format.block_height : format.block_width;
  std::vector<Run> runs;
  for (int64_t begin = 0, x_begin = 0; begin < length;) {
    int64_t end = std::min(begin + kRun, length);
    if (kernel.scales) end = std::min(end, (begin / block + 1) * block);
    if (x_group) end = std::min(end, (begin / x_group + 1) * x_group);
    int columns = static_cast<int>(end - begin);
    int64_t scale = kernel.scales ? begin / block * (format.transposed ? kernel.grid_columns : 1) : 0;
    runs.push_back({begin, columns, x_begin, scale, x_group ? begin / x_group : 0});
    x_begin += pairs ? (columns + 1) / 2 * 2 : columns;
    begin = end;
  }
  return runs;
}

// Computes the outputs of one panel for some rows.
class Panel {
 public:
  Panel(const Isa& isa, const Format& format, const Kernel& kernel, const X& x, const std::vector<Run>& runs)
      : isa_(isa), format_(format), kernel_(kernel), x_(x), runs_(runs) {}

  void compute(int64_t output, int64_t row, int64_t count) {
    output_ = output;
    valid_ = static_cast<int>(std::min<int64_t>(isa_.width, kernel_.outputs(format_) - output));
    if (kernel_.scales) find_scales();
    std::fill_n(totals(), count * isa_.width, 0.0f);
    if (count <= isa_.rows) {
      for (const Run& run : runs_) few(run, row, static_cast<int>(count));
    } else {
      for (size_t begin = 0; begin < runs_.size(); begin += kChunk / kRun)
        many(begin, std::min(begin + kChunk / kRun, runs_.size()), row, count);
    }
    write(row, count);
  }

 private:
  // The largest scratch of any call, which each thread keeps.
  struct Scratch {
    alignas(64) uint8_t tile[kMaxWidth * kRun * 4];
    alignas(64) char panels[kMaxWidth * (kChunk + kRun) * 4];
    alignas(64) float totals[kRows * kMaxWidth];
  };
  static Scratch& scratch() {
    static thread_local std::unique_ptr<Scratch> owned(new Scratch);
    return *owned;
  }
  static float* totals() { return scratch().totals; }

  int panel_bytes() const { return isa_.width * kRun * (x_.pairs ? 2 : 4); }

  void few(const Run& run, int64_t row, int count) {
    load_scales(run);
    bool in_place;
    Source source = piece(run, in_place);
    Rows rows = rows_of(run, row, count, totals());
    if (in_place && count <= kFewRows) return isa_.multiply_few(rows, x_.pairs, source);
    isa_.pack(source, x_.pairs, scratch().panels);
    isa_.multiply(rows, x_.pairs, scratch().panels, columns(run));
  }

  void many(size_t begin, size_t end, int64_t row, int64_t count) {
    bool in_place;
    for (size_t i = begin; i < end; ++i) {
      load_scales(runs_[i]);
      Source source = piece(runs_[i], in_place);
        isa_.pack(source, x_.pairs, scratch().panels + (i - begin) * panel_bytes());
    }
    for (int64_t first = 0; first < count; first += isa_.rows) {
      int rows = static_cast<int>(std::min<int64_t>(isa_.rows, count - first));
      for (size_t i = begin; i < end; ++i) {
        load_scales(runs_[i]);
        isa_.multiply(rows_of(runs_[i], row + first, rows, totals() + first * isa_.width), x_.pairs,
                      scratch().panels + (i - begin) * panel_bytes(), columns(runs_[i]));
      }
    }
  }

  int columns(const Run& run) const { return x_.pairs ? (run.columns + 1) / 2 * 2 : run.columns; }

  void find_scales() {
    for (int i = 0; i < isa_.width; ++i) {
      int64_t at = output_ + std::min(i, valid_ - 1);
      offsets_[i] = format_.transposed ? at / format_.block_width : at / format_.block_height * kernel_.grid_columns;
    }
    same_scales_ = offsets_[0] == offsets_[isa_.width - 1];
  }

  void load_scales(const Run& run) {
    if (!kernel_.scales) return;
    const float* scales = kernel_.scales + run.scale;
    if (same_scales_)
      std::fill_n(scales_, isa_.width, scales[offsets_[0]]);
    else
      for (int i = 0; i < isa_.width; ++i) scales_[i] = scales[offsets_[i]];
  }

  const float* ones() const {
    static const std::vector<float> ones(kMaxWidth, 1.0f);
    return ones.data();
  }

  Rows rows_of(const Run& run, int64_t row, int count, float* totals) const {
    bool applied = !kernel_.scales || format_.rounding != Rounding::kNone;
    return {count,
            x_.at(row, run.x_begin),
            x_.stride,
            x_.scales ? x_.scales + row * x_.scales_stride + run.x_scale : nullptr,
            x_.scales_stride,
            applied ? ones() : scales_,
            totals};
  }

  // The values of a run: in place if the panel and the run are full, else copied, with zeros beside them.
  Source piece(const Run& run, bool& in_place) const {
    int size = format_.size(), columns = (run.columns + kUnit - 1) / kUnit * kUnit;
    Source source{nullptr, columns, 0, format_.values, &format_.table, format_.rounding, kernel_.scales ? scales_ : ones()};
    in_place = !format_.transposed && valid_ == isa_.width && run.columns == columns;
    if (in_place) {
      source.stride = kernel_.columns * size;
      source.data = kernel_.data + output_ * source.stride + run.begin * size;
      return source;
    }
    uint8_t* tile = scratch().tile;
    source.data = tile;
    source.stride = kRun * size;
    std::memset(tile, 0, isa_.width * source.stride);
    if (!format_.transposed) {
      for (int i = 0; i < valid_; ++i)
        std::memcpy(tile + i * source.stride, kernel_.data + ((output_ + i) * kernel_.columns + run.begin) * size,
                    run.columns * size);
    } else if (size == 1) {
      copy_transposed<uint8_t>(run, tile);
    } else if (size == 2) {
      copy_transposed<uint16_t>(run, tile);
    } else {
      copy_transposed<uint32_t>(run, tile);
    }
    return source;
  }

  template <class T>
  void copy_transposed(const Run& run, uint8_t* tile) const {
    const T* from = reinterpret_cast<const T*>(kernel_.data) + run.begin * kernel_.columns + output_;
    T* to = reinterpret_cast<T*>(tile);
    for (int k = 0; k < run.columns; ++k)
      for (int i = 0; i < valid_; ++i) to[i * kRun + k] = from[k * kernel_.columns + i];
  }

  void write(int64_t row, int64_t count) const {
    int64_t outputs = kernel_.outputs(format_);
    for (int64_t r = 0; r < count; ++r) {
      const float* from = totals() + r * isa_.width;
      int64_t at = (row + r) * outputs + output_;
      if (kernel_.bfloat16_result) {
        uint16_t* to = static_cast<uint16_t*>(kernel_.result) + at;
        uint16_t rounded[kMaxWidth];
        isa_.round(from, valid_ == isa_.width ? to : rounded);
        if (valid_ < isa_.width) std::memcpy(to, rounded, valid_ * sizeof(uint16_t));
      } else {
        std::memcpy(static_cast<float*>(kernel_.result) + at, from, valid_ * sizeof(float));
      }
    }
  }

  const Isa& isa_;
  const Format& format_;
  const Kernel& kernel_;
  const X& x_;
  const std::vector<Run>& runs_;
  int64_t output_ = 0;
  int valid_ = 0;
  int64_t offsets_[kMaxWidth] = {};
  bool same_scales_ = false;
  float scales_[kMaxWidth] = {};
};

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
