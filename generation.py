"""Generation in parts: prefixes, chunks, log-probabilities, sampling."""

from .loaders.text import Completion, sampling_defaults
from .models.generation import (
    GREEDY,
    Generated,
    GenerationConfig,
    History,
    Prefix,
    Processor,
    Sampling,
    decode,
    extend_prefix,
    generate_with_logprobs,
    prefill,
)

__all__ = [
    "GREEDY",
    "Completion",
    "Generated",
    "GenerationConfig",
    "History",
    "Prefix",
    "Processor",
    "Sampling",
    "decode",
    "extend_prefix",
    "generate_with_logprobs",
    "prefill",
    "sampling_defaults",
]
