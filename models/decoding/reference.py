"""What the fused kernels of a decoding step compute, in plain JAX: their definition, and the reference of their tests.

A step has one token for each of `batch` sequences.  Its rows are padded to a tile of the matrix products, 8, 16, 32 or
64 rows, once for all layers: nothing depends on the rows beyond `batch`, and they stay finite.

Sums are the products of a launch of `hopper_columns.products` before the addition of its parts: (parts, rows, out) in
float32, or (1, rows, out) in the activations' dtype.  A product is rounded to the activations' dtype where the layers
in `transformer.py` round it.

An operand of a matrix product is a pair `(values, scales)`: values (rows, in) in the activations' dtype and None, or
float8_e4m3fn with scales (in/128, max(rows, SCALES)) float32, one for each row and 128 columns, transposed and padded
with ones as the kernels require.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ...policies.formats import ROW_BLOCK, Format
from ...policies.scaled_array import quantize_in_one_pass
from ...policies.scales import E4M3, F32
from .. import attention, rope
from ..kv_cache import LayerCache

SCALES = 32
"""Least number of scales for 128 columns: see `hopper_columns`."""

Operand = tuple[jax.Array, jax.Array | None]


def operand(x: jax.Array, *, narrow: bool) -> Operand:
    """x (rows, in) as an operand of a matrix product: itself, or quantised to e4m3 if `narrow`."""
    if not narrow:
        return x, None
    array = quantize_in_one_pass(x, Format(E4M3, ROW_BLOCK, F32))
    missing = max(SCALES - x.shape[0], 0)
    return array.values, jnp.pad(array.scale_inv, ((0, missing), (0, 0)), constant_values=1).T


def product(sums: jax.Array, dtype: np.dtype) -> jax.Array:
    """The product (rows, out) in `dtype`, from its sums (parts, rows, out)."""
    return sums.astype(jnp.float32).sum(axis=0).astype(dtype)


def add_and_norm(
    stream: jax.Array, sums: jax.Array | None, scale: jax.Array, *, eps: float, narrow: bool
) -> tuple[jax.Array, Operand]:
    """`(stream, operand)`: the residual stream with a product added to it, and its RMS norm.

    stream  (rows, hidden)         bf16 or f16
    sums    (parts, rows, hidden)  of the product; None adds nothing
    scale   (hidden,)              of the norm, in stream's dtype
    narrow  whether the norm is quantised
    """
    if sums is not None:
        stream = stream + product(sums, stream.dtype)
    return stream, operand(norm(stream, scale, eps), narrow=narrow)


def norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """The RMS norm of x (..., features) in x's dtype, as `RMSNorm`; x / rms(x) is rounded before the product."""
    wide = x.astype(jnp.float32)
    normalised = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + jnp.float32(eps))
    return normalised.astype(x.dtype) * scale


def gate(sums: jax.Array, *, dtype: np.dtype, narrow: bool) -> Operand:
    """silu(gate) * up as the operand of `down_proj`, in `dtype` or quantised.

    sums  (parts, rows, 2 * intermediate)  of the products of gate and up, side by side
    """
    gate, up = jnp.split(product(sums, dtype), 2, axis=-1)
    return operand(jax.nn.silu(gate.astype(jnp.float32)).astype(dtype) * up, narrow=narrow)


def rotate_and_store(
    sums: jax.Array,
    scales: tuple[jax.Array, jax.Array] | None,
    cos: jax.Array,
    sin: jax.Array,
    cache: LayerCache,
    start: jax.Array,
    *,
    eps: float,
) -> tuple[jax.Array, LayerCache]:
    """`(q, cache)`: queries (batch, heads, d), normed and rotated, and the cache with this token in slot `start`.

    sums      (parts, rows, (heads + 2 * kv) * d)  of the products of q, k and v, side by side
    scales    (d,) each  of the norms of queries and keys, in the activations' dtype; None: they are not normed
    cos, sin  (batch, d / 2)  in the activations' dtype
    cache     keys (batch, kv, d, slots) and values (batch, kv, slots, d), in the activations' dtype
    start     () int32
    """
    batch, kv, d, _ = cache.keys.shape
    heads = sums.shape[-1] // d - 2 * kv
    each = product(sums, cos.dtype)[:batch].reshape(batch, 1, heads + 2 * kv, d)
    q, k, v = jnp.split(each, (heads, heads + kv), axis=2)
    if scales is not None:
        q, k = norm(q, scales[0], eps), norm(k, scales[1], eps)
    q, k = (rope.rotate(x, cos[:, None, None], sin[:, None, None]) for x in (q, k))
    return q[:, 0], cache.put(LayerCache.of(k, v, cache.dtype), start)


def attend(
    q: jax.Array,
    cache: LayerCache,
    queries: jax.Array,
    slots: jax.Array,
    length: jax.Array,
    *,
    rows: int,
    window: int | None,
    narrow: bool,
) -> Operand:
    """Attention of q over the filled slots, (rows, heads * d), as the operand of `o_proj`.

    q        (batch, heads, d)
    cache    as in `rotate_and_store`
    queries  (batch,) int32        positions of the queries
    slots    (batch, slots) int32  positions of the keys, EMPTY for slots that no query sees
    length   () int32              filled slots; only these are read
    rows     of the operand, at least `batch`; those beyond are zero
             A query that sees no slot has the mean of all values here, and zero from the kernel: nothing reads it.
    window   a query sees the keys less than `window` positions before it; None: all
    """
    mixed, _ = attention.attend(q[:, None], cache, queries[:, None], slots, window)
    return operand(jnp.pad(mixed[:, 0], ((0, rows - q.shape[0]), (0, 0))), narrow=narrow)
