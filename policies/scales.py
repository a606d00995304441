"""Scales: computes them from the largest magnitude of each block, and encodes them in a dtype and decodes them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from . import dtypes

if TYPE_CHECKING:
    from jaxtyping import Array, Float

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
F32 = np.dtype(np.float32)


def amax_rule(amax: Float[Array, "..."], values: np.dtype, scale: np.dtype, exact: bool) -> Float[Array, "..."]:
    """Returns float32 scales `amax / largest(values)`, at least the smallest normal number; 1 for a block of zeros.

    Scales in f32, bf16 and f16 are rounded to nearest.  Scales in e8m0 and e4m3, which have few mantissa bits, are
    rounded up, so that no value of the block saturates.
    """
    return jnp.where(amax == 0, 1.0, least_rule(amax, values, scale, exact))


def least_rule(amax: Float[Array, "..."], values: np.dtype, scale: np.dtype, exact: bool) -> Float[Array, "..."]:
    """Returns float32 scales as `amax_rule` does, but the smallest scale for a block of zeros.

    For cached keys and values: attention compares their scales, so that a block of zeros must not have a large one.
    """
    largest = dtypes.largest(values)
    # On CPUs XLA replaces a division by a loop-invariant divisor by a product with the reciprocal, which is off by an
    # ulp in half of all cases.  After a barrier the divisor is an array, and the quotient is correctly rounded, with
    # and without jit.
    divisor = jax.lax.optimization_barrier(jnp.where(amax < 0, 1.0, jnp.float32(largest))) if exact else largest
    floor = max(dtypes.smallest_normal(F32), dtypes.smallest_normal(scale))
    scales = _rounded(jnp.maximum(amax / divisor, floor), scale)
    most = largest_scale(values, scale)
    if dtypes.is_activation(scale) and _nearest(_LARGEST_F32 / largest, scale) <= most:
        return scales  # no finite weight has a scale above `most`
    return jnp.where(jnp.isfinite(scales), jnp.minimum(scales, jnp.float32(most)), scales)


def shared_exponent_rule(
    amax: Float[Array, "..."], values: np.dtype, scale: np.dtype, exact: bool
) -> Float[Array, "..."]:
    """Returns float32 scales `2 ** (floor(log2(amax)) - emax)`, emax being the exponent of `largest(values)`.

    Values between `largest(values)` and the next power of two saturate.  A block of zeros has scale 1.  The smallest
    scale is 2**-126, since CPUs flush smaller numbers to zero.

    Source: OCP Microscaling Formats (MX) v1.0, section 6.3.
    """
    emax = math.frexp(dtypes.largest(values))[1] - 1
    exponent = (jax.lax.bitcast_convert_type(amax, jnp.int32) >> 23) - emax  # the sign bit is 0, since amax >= 0
    scales = jax.lax.bitcast_convert_type(jnp.maximum(exponent, 1) << 23, jnp.float32)
    return jnp.where(amax == 0, 1.0, jnp.where(jnp.isfinite(amax), scales, jnp.nan))


ScaleRule = Callable[[jax.Array, np.dtype, np.dtype, bool], jax.Array]
"""`rule(amax, values, scale, exact)` returns float32 scales of the shape of `amax`, representable in dtype `scale`.

amax    (...) float32, the largest magnitude of each block
values  the dtype of the values
scale   the dtype of the scales
exact   whether the quotient must be correctly rounded on CPUs too, which costs a barrier to fusion
"""

_LARGEST_F32 = float(np.finfo(F32).max)


@functools.cache
def largest_scale(values: np.dtype, scale: np.dtype) -> float:
    """Returns the largest number of dtype `scale` whose product with `largest(values)` is finite in float32."""
    largest, overflow = dtypes.largest(values), 2.0**128 - 2.0**103  # float32 rounds larger numbers to infinity
    code = np.array(min(_LARGEST_F32 / largest, dtypes.largest(scale)), scale).view(f"u{scale.itemsize}")
    while float(code.view(scale).astype(F32)) * largest >= overflow:
        code = code - code.dtype.type(1)
    return float(code.view(scale).astype(F32))


def _nearest(number: float, dtype: np.dtype) -> float:
    """Returns `number` rounded to `dtype`."""
    return float(np.array(min(number, dtypes.largest(dtype))).astype(F32).astype(dtype).astype(F32))


def _rounded(scales: jax.Array, dtype: np.dtype) -> jax.Array:
    """Returns positive float32 `scales` rounded to a number of `dtype`, in float32."""
    if dtype == F32:
        return scales
    if dtypes.is_activation(dtype):
        return dtypes.saturating_cast(scales, dtype).astype(jnp.float32)
    if dtype == E8M0:
        bits = jax.lax.bitcast_convert_type(scales, jnp.uint32) + jnp.uint32(0x7FFFFF)
        rounded = jax.lax.bitcast_convert_type(bits >> 23 << 23, jnp.float32)
    else:
        nearest = dtypes.saturating_cast(scales, dtype)
        code = jax.lax.bitcast_convert_type(nearest, jnp.uint8)
        largest = np.array(dtypes.largest(dtype), dtype).view(np.uint8)
        above = jax.lax.bitcast_convert_type(jnp.minimum(code + jnp.uint8(1), largest), dtype)
        rounded = jnp.where(nearest.astype(jnp.float32) < scales, above, nearest).astype(jnp.float32)
    return jnp.where(jnp.isfinite(scales), rounded, jnp.nan)


def encode_scales(scales: jax.Array, dtype: np.dtype) -> jax.Array:
    """Returns float32 `scales`, which must be representable in `dtype`, in `dtype`."""
    if dtype != E8M0:
        return dtypes.saturating_cast(scales, dtype)
    bits = jax.lax.bitcast_convert_type(scales, jnp.uint32)
    return jax.lax.bitcast_convert_type((bits >> 23).astype(jnp.uint8), E8M0)


def decode_scales(scale_inv: jax.Array) -> jax.Array:
    """Returns scales in float32, exactly, except that CPUs flush an e8m0 scale of 2**-127, a subnormal, to zero."""
    if scale_inv.dtype != E8M0:
        return scale_inv.astype(jnp.float32)
    code = jax.lax.bitcast_convert_type(scale_inv, jnp.uint8).astype(jnp.uint32)
    bits = jnp.where(code == 255, jnp.uint32(0x7FC00000), jnp.where(code == 0, jnp.uint32(1 << 22), code << 23))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def can_scale(dtype: np.dtype) -> bool:
    """Returns whether the scales of a format may have `dtype`: f32, bf16, f16, e8m0 or e4m3."""
    return dtypes.is_activation(dtype) or dtype in (E8M0, E4M3)
