// The functions of an Isa, written once for all instruction sets.
//
// Each instruction set includes this file in an anonymous namespace of its own source, after a struct V of its vectors:
//
//   I, F            vectors of integers and of kLanes * 4 floats; kLanes lanes of 16 bytes each
//   kParts, kRows   vectors of outputs in a panel, and most rows of a product with one
//   kPairs          whether it multiplies pairs of bfloat16
//   gather_lanes    reads 4 * kLanes rows: out[j][c] has in lane L the 16 bytes from 16 c of row 4 L + j
//   unpack…         as in SSE2, within lanes
//   store_upper     writes the upper half of each 32 bits, side by side
//   Decoder<values> converts a vector of bytes, two pairs of columns of kPart rows, and passes them to a sink
//
// Weights are transposed within lanes of 16 bytes: four rows and a few columns at a time.

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

using F = V::F;
using I = V::I;

constexpr int kPart = 4 * V::kLanes;  // outputs in a vector
constexpr int kWidth = kPart * V::kParts;

// Calls sink.floats(part, k, even, odd) with the columns k and k + 1 of kPart rows, in float32, for each even k of
// 16 * kLanes bytes of each row, or sink.pair(part, k, pair), a vector of (row, column of the pair) bfloat16. Some parts
// at once, so that their sums do not wait for each other.
template <Values kValues, int kJoint, class Sink>
INLINE void visit_bytes(const V::Decoder<kValues>& decoder, const uint8_t* data, ptrdiff_t stride, Sink sink) {
  I lanes[kJoint][4][V::kLanes];
  UNROLL for (int part = 0; part < kJoint; ++part) V::gather_lanes(data + part * kPart * stride, stride, lanes[part]);
  UNROLL for (int c = 0; c < V::kLanes; ++c)
    UNROLL for (int part = 0; part < kJoint; ++part) {
      I(&rows)[4][V::kLanes] = lanes[part];
      I a0 = V::unpacklo16(rows[0][c], rows[1][c]), a1 = V::unpackhi16(rows[0][c], rows[1][c]);
      I b0 = V::unpacklo16(rows[2][c], rows[3][c]), b1 = V::unpackhi16(rows[2][c], rows[3][c]);
      // Two pairs of columns in each: (row, column of the pair) bytes of the first, then those of the second.
      I pairs[4] = {V::unpacklo32(a0, b0), V::unpackhi32(a0, b0), V::unpacklo32(a1, b1), V::unpackhi32(a1, b1)};
      UNROLL for (int i = 0; i < 4; ++i) decoder.decode(pairs[i], part, 16 * c + 4 * i, sink);
    }
}

// The same for values of two bytes, 8 * kLanes columns.
template <Values kValues, int kJoint, class Sink>
INLINE void visit_halves(const uint8_t* data, ptrdiff_t stride, Sink sink) {
  I lanes[kJoint][4][V::kLanes];
  UNROLL for (int part = 0; part < kJoint; ++part) V::gather_lanes(data + part * kPart * stride, stride, lanes[part]);
  UNROLL for (int c = 0; c < V::kLanes; ++c)
    UNROLL for (int part = 0; part < kJoint; ++part) {
      I(&rows)[4][V::kLanes] = lanes[part];
      I a0 = V::unpacklo32(rows[0][c], rows[1][c]), a1 = V::unpackhi32(rows[0][c], rows[1][c]);
      I b0 = V::unpacklo32(rows[2][c], rows[3][c]), b1 = V::unpackhi32(rows[2][c], rows[3][c]);
      I pairs[4] = {V::unpacklo64(a0, b0), V::unpackhi64(a0, b0), V::unpacklo64(a1, b1), V::unpackhi64(a1, b1)};
      UNROLL for (int i = 0; i < 4; ++i) {
        int k = 8 * c + 2 * i;
        if (kValues == Values::kBfloat16)
          sink.pair(part, k, pairs[i]);
        else
          sink.floats(part, k, V::from_half(pairs[i]), V::from_half(V::shift_right_16(pairs[i])));
      }
    }
}

