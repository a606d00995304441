// C++ without vector instructions of its own, for every processor; compilers use what all processors of a kind have.

#include "attention_kernels.h"
#include "isa.h"

namespace perparam {
namespace {

struct V {
  struct I {
    uint32_t at[4];
  };
  struct F {
    float at[4];
  };
  static constexpr int kLanes = 1;
  static constexpr int kParts = 2;
  static constexpr int kRows = 2;
  static constexpr bool kPairs = false;

  template <class To, class From>
  static To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    __builtin_memcpy(&to, &from, sizeof(To));
    return to;
  }
  template <class Function>
  static auto each(Function function) {
    struct {
      decltype(function(0)) at[4];
    } result;
    for (int i = 0; i < 4; ++i) result.at[i] = function(i);
    return result;
  }
  template <class Function>
  static F floats(Function function) { return bits<F>(each(function)); }
  template <class Function>
  static I ints(Function function) { return bits<I>(each(function)); }

  static F zero() { return F{}; }
  static F load(const void* from) {
    F result;
    __builtin_memcpy(&result, from, sizeof(F));
    return result;
  }
  static void store(void* to, I value) { __builtin_memcpy(to, &value, sizeof(I)); }
  static F broadcast_bits(const void* from) {
    float value;
    __builtin_memcpy(&value, from, 4);
    return floats([&](int) { return value; });
  }
  static F mul(F a, F b) { return floats([&](int i) { return a.at[i] * b.at[i]; }); }
  static F fma(F a, F b, F c) { return floats([&](int i) { return a.at[i] * b.at[i] + c.at[i]; }); }  // rounds twice
  static F dot(F sum, F, I) { return sum; }  // not used
  static F as_float(I a) { return bits<F>(a); }
  static I as_int(F a) { return bits<I>(a); }
  template <class Part, bool kHigh>
  static I unpack(I a, I b) {
    constexpr int kCount = 16 / sizeof(Part);
    Part from[2][kCount], to[kCount];
    __builtin_memcpy(from[0], &a, 16);
    __builtin_memcpy(from[1], &b, 16);
    for (int i = 0; i < kCount; ++i) to[i] = from[i % 2][(kHigh ? kCount / 2 : 0) + i / 2];
    I result;
    __builtin_memcpy(&result, to, 16);
    return result;
  }
  static I unpacklo16(I a, I b) { return unpack<uint16_t, false>(a, b); }
  static I unpackhi16(I a, I b) { return unpack<uint16_t, true>(a, b); }
  static I unpacklo32(I a, I b) { return unpack<uint32_t, false>(a, b); }
  static I unpackhi32(I a, I b) { return unpack<uint32_t, true>(a, b); }
  static I unpacklo64(I a, I b) { return unpack<uint64_t, false>(a, b); }
  static I unpackhi64(I a, I b) { return unpack<uint64_t, true>(a, b); }
  static I shift_left_16(I a) { return ints([&](int i) { return a.at[i] << 16; }); }
  static I shift_right_16(I a) { return ints([&](int i) { return a.at[i] >> 16; }); }
  static I upper_halves(I a) { return ints([&](int i) { return a.at[i] & 0xffff0000u; }); }
  static void store_upper(void* to, I a) {
    for (int i = 0; i < 4; ++i) static_cast<uint16_t*>(to)[i] = a.at[i] >> 16;
  }
  static I join(I a, I b) { return ints([&](int i) { return a.at[i] | b.at[i]; }); }

  // Reads 4 rows of 16 bytes.
  static void gather_lanes(const uint8_t* data, ptrdiff_t stride, I out[4][1]) {
    for (int j = 0; j < 4; ++j) __builtin_memcpy(&out[j][0], data + j * stride, 16);
  }

  static float half_to_float(uint32_t half) {
    uint32_t magnitude = half & 0x7fff, sign = (half & 0x8000) << 16;
    if (magnitude >= 0x7c00) return bits<float>(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
    if (magnitude < 0x400) return bits<float>(sign | bits<uint32_t>(float(magnitude) * 0x1p-24f));
    return bits<float>(sign | ((magnitude << 13) + (112u << 23)));
  }
  static F from_half(I a) { return floats([&](int i) { return half_to_float(a.at[i] & 0xffff); }); }
  static F round_to_half(F a) {
    return floats([&](int i) {
      uint32_t all = bits<uint32_t>(a.at[i]), magnitude = all & 0x7fffffff, sign = all & 0x80000000;
      if (magnitude >= 0x7f800000) return a.at[i];
      // Adding and subtracting a power of two, 2**13 times the last place, rounds to it.
      uint32_t exponent = magnitude >> 23 < 113 ? 113 : magnitude >> 23;
      float large = bits<float>((exponent + 13) << 23);
      volatile float sum = bits<float>(magnitude) + large;
      return bits<float>(bits<uint32_t>(sum - large) | sign);
    });
  }
  // Limits finite numbers to a magnitude; infinities and NaN remain.
  static F clip(F a, float bound) {
    return floats([&](int i) {
      uint32_t magnitude = bits<uint32_t>(a.at[i]) & 0x7fffffff;
      if (magnitude >= 0x7f800000 || bits<float>(magnitude) <= bound) return a.at[i];
      return a.at[i] < 0 ? -bound : bound;
    });
  }
  // Rounds to nearest, ties to even; the lower halves of the result are zero.
  static I round_to_bfloat16(I a) {
    return ints([&](int i) {
      uint32_t x = a.at[i];
      if ((x & 0x7fffffff) > 0x7f800000) return (x | 0x400000u) & 0xffff0000u;
      return (x + 0x7fff + (x >> 16 & 1)) & 0xffff0000u;
    });
  }

  template <Values kValues>
  struct Decoder {
    const uint16_t* table;
    explicit Decoder(const Table& table) : table(table.whole) {}
    template <class Sink>
    void decode(I codes, int part, int k, Sink& sink) const {
      uint8_t bytes[16];
      __builtin_memcpy(bytes, &codes, 16);
      for (int pair = 0; pair < 2; ++pair)
        sink.pair(part, k + 2 * pair, ints([&](int i) {
                    const uint8_t* code = bytes + 8 * pair + 2 * i;
                    return uint32_t(table[code[0]]) | uint32_t(table[code[1]]) << 16;
                  }));
    }
  };
};

#include "kernel.h"

}  // namespace

const Isa* isa_scalar() {
  static const Isa isa = {"scalar", kWidth, V::kRows, false, pack, multiply, multiply_few, round, &attention::kAttention};
  return &isa;
}

}  // namespace perparam
