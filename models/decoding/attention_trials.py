"""Trials of rotation and attention in a decoding step: small operands, on which kernel and reference are compared on a
device."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...policies.checks import Trial
from ...policies.matmul.trials import difference
from ..kv_cache import EMPTY, LayerCache
from . import bounds, hopper_attention, hopper_rotate, reference

EPS = 1e-6

BATCH, HEADS, KV, HEAD_DIM, SLOTS = 3, 8, 4, 128, 384
"""Shape of the trials of attention: two query heads share a key head, and six tiles of slots."""

LENGTHS = 1, 200, 384
"""Filled slots: one, a number that is no multiple of a tile, and all."""

ROWS = 8
"""Rows of a decoding step of `BATCH` sequences."""


_reference = jax.jit(reference.attend, static_argnames=("rows", "window", "narrow"))
_bounds = jax.jit(bounds.attention, static_argnames=("rows", "window"))


def of_rotation(dtype: np.dtype, normed: bool) -> Trial:
    """Returns the trial of the kernel that norms, rotates and stores, for activations of `dtype`; see `bounds`."""
    kind = f"{dtype.name}, {'with' if normed else 'without'} norms"
    return Trial("hopper rotation", kind, functools.partial(_compare_rotation, dtype, normed))


def of_attention(dtype: np.dtype, narrow: bool) -> Trial:
    """Returns the trial of attention over the filled slots, for activations of `dtype`; see `bounds`.

    narrow  whether the result is quantised
    """
    kind = f"{dtype.name}, {'quantised' if narrow else 'not quantised'}"
    return Trial("hopper attention", kind, functools.partial(_compare_attention, dtype, narrow))


def _compare_rotation(dtype: np.dtype, normed: bool) -> str | None:
    """Returns how queries or the cache differ from the reference's, in several slots."""
    random = np.random.default_rng(0)
    sums = random.standard_normal((2, ROWS, (HEADS + 2 * KV) * HEAD_DIM), np.float32)
    angles = random.uniform(0, 2 * np.pi, (BATCH, HEAD_DIM // 2))
    sides = random.uniform(0.5, 2, (2, HEAD_DIM)).astype(dtype)
    scales = (jnp.asarray(sides[0]), jnp.asarray(sides[1])) if normed else None
    cos, sin = (jnp.asarray(function(angles).astype(dtype)) for function in (np.cos, np.sin))
    cache = _cache(dtype, random)

    def compute(start: jax.Array) -> Any:
        operands = jnp.asarray(sums), scales, cos, sin, cache, start
        both = (run(*operands, eps=EPS) for run in (hopper_rotate.rotate_and_store, reference.rotate_and_store))
        return *both, bounds.rotation(*operands, eps=EPS)

    for slot in (0, SLOTS - 1, SLOTS // 3):
        (q, new), (want_q, want), bound = jax.device_get(jax.jit(compute)(jnp.int32(slot)))
        at = np.arange(SLOTS) == slot
        checks = (
            ("the query", q, want_q, bound.q),
            ("a key", new.keys, want.keys, np.where(at, bound.keys[..., None], 0)),
            ("a value", new.values, want.values, np.where(at[:, None], bound.values[:, :, None], 0)),
        )
        for what, found, expected, limit in checks:
            if why := difference(what, found, expected.astype(np.float64), limit):
                return why
    return None


def _compare_attention(dtype: np.dtype, narrow: bool) -> str | None:
    """Returns how attention differs from the reference's, for several lengths, with padding and with a window."""
    random = np.random.default_rng(0)
    q = jnp.asarray(random.standard_normal((BATCH, HEADS, HEAD_DIM), np.float32).astype(dtype))
    whole = _cache(dtype, random)
    attend = jax.jit(hopper_attention.attend, static_argnames=("rows", "window", "narrow"))
    for length, window in zip(LENGTHS, (None, LENGTHS[1] // 3, None), strict=True):
        positions, queries = np.full((BATCH, SLOTS), EMPTY, np.int32), np.zeros(BATCH, np.int32)
        for i in range(BATCH):
            first = min(40 * i, length - 1)  # padding at the left
            positions[i, first:length], queries[i] = np.arange(length - first), length - first - 1
        # What is in slots that are not filled has no influence, even if it is NaN.
        filled = np.arange(SLOTS) < length
        garbage, plain = (_filled(whole, filled, rest) for rest in (np.nan, 0))
        rest = jnp.asarray(queries), jnp.asarray(positions), jnp.int32(length)
        settings = {"rows": ROWS, "window": window}
        found = attend(q, garbage, *rest, **settings, narrow=narrow)
        wide = _reference(q, plain, *rest, **settings, narrow=False), _bounds(q, plain, *rest, **settings)
        (values, scales), ((want, _), bound) = jax.device_get((found, wide))
        if narrow:
            if scales is None or scales.shape != (HEADS * HEAD_DIM // 128, max(ROWS, reference.SCALES)):
                return f"the scales are {None if scales is None else scales.shape}"
            if why := difference("a scale", *_scales(scales, want, bound)):
                return why
            values, bound = bounds.dequantized(values, scales, want, bound)
        if why := difference("attention", values, want.astype(np.float64), bound):
            return why
    return None


def _scales(scales: np.ndarray, want: np.ndarray, bound: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns scales, those of the reference, and bounds: those of the largest magnitude, and an ulp for the quotient.

    Scales of padding are 1.
    """
    amax, limit = (np.abs(x.astype(np.float64)).reshape(ROWS, -1, 128).max(axis=2).T for x in (want, bound))
    expected, limits = np.ones(scales.shape), np.zeros(scales.shape)
    expected[:, :BATCH], limits[:, :BATCH] = (amax / 448)[:, :BATCH], (limit / 448 + amax * 2.0**-30)[:, :BATCH]
    return scales, expected, limits


def _cache(dtype: np.dtype, random: np.random.Generator) -> LayerCache:
    keys = random.standard_normal((BATCH, KV, HEAD_DIM, SLOTS), np.float32).astype(dtype)
    values = random.standard_normal((BATCH, KV, SLOTS, HEAD_DIM), np.float32).astype(dtype)
    return LayerCache(jnp.asarray(keys), jnp.asarray(values), None, None, dtype)


def _filled(cache: LayerCache, filled: np.ndarray, rest: float) -> LayerCache:
    """Returns the cache with `rest` in the slots that are not filled."""
    other = jnp.asarray(rest, cache.dtype)
    keys, values = jnp.where(filled, cache.keys, other), jnp.where(filled[:, None], cache.values, other)
    return LayerCache(keys, values, None, None, cache.dtype)
