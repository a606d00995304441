// Vectors of 128 bits of Arm, for the sources of NEON; included in their anonymous namespaces.

struct VectorNeon {
  using I = uint32x4_t;
  using F = float32x4_t;
  static constexpr int kLanes = 1;
  static constexpr int kParts = 4;
  static constexpr int kRows = 6;  // 24 sums, 4 vectors of weights and one of x in 32 registers

  static F zero() { return vdupq_n_f32(0); }
  static F load(const void* from) { return vld1q_f32(static_cast<const float*>(from)); }
  static void store(void* to, I value) { vst1q_u32(static_cast<uint32_t*>(to), value); }
  static F broadcast_bits(const void* from) {
    uint32_t bits;
    __builtin_memcpy(&bits, from, 4);
    return vreinterpretq_f32_u32(vdupq_n_u32(bits));
  }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F as_float(I a) { return vreinterpretq_f32_u32(a); }
  static I as_int(F a) { return vreinterpretq_u32_f32(a); }
  static uint16x8_t halves(I a) { return vreinterpretq_u16_u32(a); }
  static uint8x16_t bytes(I a) { return vreinterpretq_u8_u32(a); }
  static I unpacklo16(I a, I b) { return vreinterpretq_u32_u16(vzip1q_u16(halves(a), halves(b))); }
  static I unpackhi16(I a, I b) { return vreinterpretq_u32_u16(vzip2q_u16(halves(a), halves(b))); }
  static I unpacklo32(I a, I b) { return vzip1q_u32(a, b); }
  static I unpackhi32(I a, I b) { return vzip2q_u32(a, b); }
  static I unpacklo64(I a, I b) {
    return vreinterpretq_u32_u64(vzip1q_u64(vreinterpretq_u64_u32(a), vreinterpretq_u64_u32(b)));
  }
  static I unpackhi64(I a, I b) {
    return vreinterpretq_u32_u64(vzip2q_u64(vreinterpretq_u64_u32(a), vreinterpretq_u64_u32(b)));
  }
  static I shift_left_16(I a) { return vshlq_n_u32(a, 16); }
  static I shift_right_16(I a) { return vshrq_n_u32(a, 16); }
  static I upper_halves(I a) { return vandq_u32(a, vdupq_n_u32(0xffff0000u)); }
  static I join(I a, I b) { return vorrq_u32(a, b); }

  static void store_upper(void* to, I a) { vst1_u16(static_cast<uint16_t*>(to), vshrn_n_u32(a, 16)); }

  // Reads 4 rows of 16 bytes.
  static void gather_lanes(const uint8_t* data, ptrdiff_t stride, I out[4][1]) {
    for (int j = 0; j < 4; ++j) out[j][0] = vreinterpretq_u32_u8(vld1q_u8(data + j * stride));
  }

  // The float16 in the lower half of each 32 bits.
  static F from_half(I a) { return vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(a))); }
  static F round_to_half(F a) { return vcvt_f32_f16(vcvt_f16_f32(a)); }

  // Limits finite numbers to a magnitude; infinities and NaN remain.
  static F clip(F a, float bound) {
    F limited = vminq_f32(vmaxq_f32(a, vdupq_n_f32(-bound)), vdupq_n_f32(bound));
    I finite = vcltq_f32(vabsq_f32(a), as_float(vdupq_n_u32(0x7f800000)));
    return vbslq_f32(finite, limited, a);
  }

  // Rounds to nearest, ties to even; the lower halves of the result are zero.
  static I round_to_bfloat16(I a) {
    I odd = vandq_u32(vshrq_n_u32(a, 16), vdupq_n_u32(1));
    I rounded = vaddq_u32(a, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    I number = vceqq_f32(as_float(a), as_float(a));
    return upper_halves(vbslq_u32(number, rounded, vorrq_u32(a, vdupq_n_u32(0x400000))));
  }

  // Looks up both bytes of the bfloat16 of each byte.
  template <Values kValues>
  struct Decoder {
    uint8x16x4_t low[4], high[4];

    explicit Decoder(const Table& table) {
      for (int i = 0; i < 4; ++i) {
        low[i] = vld1q_u8_x4(table.low + 64 * i);
        high[i] = vld1q_u8_x4(table.high + 64 * i);
      }
    }

    // Codes outside of a table of 64 leave what was found in the others.
    static uint8x16_t look_up(const uint8x16x4_t tables[4], uint8x16_t codes) {
      uint8x16_t found = vqtbl4q_u8(tables[0], codes);
      for (int i = 1; i < 4; ++i) found = vqtbx4q_u8(found, tables[i], vsubq_u8(codes, vdupq_n_u8(64 * i)));
      return found;
    }

    template <class Sink>
    void decode(I codes, int part, int k, Sink& sink) const {
      uint8x16_t lower = look_up(low, bytes(codes)), upper = look_up(high, bytes(codes));
      sink.pair(part, k, vreinterpretq_u32_u8(vzip1q_u8(lower, upper)));
      sink.pair(part, k + 2, vreinterpretq_u32_u8(vzip2q_u8(lower, upper)));
    }
  };
};
