"""Flax NNX modules that read the policy: layers, decoders, generation."""

from .config import DecoderConfig, Quantization
from .decoder import CausalLM, Decoder
from .generation import Generated, Prefix, decode, generate, generate_with_logprobs, prefill, reread
from .layers import Embedding, Linear, RMSNorm
from .llama import Llama, LlamaConfig
from .qwen2 import Qwen2, Qwen2Config
from .qwen3 import Qwen3, Qwen3Config
from .rope import LinearScaling, Llama3Scaling, Yarn
from .sampling import History, Sampling
from .sharding import tensor_parallel

__all__ = [
    "CausalLM",
    "Decoder",
    "DecoderConfig",
    "Embedding",
    "Generated",
    "History",
    "Linear",
    "LinearScaling",
    "Llama",
    "Llama3Scaling",
    "LlamaConfig",
    "Prefix",
    "Quantization",
    "Qwen2",
    "Qwen2Config",
    "Qwen3",
    "Qwen3Config",
    "RMSNorm",
    "Sampling",
    "Yarn",
    "decode",
    "generate",
    "generate_with_logprobs",
    "prefill",
    "reread",
    "tensor_parallel",
]
