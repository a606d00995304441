// The products of some rows with one panel of a kernel, by the functions of an Isa: where the panel's values and scales are,
// decoded once for all rows.

#ifndef PERPARAM_PANEL_H_
#define PERPARAM_PANEL_H_

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "isa.h"

namespace perparam {
namespace {

constexpr int64_t kChunk = 2048;   // columns that are packed before they are multiplied: 128 KiB of pairs
constexpr int64_t kRows = 512;     // most rows of a task: 64 KiB of totals

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
    source.stride = columns * size;
    std::memset(tile, 0, isa_.width * source.stride);
    if (!format_.transposed) {
      for (int i = 0; i < valid_; ++i)
        std::memcpy(tile + i * source.stride, kernel_.data + ((output_ + i) * kernel_.columns + run.begin) * size,
                    run.columns * size);
    } else if (size == 1) {
      copy_transposed<uint8_t>(run, tile, columns);
    } else if (size == 2) {
      copy_transposed<uint16_t>(run, tile, columns);
    } else {
      copy_transposed<uint32_t>(run, tile, columns);
    }
    return source;
  }

  template <class T>
  void copy_transposed(const Run& run, uint8_t* tile, int stride) const {
    const T* from = reinterpret_cast<const T*>(kernel_.data) + run.begin * kernel_.columns + output_;
    T* to = reinterpret_cast<T*>(tile);
    for (int k = 0; k < run.columns; ++k)
      for (int i = 0; i < valid_; ++i) to[i * stride + k] = from[k * kernel_.columns + i];
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

}  // namespace
}  // namespace perparam

#endif