// The same for float32, 4 * kLanes columns of one part.
template <class Sink>
INLINE void visit_floats(const uint8_t* data, ptrdiff_t stride, Sink sink) {
  I lanes[4][V::kLanes];
  V::gather_lanes(data, stride, lanes);
  UNROLL for (int c = 0; c < V::kLanes; ++c) {
    I a0 = V::unpacklo32(lanes[0][c], lanes[1][c]), a1 = V::unpackhi32(lanes[0][c], lanes[1][c]);
    I b0 = V::unpacklo32(lanes[2][c], lanes[3][c]), b1 = V::unpackhi32(lanes[2][c], lanes[3][c]);
    sink.floats(0, 4 * c, V::as_float(V::unpacklo64(a0, b0)), V::as_float(V::unpackhi64(a0, b0)));
    sink.floats(0, 4 * c + 2, V::as_float(V::unpacklo64(a1, b1)), V::as_float(V::unpackhi64(a1, b1)));
  }
}

// A sink at parts and columns further on.
template <class Sink>
struct Shifted {
  Sink sink;
  int parts, columns;
  INLINE void pair(int part, int k, I pair) { sink.pair(part + parts, k + columns, pair); }
  INLINE void floats(int part, int k, F even, F odd) { sink.floats(part + parts, k + columns, even, odd); }
};

// Asks for the same piece of the next panel, to the second cache: rows that are a power of two apart share a set of the
// first. Inline, since GCC removes calls of a function that does nothing else.
INLINE void prefetch(const uint8_t* data, ptrdiff_t stride, int rows) {
  for (int i = 0; i < rows; ++i) __builtin_prefetch(data + (kWidth + i) * stride, 0, 2);
}

// Calls the sink with the columns of a panel's rows, those of a part in order; kJoint parts side by side.
template <Values kValues, int kJoint, class Sink>
INLINE void visit(const Source& source, Sink sink) {
  constexpr int kBytes = 16 * V::kLanes;  // of a row that are read at once
  for (int part = 0; part < V::kParts; part += kJoint) {
    const uint8_t* data = source.data + part * kPart * source.stride;
    if constexpr (kValues == Values::kBfloat16 || kValues == Values::kFloat16) {
      for (int k = 0; k < source.columns; k += kBytes / 2) {
        prefetch(data + 2 * k, source.stride, kJoint * kPart);
        visit_halves<kValues, kJoint>(data + 2 * k, source.stride, Shifted<Sink>{sink, part, k});
      }
    } else if constexpr (kValues == Values::kFloat32) {
      for (int joined = 0; joined < kJoint; ++joined, data += kPart * source.stride)
        for (int k = 0; k < source.columns; k += kBytes / 4) {
          prefetch(data + 4 * k, source.stride, kPart);
          visit_floats(data + 4 * k, source.stride, Shifted<Sink>{sink, part + joined, k});
        }
    } else {
      V::Decoder<kValues> decoder(*source.table);
      for (int k = 0; k < source.columns; k += kBytes) {
        prefetch(data + k, source.stride, kJoint * kPart);
        visit_bytes<kValues, kJoint>(decoder, data + k, source.stride, Shifted<Sink>{sink, part, k});
      }
    }
  }
}

// The float32 numbers of a vector of pairs of bfloat16: the first of each pair, and the second.
INLINE F first_of(I pair) { return V::as_float(V::shift_left_16(pair)); }
INLINE F second_of(I pair) { return V::as_float(V::upper_halves(pair)); }

INLINE I pair_of(F even, F odd) { return V::join(V::shift_right_16(V::as_int(even)), V::upper_halves(V::as_int(odd))); }

