// Vectors of 512 bits, for the sources of AVX-512; included in their anonymous namespaces.

struct Vector512 {
  using I = __m512i;
  using F = __m512;
  static constexpr int kLanes = 4;
  static constexpr int kParts = 2;
  static constexpr int kRows = 12;  // 24 sums, 2 vectors of weights and one of x in 32 registers

  static F zero() { return _mm512_setzero_ps(); }
  static F load(const void* from) { return _mm512_loadu_ps(from); }
  static void store(void* to, I value) { _mm512_storeu_si512(to, value); }
  static F broadcast_bits(const void* from) {
    int32_t bits;
    __builtin_memcpy(&bits, from, 4);
    return _mm512_castsi512_ps(_mm512_set1_epi32(bits));
  }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F as_float(I a) { return _mm512_castsi512_ps(a); }
  static I as_int(F a) { return _mm512_castps_si512(a); }
  static I unpacklo16(I a, I b) { return _mm512_unpacklo_epi16(a, b); }
  static I unpackhi16(I a, I b) { return _mm512_unpackhi_epi16(a, b); }
  static I unpacklo32(I a, I b) { return _mm512_unpacklo_epi32(a, b); }
  static I unpackhi32(I a, I b) { return _mm512_unpackhi_epi32(a, b); }
  static I unpacklo64(I a, I b) { return _mm512_unpacklo_epi64(a, b); }
  static I unpackhi64(I a, I b) { return _mm512_unpackhi_epi64(a, b); }
  static I shift_left_16(I a) { return _mm512_slli_epi32(a, 16); }
  static I shift_right_16(I a) { return _mm512_srli_epi32(a, 16); }
  static I upper_halves(I a) { return _mm512_and_si512(a, _mm512_set1_epi32(int32_t(0xffff0000))); }
  static I join(I a, I b) { return _mm512_or_si512(a, b); }

  static void store_upper(void* to, I a) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtepi32_epi16(shift_right_16(a)));
  }

  // Reads 16 rows of 64 bytes.
  static void gather_lanes(const uint8_t* data, ptrdiff_t stride, I out[4][4]) {
    for (int j = 0; j < 4; ++j) {
      I a0 = _mm512_loadu_si512(data + j * stride), a1 = _mm512_loadu_si512(data + (j + 4) * stride);
      I a2 = _mm512_loadu_si512(data + (j + 8) * stride), a3 = _mm512_loadu_si512(data + (j + 12) * stride);
      I t0 = _mm512_shuffle_i32x4(a0, a1, 0x88), t1 = _mm512_shuffle_i32x4(a0, a1, 0xdd);
      I t2 = _mm512_shuffle_i32x4(a2, a3, 0x88), t3 = _mm512_shuffle_i32x4(a2, a3, 0xdd);
      out[j][0] = _mm512_shuffle_i32x4(t0, t2, 0x88);
      out[j][1] = _mm512_shuffle_i32x4(t1, t3, 0x88);
      out[j][2] = _mm512_shuffle_i32x4(t0, t2, 0xdd);
      out[j][3] = _mm512_shuffle_i32x4(t1, t3, 0xdd);
    }
  }

  // The float16 in the lower half of each 32 bits.
  static F from_half(I a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)); }
  static F round_to_half(F a) { return _mm512_cvtph_ps(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }

  // Limits finite numbers to a magnitude; infinities and NaN remain.
  static F clip(F a, float bound) {
    F limited = _mm512_min_ps(_mm512_max_ps(a, _mm512_set1_ps(-bound)), _mm512_set1_ps(bound));
    return _mm512_mask_mov_ps(limited, _mm512_fpclass_ps_mask(a, 0x99), a);  // NaN and infinities
  }

  // Rounds to nearest, ties to even; the lower halves of the result are zero.
  static I round_to_bfloat16(I a) {
    I odd = _mm512_and_si512(_mm512_srli_epi32(a, 16), _mm512_set1_epi32(1));
    I rounded = _mm512_add_epi32(a, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_fpclass_ps_mask(as_float(a), 0x81);
    return upper_halves(_mm512_mask_or_epi32(rounded, nan, a, _mm512_set1_epi32(0x400000)));
  }
};
