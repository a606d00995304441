// Arm with instructions for pairs of bfloat16: Armv8.6, such as Graviton 3, Grace and Apple's M2.

#include "isa.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>

#include "attention_kernels.h"

namespace perparam {
namespace {

#include "vector_neon.h"

struct V : VectorNeon {
  static constexpr bool kPairs = true;

  // sum + (x[0] * w[0] + x[1] * w[1]); the processor's mode decides whether the products are rounded before their sum.
  static F dot(F sum, F x, I w) {
    return vbfdotq_f32(sum, vreinterpretq_bf16_f32(x), vreinterpretq_bf16_u32(w));
  }
};

#include "kernel.h"

}  // namespace

const Isa* isa_neonbf16() {
  static const Isa isa = {"neonbf16", kWidth, V::kRows, true, pack, multiply, multiply_few, round, &attention::kAttention};
  return &isa;
}

}  // namespace perparam

#else

const perparam::Isa* perparam::isa_neonbf16() { return nullptr; }

#endif
