// AVX2.
#include "attention_kernels.h"

namespace perparam {

const AttentionIsa* attention_avx2();
#if defined(__AVX2__)
const AttentionIsa* attention_avx2() { return &attention::kAttention; }
#else
const AttentionIsa* attention_avx2() { return nullptr; }
#endif

}  // namespace perparam
