// Every other processor: vectors of four numbers, which the compiler makes of what there is; NEON on arm64.
#include "attention_kernels.h"

namespace perparam {

const AttentionIsa* attention_scalar();
const AttentionIsa* attention_scalar() { return &attention::kAttention; }

}  // namespace perparam
