// The kernels of the instruction set that is used in this process.
#pragma once

#include "attention.h"

namespace perparam {

const AttentionIsa* attention_isa();

}  // namespace perparam
