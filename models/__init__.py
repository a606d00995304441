"""Flax NNX modules that read the policy: layers, attention, Qwen3, generation."""

from .config import Quantization, Qwen3Config, Yarn
from .generation import generate
from .layers import Embedding, Linear, RMSNorm
from .qwen3 import Qwen3
from .sharding import tensor_parallel

__all__ = [
    "Embedding",
    "Linear",
    "Quantization",
    "Qwen3",
    "Qwen3Config",
    "RMSNorm",
    "Yarn",
    "generate",
    "tensor_parallel",
]
