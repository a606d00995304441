"""Generation: sampling, prefill, decoding as a whole or in chunks."""

from .config import GenerationConfig
from .loop import CHUNK, Generated, decode, generate, generate_with_logprobs
from .prefix import bucket, extend_prefix, prefill, truncated
from .programs import Prefix
from .sampling import GREEDY, History, Processor, Sampling

__all__ = [
    "CHUNK",
    "GREEDY",
    "Generated",
    "GenerationConfig",
    "History",
    "Prefix",
    "Processor",
    "Sampling",
    "bucket",
    "decode",
    "extend_prefix",
    "generate",
    "generate_with_logprobs",
    "prefill",
    "truncated",
]