// Scaled and rounded weights, for a sink.
template <class Sink>
struct Rounded {
  Sink sink;
  Rounding rounding;
  const float* scales;
  INLINE F round(int part, F value) {
    value = V::mul(value, V::load(scales + part * kPart));
    if (rounding == Rounding::kBfloat16) return V::as_float(V::round_to_bfloat16(V::as_int(V::clip(value, 0x1.fep127f))));
    if (rounding == Rounding::kFloat16) return V::round_to_half(V::clip(value, 65504.0f));
    return value;
  }
  INLINE void floats(int part, int k, F even, F odd) { sink.floats(part, k, round(part, even), round(part, odd)); }
  INLINE void pair(int part, int k, I pair) { floats(part, k, first_of(pair), second_of(pair)); }
};

// Writes a panel.
template <bool kPairs>
struct Store {
  char* panel;
  INLINE void pair(int part, int k, I pair) {
    if (kPairs)
      V::store(panel + (k / 2 * V::kParts + part) * sizeof(I), pair);
    else
      floats(part, k, first_of(pair), second_of(pair));
  }
  INLINE void floats(int part, int k, F even, F odd) {
    if (kPairs) return pair(part, k, pair_of(even, odd));
    V::store(panel + (k * V::kParts + part) * sizeof(F), V::as_int(even));
    V::store(panel + ((k + 1) * V::kParts + part) * sizeof(F), V::as_int(odd));
  }
};

INLINE F broadcast_pair(const Rows& rows, int row, int k) {
  return V::broadcast_bits(static_cast<const uint16_t*>(rows.x) + row * rows.x_stride + k);
}

INLINE F broadcast_float(const Rows& rows, int row, int k) {
  return V::broadcast_bits(static_cast<const float*>(rows.x) + row * rows.x_stride + k);
}

// Adds the products with a few rows.
template <bool kPairs, int kCount>
struct Multiply {
  const Rows& rows;
  F (*sums)[kCount];
  INLINE void pair(int part, int k, I pair) {
    if constexpr (kPairs) {
      UNROLL for (int r = 0; r < kCount; ++r) sums[part][r] = V::dot(sums[part][r], broadcast_pair(rows, r, k), pair);
    } else {
      floats(part, k, first_of(pair), second_of(pair));
    }
  }
  INLINE void floats(int part, int k, F even, F odd) {
    if (kPairs) return pair(part, k, pair_of(even, odd));
    UNROLL for (int r = 0; r < kCount; ++r) {
      sums[part][r] = V::fma(broadcast_float(rows, r, k), even, sums[part][r]);
      sums[part][r] = V::fma(broadcast_float(rows, r, k + 1), odd, sums[part][r]);
    }
  }
};

// Multiplies the sums of a run with their scales, and adds them to the totals.
INLINE void add_to_totals(const Rows& rows, int row, int part, F sum) {
  F scale = V::load(rows.scales + part * kPart);
  if (rows.x_scales) scale = V::mul(scale, V::broadcast_bits(rows.x_scales + row * rows.x_scales_stride));
  float* total = rows.totals + row * kWidth + part * kPart;
  V::store(total, V::as_int(V::fma(sum, scale, V::load(total))));
}

template <Values kValues, int kJoint, class Sink>
INLINE void visit_rounded(const Source& source, Sink sink) {
  if (source.rounding == Rounding::kNone) return visit<kValues, kJoint>(source, sink);
  visit<kValues, kJoint>(source, Rounded<Sink>{sink, source.rounding, source.scales});
}

template <bool kPairs, Values kValues>
void pack_as(const Source& source, void* panel) {
  visit_rounded<kValues, 1>(source, Store<kPairs>{static_cast<char*>(panel)});
}

template <bool kPairs, Values kValues, int kCount>
INLINE void multiply_few_as(const Rows& rows, const Source& source) {
  F sums[V::kParts][kCount];
  UNROLL for (int part = 0; part < V::kParts; ++part)
    UNROLL for (int r = 0; r < kCount; ++r) sums[part][r] = V::zero();
  visit_rounded<kValues, kCount == 1 ? V::kParts : 1>(source, Multiply<kPairs, kCount>{rows, sums});
  UNROLL for (int part = 0; part < V::kParts; ++part)
    UNROLL for (int r = 0; r < kCount; ++r) add_to_totals(rows, r, part, sums[part][r]);
}

