// AVX512.
#include "attention_kernels.h"

namespace perparam {

const AttentionIsa* attention_avx512();
#if defined(__AVX512BW__)
const AttentionIsa* attention_avx512() { return &attention::kAttention; }
#else
const AttentionIsa* attention_avx512() { return nullptr; }
#endif

}  // namespace perparam
