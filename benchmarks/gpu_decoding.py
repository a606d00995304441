"""The checks of decoding steps with fused kernels, for `gpu_checks.py`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import shapes
from flax import nnx
from jax.typing import ArrayLike

from perparam.models import Qwen3
from perparam.models.decoding import attention_trials, row_trials
from perparam.models.decoding import step as decoding
from perparam.models.kv_cache import KVCache
from perparam.policies import matmul_override
from perparam.policies.checks import Trial

STEP_ERROR = {"W8A16": 2.0**-4, "W8A8": 2.0**-2}
"""Largest difference of a step of two layers from the same layers without kernels, relative to the largest value.

Products are rounded to bfloat16 where their sums are added otherwise; in W8A8 some values are then quantised to a
neighbour, 2**-3 away.  In the interpreter, relative Frobenius errors are 0.007 and 0.05.
"""


def trials() -> Iterator[Trial]:
    """Yields the trials of all kernels of a step in bfloat16."""
    dtype = np.dtype(jnp.bfloat16)
    for narrow in (False, True):
        yield row_trials.of_norm(dtype, narrow)
        yield row_trials.of_gate(dtype, narrow)
        yield attention_trials.of_attention(dtype, narrow)
    yield from (attention_trials.of_rotation(dtype, normed) for normed in (False, True))


@functools.lru_cache(maxsize=1)
def _model(size: str, mode: str) -> Qwen3:
    """Returns the first two layers of a model, random, and an embedding of few tokens."""
    abstract = shapes.abstract_model(size, mode, layers=2, vocabulary=512)
    return type(abstract)(abstract.config, policy=abstract.policy, rngs=nnx.Rngs(0))


def step(size: str, mode: str, rows: int, tokens: int, slots: int) -> Iterator[tuple[ArrayLike, ArrayLike, ArrayLike]]:
    """Yields hidden states and the cache of a step after `tokens`, by the kernels and without, and the bounds."""
    model = _model(size, mode)
    random = np.random.default_rng([rows, tokens])
    ids = random.integers(0, 512, (rows, tokens + 1))
    mask = np.arange(tokens) >= random.integers(0, tokens // 2 + 1, (rows, 1))

    def hidden(ids: np.ndarray, mask: np.ndarray | None, cache: KVCache) -> tuple[jax.Array, KVCache]:
        return model.hidden(ids, mask, cache)

    with matmul_override(target="cuda"):  # without kernels
        _, cache = jax.jit(hidden)(ids[:, :-1], mask, model.empty_cache(rows, slots))
        expected = jax.jit(hidden)(ids[:, -1:], None, cache)
    layers = [cache.layer(i) for i in range(2)]
    x = model.embed_tokens(jnp.asarray(ids[:, -1:]))
    with matmul_override(target="cuda:9.0"):
        if why := decoding.refuses(model.layers, x, layers, decoding.Target("cuda", decoding.HOPPER)):
            raise AssertionError(f"the step is not decoded by kernels: {why}")
        found = jax.jit(hidden)(ids[:, -1:], None, cache)
    for one, want in zip(*(_arrays(*both) for both in (found, expected)), strict=True):
        wide = np.asarray(want).astype(np.float64)
        yield one, want, np.full(wide.shape, STEP_ERROR[mode] * np.abs(wide).max())


def _arrays(x: jax.Array, cache: KVCache) -> list[jax.Array]:
    return [x, *cache.keys, *cache.values]


STEPS = [
    *itertools.product(("8B",), shapes.MODES, (1, 8, 64), (100,), (128,)),
    *itertools.product(("8B",), shapes.MODES, (1,), (3000,), (4096,)),
    *itertools.product(("0.6B",), shapes.MODES, (3,), (500,), (512,)),
]
"""Model, mode, sequences, tokens before the step, and slots of the cache."""
