"""Bounds of the differences between the kernels of a decoding step and their reference, for tests and trials.

Both round to the activations' dtype at the same places, so that they differ where sums in another order, an
approximate function, or XLA, which may leave out roundings, lead to another of two neighbours: by two unit roundoffs.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ...policies.matmul.trials import SUM, UNIT_ROUNDOFF
from .. import attention as plain_attention
from ..kv_cache import LayerCache


class Rotation(NamedTuple):
    """Bounds of queries (batch, heads, d), and of keys and values (batch, kv, d) of the token."""

    q: jax.Array
    keys: jax.Array
    values: jax.Array


def rotation(
    sums: jax.Array,
    scales: tuple[jax.Array, jax.Array] | None,
    cos: jax.Array,
    sin: jax.Array,
    cache: LayerCache,
    _: jax.Array,
    *,
    eps: float,
) -> Rotation:
    """Returns bounds of what `rotate_and_store` computes from these operands.

    An element of a head is rounded to the activations' dtype as a product, when it is divided by the root, when it is
    multiplied by the scale, when it is multiplied by cos and sin, and when two of these are added: 5 times.  The root
    differs by the mean of the differences of what it is the root of: as much as one more.  Each time two unit roundoffs
    of the sum of magnitudes; values are only rounded once.  Subnormal numbers differ by the smallest of them each time.
    """
    batch, kv, d = cache.keys.shape[:3]
    heads = sums.shape[-1] // d - 2 * kv
    unit, least = UNIT_ROUNDOFF[cos.dtype.name], float(jnp.finfo(cos.dtype).smallest_subnormal)
    wide = sums[:, :batch].astype(jnp.float32)
    product, magnitude = (x.reshape(batch, -1, d) for x in (wide.sum(axis=0), jnp.abs(wide).sum(axis=0)))
    magnitude = magnitude * (1 + sums.shape[0] * SUM / unit)
    if scales is not None:
        factor = jax.lax.rsqrt(jnp.mean(product[:, :-kv] ** 2, axis=-1, keepdims=True) + eps)
        side = jnp.repeat(jnp.stack(scales), np.array([heads, kv]), axis=0, total_repeat_length=heads + kv)
        normed = magnitude[:, :-kv] * factor * jnp.abs(side.astype(jnp.float32))
    else:
        normed = magnitude[:, :-kv]
    left, right = jnp.split(normed, 2, axis=-1)
    c, s = (jnp.abs(x.astype(jnp.float32))[:, None] for x in (cos, sin))
    rotated = jnp.concatenate([left * c + right * s, right * c + left * s], axis=-1) * (12 * unit) + 12 * least
    return Rotation(rotated[:, :heads], rotated[:, heads:], magnitude[:, -kv:] * (2 * unit) + 2 * least)


def attention(
    q: jax.Array,
    cache: LayerCache,
    queries: jax.Array,
    slots: jax.Array,
    _: jax.Array,
    *,
    rows: int,
    window: int | None,
) -> jax.Array:
    """Returns bounds (rows, heads * d) of what `attend` computes, before it is quantised.

    For weights w and values v, with the unit roundoff u of the activations' dtype, the bound is the sum of

    - (2 u + e) sum(w |v|), since the reference rounds weights and the kernel weights times a number of at least 1; e is
      the error of the weights in float32: twice that of the scores in each of two softmaxes, and that of exp2 and of
      the sums over slots, in both of them
    - 2**-24 sum(|v|) for float16, in which both round weights to multiples of 2**-24
    - 2 u |sum(w v)| + the smallest number, since both round the result

    A score has `d` terms whose sum differs by `SUM` of the sum of magnitudes each, and is multiplied twice.
    """
    unit, least = UNIT_ROUNDOFF[q.dtype.name], float(jnp.finfo(q.dtype).smallest_subnormal)
    batch, heads, d = q.shape
    wide, keys, values = (x.astype(jnp.float32) for x in (q, cache.keys, cache.values))
    float32 = LayerCache(keys, values, None, None, np.dtype(np.float32))
    _, weights = plain_attention.attend(wide[:, None], float32, queries[:, None], slots, window)
    kv = keys.shape[1]
    w = weights()[:, :, 0].reshape(batch, kv, -1, keys.shape[3])
    grouped = jnp.abs(wide).reshape(batch, kv, -1, d)
    magnitude = jnp.einsum("bkgd,bkds->bkgs", grouped, jnp.abs(keys)).max(axis=-1) * d**-0.5
    error = (4 * (d + 8) * SUM * magnitude + 2 * (keys.shape[3] + 16) * SUM)[..., None]
    result, terms = (jnp.einsum("bkgs,bksd->bkgd", w, x) for x in (values, jnp.abs(values)))
    bound = (2 * unit + error) * terms + 2 * unit * jnp.abs(result) + least
    if q.dtype == jnp.float16:
        bound += 2.0**-24 * jnp.abs(values).sum(axis=2)[:, :, None]
    return jnp.pad(bound.reshape(batch, heads * d), ((0, rows - batch), (0, 0)))


def dequantized(
    values: jax.Array, scales: jax.Array, expected: jax.Array, bound: jax.Array
) -> tuple[np.ndarray, np.ndarray]:
    """Returns an operand in e4m3, `values * scales`, and the bound of its difference to `expected`.

    expected  (rows, in)  of which it is the quantisation, up to `bound`

    The bound of rounding to e4m3 is `max(|x| * 2**-4, scale * 2**-10)`, with a margin of 2**-20 for inexact quotients.
    """
    rows = values.shape[0]
    by_column = np.repeat(np.asarray(scales, np.float64).T[:rows], 128, axis=1)
    wide, limit = np.asarray(values).astype(np.float64) * by_column, np.asarray(bound, np.float64)
    largest = np.abs(np.asarray(expected).astype(np.float64)) + limit
    return wide, limit + np.maximum(largest * 2.0**-4, by_column * 2.0**-10) * (1 + 2.0**-20)
