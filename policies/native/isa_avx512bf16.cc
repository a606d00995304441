// AVX-512 with VBMI, for tables of 128 bytes, and BF16, for products of pairs: AMD since Zen 4, Intel since Sapphire Rapids.

#include "isa.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#include <immintrin.h>

#include "attention_kernels.h"

namespace perparam {
namespace {

#include "vector_avx512.h"

struct V : Vector512 {
  static constexpr bool kPairs = true;

  // sum + x[0] * w[0] + x[1] * w[1], with subnormal numbers taken and returned as zero.
  static F dot(F sum, F x, I w) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w); }

  // Looks up both bytes of the bfloat16 of each byte.
  template <Values kValues>
  struct Decoder {
    // Of E4M3 and E5M2, bit 7 is the sign, and half of the table is enough.
    static constexpr bool kSigned = kValues != Values::kTable;
    I low[kSigned ? 2 : 4], high[kSigned ? 2 : 4];

    explicit Decoder(const Table& table) {
      for (int i = 0; i < (kSigned ? 2 : 4); ++i) {
        low[i] = _mm512_load_si512(table.low + 64 * i);
        high[i] = _mm512_load_si512(table.high + 64 * i);
      }
    }

    template <class Sink>
    void decode(I codes, int k, Sink& sink) const {
      I lower = _mm512_permutex2var_epi8(low[0], codes, low[1]);
      I upper = _mm512_permutex2var_epi8(high[0], codes, high[1]);
      if constexpr (kSigned) {
        upper = _mm512_ternarylogic_epi32(upper, codes, _mm512_set1_epi8(int8_t(0x80)), 0xf8);  // upper | (codes & 0x80)
      } else {
        __mmask64 second = _mm512_movepi8_mask(codes);
        lower = _mm512_mask_mov_epi8(lower, second, _mm512_permutex2var_epi8(low[2], codes, low[3]));
        upper = _mm512_mask_mov_epi8(upper, second, _mm512_permutex2var_epi8(high[2], codes, high[3]));
      }
      sink.pair(k, _mm512_unpacklo_epi8(lower, upper));
      sink.pair(k + 2, _mm512_unpackhi_epi8(lower, upper));
    }
  };
};

#include "kernel.h"

}  // namespace

const Isa* isa_avx512bf16() {
  static const Isa isa = {"avx512bf16", kWidth, V::kRows, true, pack, multiply, multiply_few, &attention::kAttention};
  return &isa;
}

}  // namespace perparam

#else

const perparam::Isa* perparam::isa_avx512bf16() { return nullptr; }

#endif