template <bool kPairs, Values kValues>
void multiply_few_as(const Rows& rows, const Source& source) {
  switch (rows.count) {
    case 1: return multiply_few_as<kPairs, kValues, 1>(rows, source);
    case 2: return multiply_few_as<kPairs, kValues, 2>(rows, source);
    case 3: return multiply_few_as<kPairs, kValues, 3>(rows, source);
    case 4: return multiply_few_as<kPairs, kValues, 4>(rows, source);
  }
  static_assert(kFewRows == 4, "a case for each number of rows");
}

template <bool kPairs, int kCount>
void multiply_panel(const Rows& rows, const char* panel, int columns) {
  F sums[kCount][V::kParts];
  UNROLL for (int r = 0; r < kCount; ++r)
    UNROLL for (int part = 0; part < V::kParts; ++part) sums[r][part] = V::zero();
  for (int k = 0; k < columns; k += kPairs ? 2 : 1) {
    F weights[V::kParts];
    UNROLL for (int part = 0; part < V::kParts; ++part, panel += sizeof(F)) weights[part] = V::load(panel);
    UNROLL for (int r = 0; r < kCount; ++r) {
      F x = kPairs ? broadcast_pair(rows, r, k) : broadcast_float(rows, r, k);
      UNROLL for (int part = 0; part < V::kParts; ++part) {
        if constexpr (kPairs)
          sums[r][part] = V::dot(sums[r][part], x, V::as_int(weights[part]));
        else
          sums[r][part] = V::fma(x, weights[part], sums[r][part]);
      }
    }
  }
  UNROLL for (int r = 0; r < kCount; ++r)
    for (int part = 0; part < V::kParts; ++part) add_to_totals(rows, r, part, sums[r][part]);
}

template <bool kPairs, int kCount>
void multiply_as(const Rows& rows, const void* panel, int columns) {
  if (rows.count == kCount) return multiply_panel<kPairs, kCount>(rows, static_cast<const char*>(panel), columns);
  if constexpr (kCount > 1) multiply_as<kPairs, kCount - 1>(rows, panel, columns);
}

// Calls function<kPairs, values> of the source's values.
#define PERPARAM_BY_VALUES(function, kPairs, ...)                                      \
  switch (source.values) {                                                             \
    case Values::kTable: return function<kPairs, Values::kTable>(__VA_ARGS__);         \
    case Values::kE4M3: return function<kPairs, Values::kE4M3>(__VA_ARGS__);           \
    case Values::kE5M2: return function<kPairs, Values::kE5M2>(__VA_ARGS__);           \
    case Values::kBfloat16: return function<kPairs, Values::kBfloat16>(__VA_ARGS__);   \
    case Values::kFloat16: return function<kPairs, Values::kFloat16>(__VA_ARGS__);     \
    case Values::kFloat32: return function<kPairs, Values::kFloat32>(__VA_ARGS__);     \
  }

void pack(const Source& source, bool pairs, void* panel) {
  if constexpr (V::kPairs) {
    if (pairs) PERPARAM_BY_VALUES(pack_as, true, source, panel)
  }
  PERPARAM_BY_VALUES(pack_as, false, source, panel)
}

void multiply_few(const Rows& rows, bool pairs, const Source& source) {
  if constexpr (V::kPairs) {
    if (pairs) PERPARAM_BY_VALUES(multiply_few_as, true, rows, source)
  }
  PERPARAM_BY_VALUES(multiply_few_as, false, rows, source)
}

void multiply(const Rows& rows, bool pairs, const void* panel, int columns) {
  if constexpr (V::kPairs) {
    if (pairs) return multiply_as<true, V::kRows>(rows, panel, columns);
  }
  multiply_as<false, V::kRows>(rows, panel, columns);
}

void round(const float* totals, uint16_t* result) {
  for (int i = 0; i < kWidth; i += kPart) V::store_upper(result + i, V::round_to_bfloat16(V::as_int(V::load(totals + i))));
}
