// The vectors that every 64-bit Arm processor has.

#include "isa.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#include "attention_kernels.h"

namespace perparam {
namespace {

#include "vector_neon.h"

struct V : VectorNeon {
  static constexpr bool kPairs = false;
  static F dot(F sum, F, I) { return sum; }  // not used
};

#include "kernel.h"

}  // namespace

const Isa* isa_neon() {
  static const Isa isa = {"neon", kWidth, V::kRows, false, pack, multiply, multiply_few, round, &attention::kAttention};
  return &isa;
}

}  // namespace perparam

#else

const perparam::Isa* perparam::isa_neon() { return nullptr; }

#endif
