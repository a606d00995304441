// Vectors of float32 of the instruction set that a translation unit is compiled for, and what is made of them.
//
// Written with the vector extensions of GCC and Clang, which have + - * and comparisons; intrinsics are for what they
// lack.  All is in an anonymous namespace, since each translation unit has its own.
#ifndef PERPARAM_ATTENTION_VECTORS_H_
#define PERPARAM_ATTENTION_VECTORS_H_

#include <cstddef>
#include <cstdint>

#if defined(__AVX512BW__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace perparam {
namespace vectors {
namespace {

#if defined(__AVX512BW__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__ARM_NEON)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
constexpr bool kHasPairs = true;  // instructions that multiply pairs of bfloat16 and add in float32
#else
constexpr bool kHasPairs = false;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));

template <class T>
inline T load(const void* from) {
  T result;
  __builtin_memcpy(&result, from, sizeof(T));
  return result;
}

template <class T>
inline void store(void* to, T value) {
  __builtin_memcpy(to, &value, sizeof(T));
}

inline Ints all(int32_t x) { return Ints{} + x; }
inline Floats all(float x) {  // by its bits: a sum with 0 would change some
  int32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return (Floats)all(bits);
}

// a * b + c, rounded once where there is an instruction for it.
inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512BW__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

inline Floats select(Ints mask, Floats a, Floats b) { return mask ? a : b; }

// The larger one; b if either is NaN.
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// The lanes combined in halves: 16 to 8, to 4, to 2, to 1.
template <class Combine>
inline float across(Floats x, Combine combine) {
#if defined(__AVX512BW__) || defined(__AVX2__)
#if defined(__AVX512BW__)
  __m256 half = combine(_mm512_castps512_ps256((__m512)x), (__m256)_mm512_extractf64x4_pd((__m512d)x, 1));
#else
  __m256 half = (__m256)x;
#endif
  __m128 four = combine(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  __m128 two = combine(four, _mm_movehl_ps(four, four));
  return combine(two[0], two[1]);
#else
  return combine(combine(x[0], x[2]), combine(x[1], x[3]));
#endif
}

inline float sum(Floats x) {
  return across(x, [](auto a, auto b) { return a + b; });
}

inline float largest(Floats x) {
  return across(x, [](auto a, auto b) { return a > b ? a : b; });
}

// exp(x) for x <= 0, and 0 below -87, where it is less than 2**-125; NaN for NaN.
//
// x is n * ln 2 + r, the polynomial is of degree 6 in r, |r| <= ln 2 / 2, and n is added to the exponent.  Of 11.6 million
// x, the largest error was 0.88 ulp, and 1.09 without FMA; tests compare one in 997.
inline Floats exponential(Floats x) {
  const Floats bound = all(-87.0f), magic = all(0x1.8p23f);
  Floats clamped = larger(bound, x);
  Floats shifted = fma(clamped, all(0x1.715476p+0f), magic);  // the low bits are n
  Floats n = shifted - magic;
  Floats r = fma(n, all(-0x1.62e4p-1f), clamped);  // exact: the constant has 15 bits, n at most 7
  r = fma(n, all(-0x1.7f7d1cp-20f), r);
  Floats y = all(0x1.6a2352p-10f);
  y = fma(y, r, all(0x1.123a6cp-7f));
  y = fma(y, r, all(0x1.5558f4p-5f));
  y = fma(y, r, all(0x1.55549p-3f));
  y = fma(y, r, all(0x1.fffffcp-2f));
  y = fma(y, r, all(1.0f));
  y = fma(y, r, all(1.0f));
  Ints bits = (Ints)y + ((Ints)shifted << 23);
  return select(x < bound, Floats{}, (Floats)bits);
}

inline Floats from_bfloat16(Halves x) { return (Floats)(__builtin_convertvector(x, Words) << 16); }

// Rounded to the nearest, ties to even; NaN stays NaN.
inline Halves to_bfloat16(Floats x) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)x);  // subnormal numbers become 0
#else
  Words bits = (Words)x;
  Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  Words quiet = (bits >> 16) | 0x40;
  return __builtin_convertvector((Words)((x == x) ? rounded : quiet), Halves);
#endif
}

inline Floats from_float16(Halves x) {
#if defined(__AVX512BW__)
  return (Floats)_mm512_cvtph_ps((__m256i)x);
#elif defined(__AVX2__)
  return (Floats)_mm256_cvtph_ps((__m128i)x);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return (Floats)vcvt_f32_f16((float16x4_t)x);
#else
  Words wide = __builtin_convertvector(x, Words), magnitude = wide & 0x7fff;
  // Subnormal numbers as 2**-24 times an integer; others get the exponent of float32; infinity and NaN the largest.
  Floats subnormal = __builtin_convertvector((Ints)magnitude, Floats) * 0x1p-24f;
  Words normal = (magnitude << 13) + ((magnitude >= 0x7c00) ? Words{} + (224u << 23) : Words{} + (112u << 23));
  Words bits = (magnitude < 0x400) ? (Words)subnormal : normal;
  return (Floats)(bits | (wide & 0x8000) << 16);
#endif
}

inline Halves to_float16(Floats x) {
#if defined(__AVX512BW__)
  return (Halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return (Halves)vcvt_f16_f32((float32x4_t)x);
#else
  Words bits = (Words)x, magnitude = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
  Words normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 rounds to a multiple of 2**-24, half an ulp of which is that of subnormal float16.
  Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000;
  Words result = (magnitude < (113u << 23)) ? subnormal : normal;
  result = (magnitude >= 0x477ff000) ? Words{} + 0x7c00 : result;  // at least 65520
  result = (magnitude > 0x7f800000) ? Words{} + 0x7e00 : result;
  return __builtin_convertvector((Words)(result | sign), Halves);
#endif
}

}  // namespace
}  // namespace vectors
}  // namespace perparam

#endif
