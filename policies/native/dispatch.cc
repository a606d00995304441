// Chooses the instruction set: the best that the processor has, or the one that PERPARAM_CPU names.

#include <cstdlib>
#include <cstring>

#include "export.h"
#include "isa.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace perparam {
namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
}
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512bf16() { return false; }
#endif

#if defined(__aarch64__)
bool has_neon() { return true; }
#else
bool has_neon() { return false; }
#endif

#if defined(__aarch64__) && defined(__linux__)
bool has_neonbf16() { return getauxval(AT_HWCAP2) & (1ul << 14); }  // HWCAP2_BF16
#else
bool has_neonbf16() { return false; }
#endif

bool has_any() { return true; }

const Isa* choose() {
  struct Candidate {
    const Isa* (*isa)();
    bool (*present)();
  };
  const Candidate candidates[] = {{isa_avx512bf16, has_avx512bf16}, {isa_avx512, has_avx512},     {isa_avx2, has_avx2},
                                  {isa_neonbf16, has_neonbf16},     {isa_neon, has_neon},         {isa_scalar, has_any}};
  const char* forced = std::getenv("PERPARAM_CPU");
  for (const Candidate& candidate : candidates) {
    if (!candidate.present() || candidate.isa() == nullptr) continue;
    if (forced == nullptr || *forced == 0 || std::strcmp(forced, candidate.isa()->name) == 0) return candidate.isa();
  }
  return nullptr;
}

}  // namespace

const Isa* isa() {
  static const Isa* chosen = choose();
  return chosen;
}

}  // namespace perparam

PERPARAM_EXPORT const char* perparam_instructions() {
  const perparam::Isa* isa = perparam::isa();
  return isa == nullptr ? nullptr : isa->name;
}
