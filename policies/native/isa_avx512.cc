// AVX-512 without instructions for bfloat16: Intel since Skylake-SP.

#include "isa.h"

#if defined(__AVX512BW__) && defined(__AVX512DQ__)
#include <immintrin.h>

#include "attention_kernels.h"

namespace perparam {
namespace {

#include "vector_avx512.h"

struct V : Vector512 {
  static constexpr bool kPairs = false;
  static F dot(F sum, F, I) { return sum; }  // not used

  template <Values kValues>
  struct Decoder {
    const uint16_t* table;
    explicit Decoder(const Table& table) : table(table.whole) {}

    // The numbers of 16 codes, one in each 32 bits.
    F number(I codes) const {
      if constexpr (kValues == Values::kE5M2) {  // the upper half of a float16
        return from_half(_mm512_slli_epi32(codes, 8));
      } else if constexpr (kValues == Values::kE4M3) {
        // Its bits, shifted, are a float16 of 2**-8 times the value; conversions from float16 are exact, subnormal or not.
        I magnitude = _mm512_and_si512(codes, _mm512_set1_epi32(0x7f));
        I half = _mm512_ternarylogic_epi32(_mm512_slli_epi32(magnitude, 7), _mm512_slli_epi32(codes, 8),
                                           _mm512_set1_epi32(0x8000), 0xf8);
        half = _mm512_mask_or_epi32(half, _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7f)), half,
                                    _mm512_set1_epi32(0x7e00));
        return _mm512_mul_ps(from_half(half), _mm512_set1_ps(256));
      } else {  // the table ends where a read of four bytes may
        I entries = _mm512_i32gather_epi32(codes, reinterpret_cast<const uint8_t*>(table), 2);
        return as_float(shift_left_16(entries));
      }
    }

    template <class Sink>
    void decode(I codes, int part, int k, Sink& sink) const {
      I low = _mm512_unpacklo_epi8(codes, _mm512_setzero_si512()), high = _mm512_unpackhi_epi8(codes, _mm512_setzero_si512());
      I lower = _mm512_set1_epi32(0xffff);
      sink.floats(part, k, number(_mm512_and_si512(low, lower)), number(shift_right_16(low)));
      sink.floats(part, k + 2, number(_mm512_and_si512(high, lower)), number(shift_right_16(high)));
    }
  };
};

#include "kernel.h"

}  // namespace

const Isa* isa_avx512() {
  static const Isa isa = {"avx512", kWidth, V::kRows, false, pack, multiply, multiply_few, round, &attention::kAttention};
  return &isa;
}

}  // namespace perparam

#else

const perparam::Isa* perparam::isa_avx512() { return nullptr; }

#endif
