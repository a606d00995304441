// AVX-512 with VBMI and BF16 (Zen 4 and later, Sapphire Rapids and later, Cooper Lake without VBMI not).
#include "attention_kernels.h"

namespace perparam {

const AttentionIsa* attention_avx512bf16();
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
const AttentionIsa* attention_avx512bf16() { return &attention::kAttention; }
#else
const AttentionIsa* attention_avx512bf16() { return nullptr; }
#endif

}  // namespace perparam

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#include <immintrin.h>

#include "isa.h"

namespace perparam {
namespace {

constexpr int kWidth = 32;
constexpr int kRows = 12;

struct Tables {
  __m512i low[4], high[4];  // low and high bytes of the 256 entries
  explicit Tables(const uint16_t* table) {
    for (int i = 0; i < 4; ++i) {
      __m256i a = _mm512_cvtepi16_epi8(_mm512_loadu_si512(table + 64 * i));
      __m256i b = _mm512_cvtepi16_epi8(_mm512_loadu_si512(table + 64 * i + 32));
      low[i] = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
      a = _mm512_cvtepi16_epi8(_mm512_srli_epi16(_mm512_loadu_si512(table + 64 * i), 8));
      b = _mm512_cvtepi16_epi8(_mm512_srli_epi16(_mm512_loadu_si512(table + 64 * i + 32), 8));
      high[i] = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
    }
  }
};

template <bool kSigned>
inline void decode(const Tables& t, __m512i bytes, __m512i& first, __m512i& second) {
  __m512i low = _mm512_permutex2var_epi8(t.low[0], bytes, t.low[1]);
  __m512i high = _mm512_permutex2var_epi8(t.high[0], bytes, t.high[1]);
  if (kSigned) {
    high = _mm512_ternarylogic_epi32(high, bytes, _mm512_set1_epi8(int8_t(0x80)), 0xf8);  // high | (bytes & 0x80)
  } else {
    __mmask64 upper = _mm512_movepi8_mask(bytes);
    low = _mm512_mask_blend_epi8(upper, low, _mm512_permutex2var_epi8(t.low[2], bytes, t.low[3]));
    high = _mm512_mask_blend_epi8(upper, high, _mm512_permutex2var_epi8(t.high[2], bytes, t.high[3]));
  }
  first = _mm512_unpacklo_epi8(low, high);
  second = _mm512_unpackhi_epi8(low, high);
}

// Calls sink(p, v) with the register of each pair of columns p of 16 rows: v has (row, column of the pair) bfloat16.
template <bool kSigned, class Sink>
inline void transpose_table(const Tables& tables, const uint8_t* data, ptrdiff_t stride, Sink sink) {
  __m512i lanes[4][4];  // [j][c]: lane L has 16 columns, beginning at 16 c, of row 4 L + j
  for (int j = 0; j < 4; ++j) {
    __m512i a0 = _mm512_loadu_si512(data + j * stride), a1 = _mm512_loadu_si512(data + (j + 4) * stride);
    __m512i a2 = _mm512_loadu_si512(data + (j + 8) * stride), a3 = _mm512_loadu_si512(data + (j + 12) * stride);
    __m512i t0 = _mm512_shuffle_i32x4(a0, a1, 0x88), t1 = _mm512_shuffle_i32x4(a0, a1, 0xdd);
    __m512i t2 = _mm512_shuffle_i32x4(a2, a3, 0x88), t3 = _mm512_shuffle_i32x4(a2, a3, 0xdd);
    lanes[j][0] = _mm512_shuffle_i32x4(t0, t2, 0x88);
    lanes[j][1] = _mm512_shuffle_i32x4(t1, t3, 0x88);
    lanes[j][2] = _mm512_shuffle_i32x4(t0, t2, 0xdd);
    lanes[j][3] = _mm512_shuffle_i32x4(t1, t3, 0xdd);
  }
  for (int c = 0; c < 4; ++c) {
    __m512i a0 = _mm512_unpacklo_epi16(lanes[0][c], lanes[1][c]), a1 = _mm512_unpackhi_epi16(lanes[0][c], lanes[1][c]);
    __m512i b0 = _mm512_unpacklo_epi16(lanes[2][c], lanes[3][c]), b1 = _mm512_unpackhi_epi16(lanes[2][c], lanes[3][c]);
    __m512i pairs[4] = {_mm512_unpacklo_epi32(a0, b0), _mm512_unpackhi_epi32(a0, b0), _mm512_unpacklo_epi32(a1, b1),
                        _mm512_unpackhi_epi32(a1, b1)};
    for (int i = 0; i < 4; ++i) {
      __m512i first, second;
      decode<kSigned>(tables, pairs[i], first, second);
      sink(8 * c + 2 * i, first);
      sink(8 * c + 2 * i + 1, second);
    }
  }
}

template <int R>
inline void multiply_pairs(const Tile& t) {
  __m512 sums[R][2];
  for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  const uint16_t* x = static_cast<const uint16_t*>(t.x);
  const char* panel = static_cast<const char*>(t.panel);
  for (int p = 0; p < t.columns / 2; ++p) {
    __m512bh w0 = (__m512bh)_mm512_load_si512(panel + 128 * p), w1 = (__m512bh)_mm512_load_si512(panel + 128 * p + 64);
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, x + r * t.x_stride + 2 * p, 4);
      __m512bh b = (__m512bh)_mm512_set1_epi32(pair);
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], b, w0);
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], b, w1);
    }
  }
  __m512 s0 = _mm512_loadu_ps(t.scales), s1 = _mm512_loadu_ps(t.scales + 16);
  for (int r = 0; r < R; ++r) {
    float* total = t.totals + r * kWidth;
    __m512 a0 = s0, a1 = s1;
    if (t.x_scales) {
      __m512 xs = _mm512_set1_ps(t.x_scales[r * t.x_scales_stride]);
      a0 = _mm512_mul_ps(a0, xs), a1 = _mm512_mul_ps(a1, xs);
    }
    _mm512_storeu_ps(total, _mm512_fmadd_ps(sums[r][0], a0, _mm512_loadu_ps(total)));
    _mm512_storeu_ps(total + 16, _mm512_fmadd_ps(sums[r][1], a1, _mm512_loadu_ps(total + 16)));
  }
}

void pack(const Source& s, bool pairs, void* panel, const uint8_t* next) {
  Tables tables(s.table);
  char* out = static_cast<char*>(panel);
  for (int half = 0; half < 2; ++half) {
    if (next)
      for (int r = 0; r < 16; ++r) _mm_prefetch(next + (16 * half + r) * s.stride, _MM_HINT_T0);
    transpose_table<true>(tables, s.data + 16 * half * s.stride, s.stride,
                          [&](int p, __m512i v) { _mm512_store_si512(out + 128 * p + 64 * half, v); });
  }
}

void multiply(const Tile& t, bool pairs) {
  switch (t.rows) {
#define CASE(R) case R: return multiply_pairs<R>(t);
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
  }
}

}  // namespace

extern const Isa kAvx512Bf16;
const Isa kAvx512Bf16 = {"avx512bf16", kWidth, kRows, true, pack, multiply};

}  // namespace perparam
#endif
