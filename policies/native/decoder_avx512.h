// Looks up the bfloat16 of bytes, for sources that are compiled with VBMI.
#ifndef PERPARAM_DECODER_AVX512_H_
#define PERPARAM_DECODER_AVX512_H_

#include <immintrin.h>

#include "table.h"

namespace perparam {
namespace {

template <bool kHasSign>
struct TableDecoder {
  static constexpr int kParts = kHasSign ? 2 : 4;  // of 64 entries
  __m512i low[kParts], high[kParts];

  explicit TableDecoder(const Table& table) {
    for (int i = 0; i < kParts; ++i) {
      low[i] = _mm512_load_si512(table.low + 64 * i);
      high[i] = _mm512_load_si512(table.high + 64 * i);
    }
  }

  // The bfloat16 of the lower 8 bytes of each 16 bytes, and of the upper 8.
  void decode(__m512i codes, __m512i& first, __m512i& second) const {
    __m512i lower = _mm512_permutex2var_epi8(low[0], codes, low[1]);
    __m512i upper = _mm512_permutex2var_epi8(high[0], codes, high[1]);
    if constexpr (kHasSign) {
      upper = _mm512_ternarylogic_epi32(upper, codes, _mm512_set1_epi8(int8_t(0x80)), 0xf8);  // upper | (codes & 0x80)
    } else {
      __mmask64 others = _mm512_movepi8_mask(codes);
      lower = _mm512_mask_mov_epi8(lower, others, _mm512_permutex2var_epi8(low[2], codes, low[3]));
      upper = _mm512_mask_mov_epi8(upper, others, _mm512_permutex2var_epi8(high[2], codes, high[3]));
    }
    first = _mm512_unpacklo_epi8(lower, upper);
    second = _mm512_unpackhi_epi8(lower, upper);
  }
};

}  // namespace
}  // namespace perparam

#endif
