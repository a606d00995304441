// AVX2 with FMA and F16C: Intel since Haswell, AMD since Zen.

#include "isa.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#include "attention_kernels.h"

namespace perparam {
namespace {

struct V {
  using I = __m256i;
  using F = __m256;
  static constexpr int kLanes = 2;
  static constexpr int kParts = 2;
  static constexpr int kRows = 6;  // 12 sums, 2 vectors of weights and one of x in 16 registers
  static constexpr bool kPairs = false;

  static F zero() { return _mm256_setzero_ps(); }
  static F load(const void* from) { return _mm256_loadu_ps(static_cast<const float*>(from)); }
  static void store(void* to, I value) { _mm256_storeu_si256(static_cast<I*>(to), value); }
  static F broadcast_bits(const void* from) { return _mm256_broadcast_ss(static_cast<const float*>(from)); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F dot(F sum, F, I) { return sum; }  // not used
  static F as_float(I a) { return _mm256_castsi256_ps(a); }
  static I as_int(F a) { return _mm256_castps_si256(a); }
  static I unpacklo16(I a, I b) { return _mm256_unpacklo_epi16(a, b); }
  static I unpackhi16(I a, I b) { return _mm256_unpackhi_epi16(a, b); }
  static I unpacklo32(I a, I b) { return _mm256_unpacklo_epi32(a, b); }
  static I unpackhi32(I a, I b) { return _mm256_unpackhi_epi32(a, b); }
  static I unpacklo64(I a, I b) { return _mm256_unpacklo_epi64(a, b); }
  static I unpackhi64(I a, I b) { return _mm256_unpackhi_epi64(a, b); }
  static I shift_left_16(I a) { return _mm256_slli_epi32(a, 16); }
  static I shift_right_16(I a) { return _mm256_srli_epi32(a, 16); }
  static I upper_halves(I a) { return _mm256_and_si256(a, _mm256_set1_epi32(int32_t(0xffff0000))); }
  static I join(I a, I b) { return _mm256_or_si256(a, b); }

  // Reads 8 rows of 32 bytes.
  static void gather_lanes(const uint8_t* data, ptrdiff_t stride, I out[4][2]) {
    for (int j = 0; j < 4; ++j) {
      I a = _mm256_loadu_si256(reinterpret_cast<const I*>(data + j * stride));
      I b = _mm256_loadu_si256(reinterpret_cast<const I*>(data + (j + 4) * stride));
      out[j][0] = _mm256_permute2x128_si256(a, b, 0x20);
      out[j][1] = _mm256_permute2x128_si256(a, b, 0x31);
    }
  }

  // The lower halves of each 32 bits, side by side.
  static __m128i lower_halves(I a) {
    I lower = _mm256_and_si256(a, _mm256_set1_epi32(0xffff));
    return _mm_packus_epi32(_mm256_castsi256_si128(lower), _mm256_extracti128_si256(lower, 1));
  }
  static void store_upper(void* to, I a) { _mm_storeu_si128(static_cast<__m128i*>(to), lower_halves(shift_right_16(a))); }
  static F from_half(I a) { return _mm256_cvtph_ps(lower_halves(a)); }
  static F round_to_half(F a) { return _mm256_cvtph_ps(_mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }

  // Limits finite numbers to a magnitude; infinities and NaN remain.
  static F clip(F a, float bound) {
    F limited = _mm256_min_ps(_mm256_max_ps(a, _mm256_set1_ps(-bound)), _mm256_set1_ps(bound));
    F magnitude = _mm256_and_ps(a, as_float(_mm256_set1_epi32(0x7fffffff)));
    F finite = _mm256_cmp_ps(magnitude, as_float(_mm256_set1_epi32(0x7f800000)), _CMP_LT_OQ);
    return _mm256_blendv_ps(a, limited, finite);
  }

  // Rounds to nearest, ties to even; the lower halves of the result are zero.
  static I round_to_bfloat16(I a) {
    I odd = _mm256_and_si256(_mm256_srli_epi32(a, 16), _mm256_set1_epi32(1));
    I rounded = _mm256_add_epi32(a, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    I nan = as_int(_mm256_cmp_ps(as_float(a), as_float(a), _CMP_UNORD_Q));
    I quiet = _mm256_or_si256(a, _mm256_set1_epi32(0x400000));
    return upper_halves(_mm256_blendv_epi8(rounded, quiet, nan));
  }

  template <Values kValues>
  struct Decoder {
    const uint16_t* table;
    explicit Decoder(const Table& table) : table(table.whole) {}

    // The numbers of 16 codes, one in each 16 bits: lane by lane four of a column, then four of another.
    void numbers(I codes, F& first, F& second) const {
      I halves = codes;
      if constexpr (kValues == Values::kE5M2) {  // the upper half of a float16
        halves = _mm256_slli_epi16(codes, 8);
      } else if constexpr (kValues == Values::kE4M3) {
        // Its bits, shifted, are a float16 of 2**-8 times the value; conversions from float16 are exact, subnormal or not.
        I magnitude = _mm256_and_si256(codes, _mm256_set1_epi16(0x7f));
        I sign = _mm256_and_si256(_mm256_slli_epi16(codes, 8), _mm256_set1_epi16(int16_t(0x8000)));
        I nan = _mm256_and_si256(_mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f)), _mm256_set1_epi16(0x7e00));
        halves = _mm256_or_si256(_mm256_or_si256(_mm256_slli_epi16(magnitude, 7), sign), nan);
      }
      halves = _mm256_permute4x64_epi64(halves, 0xd8);  // the first column, then the other
      __m128i low = _mm256_castsi256_si128(halves), high = _mm256_extracti128_si256(halves, 1);
      if constexpr (kValues == Values::kTable) {  // the table ends where a read of four bytes may
        const int* entries = reinterpret_cast<const int*>(table);
        first = as_float(shift_left_16(_mm256_i32gather_epi32(entries, _mm256_cvtepu16_epi32(low), 2)));
        second = as_float(shift_left_16(_mm256_i32gather_epi32(entries, _mm256_cvtepu16_epi32(high), 2)));
      } else {
        F factor = _mm256_set1_ps(kValues == Values::kE4M3 ? 256 : 1);
        first = _mm256_mul_ps(_mm256_cvtph_ps(low), factor);
        second = _mm256_mul_ps(_mm256_cvtph_ps(high), factor);
      }
    }

    template <class Sink>
    void decode(I codes, int part, int k, Sink& sink) const {
      F even[2], odd[2];
      numbers(_mm256_and_si256(codes, _mm256_set1_epi16(0xff)), even[0], even[1]);
      numbers(_mm256_srli_epi16(codes, 8), odd[0], odd[1]);
      sink.floats(part, k, even[0], odd[0]);
      sink.floats(part, k + 2, even[1], odd[1]);
    }
  };
};

#include "kernel.h"

}  // namespace

const Isa* isa_avx2() {
  static const Isa isa = {"avx2", kWidth, V::kRows, false, pack, multiply, multiply_few, round, &attention::kAttention};
  return &isa;
}

}  // namespace perparam

#else

const perparam::Isa* perparam::isa_avx2() { return nullptr; }

#endif
