// AVX-512 with VBMI, for tables of 128 bytes, and BF16, for products of pairs: AMD since Zen 4, Intel since Sapphire Rapids.

#include "isa.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#include <immintrin.h>

#include "attention_kernels.h"
#include "decoder_avx512.h"

namespace perparam {
namespace {

#include "vector_avx512.h"

struct V : Vector512 {
  static constexpr bool kPairs = true;

  // sum + x[0] * w[0] + x[1] * w[1], with subnormal numbers taken and returned as zero.
  static F dot(F sum, F x, I w) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w); }

  // Bit 7 of E4M3 and E5M2 is the sign.
  template <Values kValues>
  struct Decoder : TableDecoder<kValues != Values::kTable> {
    using TableDecoder<kValues != Values::kTable>::TableDecoder;

    template <class Sink>
    void decode(I codes, int part, int k, Sink& sink) const {
      I first, second;
      TableDecoder<kValues != Values::kTable>::decode(codes, first, second);
      sink.pair(part, k, first);
      sink.pair(part, k + 2, second);
    }
  };
};

#include "kernel.h"

}  // namespace

const Isa* isa_avx512bf16() {
  static const Isa isa = {"avx512bf16", kWidth, V::kRows, true, pack, multiply, multiply_few, round, &attention::kAttention};
  return &isa;
}

}  // namespace perparam

#else

const perparam::Isa* perparam::isa_avx512bf16() { return nullptr; }

#endif
