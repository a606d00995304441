"""Greedy generators of perparam and transformers, and the measurements of `generate.py`.

Each contender imports this in its own Python: what it needs beyond numpy is imported in the functions.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

PROMPT, SHORTEST, STREAMED, PART = 512, 16, 64, 8
VOCABULARY = 151936
NEW = {1: 24, 8: 16, 64: 8}
"""Number of timed steps by batch size; other batch sizes have that of the next smaller one."""

LONG = 2048

Generator = Callable[[np.ndarray, int], Any]
"""`generator(prompts, count)` generates `count` new tokens for each of the prompts (rows, length).

Those of one row that return tokens in parts return the times of the parts."""


def perparam_generator(model: Any, part: int | None = None) -> Generator:
    """Returns a greedy generator with perparam, which returns tokens in parts of `part`, or all at once."""
    import perparam
    from perparam.generation import GenerationConfig
    from perparam.models import decode

    def generate(prompts, count):
        if part is None:
            return np.asarray(perparam.generate(model, prompts, max_new_tokens=count, eos_token_id=()))
        config = GenerationConfig(count, eos_token_id=())
        return [
            (np.asarray(part.tokens), time.perf_counter())[1]
            for part in decode(model, prompts, None, config, chunk=part)
        ]

    return generate


def transformers_generator(folder: str, dtype: str, experts: str | None = None) -> Generator:
    """Returns a greedy generator with transformers, which returns the time of each token.

    experts  how it computes mixtures of experts; None: its default
    """
    import torch
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        def __init__(self):
            self.times = []

        def put(self, value):  # the prompt, then each token
            self.times.append(time.perf_counter())

        def end(self):
            self.times.pop(0)

    torch.set_num_threads(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    model = model.to(getattr(torch, dtype)).eval()
    if experts is not None:
        model.set_experts_implementation(experts)

    def generate(prompts, count):
        ids, clock = torch.as_tensor(prompts), Clock()
        options = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False, "streamer": clock}
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return clock.times

    return generate


def steps(batch: int) -> int:
    """Returns the number of timed steps for a batch size."""
    return NEW[max(size for size in NEW if size <= batch)]


def prompts(batch: int, length: int, vocabulary: int = VOCABULARY) -> np.ndarray:
    """Returns random ids (batch, length), which are the same in every process."""
    return np.random.default_rng(length).integers(1, vocabulary, (batch, length))


def measure(generate: Generator, batch: int, vocabulary: int = VOCABULARY) -> dict[str, float]:
    """Returns the seconds of a prefill and of a decoding step."""

    def seconds(length: int, count: int) -> float:
        ids = prompts(batch, length, vocabulary)
        start = time.perf_counter()
        generate(ids, count)
        return time.perf_counter() - start

    count = steps(batch)
    prefill, first, all_new = seconds(length(batch), 1), seconds(SHORTEST, 1), seconds(SHORTEST, count + 1)
    return {"prefill": prefill, "decode": (all_new - first) / count}


def length(batch: int) -> int:
    """Returns the length of the prompts for the timed prefill."""
    return max(PROMPT // batch, SHORTEST)


def streaming(whole: Generator, in_parts: Generator, vocabulary: int = VOCABULARY) -> dict[str, float]:
    """Returns seconds per step for one row, at once and in parts; both include the prefill."""
    ids, result = prompts(1, SHORTEST, vocabulary), {}
    for name, generate in (("at once", whole), ("streamed", in_parts)):
        start = time.perf_counter()
        generate(ids, STREAMED)
        result[name] = (time.perf_counter() - start) / STREAMED
    return result


def measure_long(whole: Generator, in_parts: Generator, part: int, vocabulary: int = VOCABULARY) -> dict[str, float]:
    """Returns the seconds of the prefill of a long prompt, and of a step after it; `part` is the length of parts."""
    ids = prompts(1, LONG, vocabulary)
    start = time.perf_counter()
    whole(ids, 1)
    prefill = time.perf_counter() - start
    times = in_parts(ids, 4 * PART)
    return {"prefill": prefill, "decode": (times[-1] - times[0]) / (len(times) - 1) / part}


def spread(values: Any) -> dict[str, float]:
    """Returns the median and the quartiles of `values`."""
    lower, median, upper = np.percentile(values, (25, 50, 75))
    return {"lower": float(lower), "median": float(median), "upper": float(upper)}


def shown(values: dict[str, float]) -> str:
    """Returns `median (lower–upper)` as text."""
    return f"{values['median']:.3g} ({values['lower']:.3g}–{values['upper']:.3g})"
