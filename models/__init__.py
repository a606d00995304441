"""Flax NNX modules that read the policy: layers, decoders, generation."""

from .config import DecoderConfig, Quantization
from .decoder import CausalLM, Decoder
from .generation import (
    Generated,
    GenerationConfig,
    History,
    Prefix,
    Sampling,
    decode,
    extend_prefix,
    generate,
    generate_with_logprobs,
    prefill,
)
from .heads import last_token
from .layers import Embedding, Linear, RMSNorm
from .llama import Llama, LlamaConfig
from .qwen2 import Qwen2, Qwen2Config
from .qwen3 import Qwen3, Qwen3Config
from .qwen3_moe import Qwen3Moe, Qwen3MoeConfig
from .rope import LinearScaling, Llama3Scaling, Yarn
from .sharding.arrays import shardings
from .sharding.model_sharding import ModelSharding, expert_parallel, fsdp, fsdp_tensor_parallel, tensor_parallel

__all__ = [
    "CausalLM",
    "Decoder",
    "DecoderConfig",
    "Embedding",
    "Generated",
    "GenerationConfig",
    "History",
    "Linear",
    "LinearScaling",
    "Llama",
    "Llama3Scaling",
    "LlamaConfig",
    "ModelSharding",
    "Prefix",
    "Quantization",
    "Qwen2",
    "Qwen2Config",
    "Qwen3",
    "Qwen3Config",
    "Qwen3Moe",
    "Qwen3MoeConfig",
    "RMSNorm",
    "Sampling",
    "Yarn",
    "decode",
    "expert_parallel",
    "extend_prefix",
    "fsdp",
    "fsdp_tensor_parallel",
    "generate",
    "generate_with_logprobs",
    "last_token",
    "prefill",
    "shardings",
    "tensor_parallel",
]
