// Chooses the instruction set: the best that the processor has, or the one that PERPARAM_CPU names.

#include <cstdlib>
#include <cstring>

#include "export.h"
#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace perparam {
namespace {

#if defined(__x86_64__)
// What CPUID says, and XGETBV: whether the system saves the registers. __builtin_cpu_supports asks the compiler's own
// library, and that of zig, which compiles the wheels, answers no to everything.
struct Processor {
  unsigned eax1 = 0, ebx1 = 0, ecx1 = 0, edx1 = 0;      // leaf 1
  unsigned eax7 = 0, ebx7 = 0, ecx7 = 0, edx7 = 0;      // leaf 7
  unsigned eax71 = 0, ebx71 = 0, ecx71 = 0, edx71 = 0;  // leaf 7, subleaf 1
  unsigned saved = 0;

  Processor() {
    if (!__get_cpuid(1, &eax1, &ebx1, &ecx1, &edx1) || !(ecx1 >> 27 & 1)) return;  // OSXSAVE: there is XGETBV
    unsigned high;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if (__get_cpuid_count(7, 0, &eax7, &ebx7, &ecx7, &edx7) && eax7 >= 1) {
      __get_cpuid_count(7, 1, &eax71, &ebx71, &ecx71, &edx71);
    }
  }
};

bool all(unsigned bits, unsigned of) { return (of & bits) == bits; }
bool has_avx2() {
  const Processor p;  // FMA, AVX, F16C; AVX2; xmm and ymm
  return all(1u << 12 | 1u << 28 | 1u << 29, p.ecx1) && all(1u << 5, p.ebx7) && all(0x6, p.saved);
}
bool has_avx512() {
  const Processor p;  // F, DQ, BW, VL; masks and zmm
  return has_avx2() && all(1u << 16 | 1u << 17 | 1u << 30 | 1u << 31, p.ebx7) && all(0xe0, p.saved);
}
bool has_avx512bf16() {
  const Processor p;  // VBMI; BF16
  return has_avx512() && all(1u << 1, p.ecx7) && all(1u << 5, p.eax71);
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
