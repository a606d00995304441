// The instruction set of this process: the first that it has, or the one that PERPARAM_CPU names.

#include "dispatch.h"

#include <cstdlib>
#include <cstring>

#include "export.h"

namespace perparam {

// Each is nullptr where the build does not have it.
const AttentionIsa* attention_avx512bf16();
const AttentionIsa* attention_avx512();
const AttentionIsa* attention_avx2();
const AttentionIsa* attention_scalar();

namespace {

struct Set {
  const char* name;
  bool has;  // the processor
  const AttentionIsa* attention;
};

const Set* chosen() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
#else
  const bool avx2 = false, avx512 = false, bf16 = false;
#endif
  static const Set sets[] = {{"avx512bf16", bf16, attention_avx512bf16()},
                             {"avx512", avx512, attention_avx512()},
                             {"avx2", avx2, attention_avx2()},
                             {"scalar", true, attention_scalar()}};
  const char* forced = std::getenv("PERPARAM_CPU");
  for (const Set& set : sets)
    if (set.has && set.attention && (!forced || !*forced || std::strcmp(forced, set.name) == 0)) return &set;
  return nullptr;
}

// Read once, when the library is loaded.
const Set* const kChosen = chosen();

}  // namespace

const AttentionIsa* attention_isa() { return kChosen->attention; }

}  // namespace perparam

PERPARAM_EXPORT const char* perparam_instructions() { return perparam::kChosen ? perparam::kChosen->name : nullptr; }
