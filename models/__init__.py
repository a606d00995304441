"""Flax NNX modules that read the policy: layers, attention, Qwen3, generation."""

from .config import Quantization, Qwen3Config, Yarn
from .generation import Generated, Prefix, decode, generate, generate_with_logprobs, prefill, reread
from .layers import Embedding, Linear, RMSNorm
from .qwen3 import Qwen3
from .sampling import History, Sampling
from .sharding import tensor_parallel

__all__ = [
    "Embedding",
    "Generated",
    "History",
    "Linear",
    "Prefix",
    "Quantization",
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
