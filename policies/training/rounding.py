"""Rounding of updated parameters: unbiased stochastic casts, and arrays quantised again to their narrow format.

With rounding to nearest an update smaller than half a step of the stored dtype is lost, whatever the number of steps.
Stochastic rounding keeps it on average: the result is the neighbour above with a probability that is the distance from
the neighbour below in steps (Gupta et al., 2015, "Deep Learning with Limited Numerical Precision").
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from .. import dtypes
from ..blocks import expand
from ..errors import UnsupportedCast
from ..explicit_axes import on_auto_axes
from ..formats import Format
from ..scaled_array import ScaledArray, as_operands, as_scales, fresh_scales, quantize
from ..scales import F32, decode_scales, encode_scales
from .random_bits import random_bits

_BF16 = np.dtype(ml_dtypes.bfloat16)


def stochastic_cast(x: ArrayLike, dtype: DTypeLike, key: jax.Array) -> jax.Array:
    """Returns `x` rounded to one of its two neighbours in `dtype`, at random, so that the mean of the results is x.

    x      any shape, floating point; computed in float32
    dtype  f32, bf16, f16, a float8 type or int8
    key    a key of `jax.random`

    Numbers that `dtype` has are kept.  Finite numbers beyond the largest are clipped to it, and NaN and infinities are
    cast, as by `saturating_cast`.  The probability of the neighbour above is exact to 2**-32.

    >>> values = stochastic_cast(jnp.full(1000, 1.25), "int8", jax.random.key(0))
    >>> sorted(set(values.tolist())), round(float(values.astype("float32").mean()), 1)
    ([1, 2], 1.2)

    Raises:
      UnsupportedCast: if `x` is not floating point, or for float64 and dtypes in which no parameter is stored.
    """
    x, to = dtypes.as_array(x), dtypes.as_dtype(dtype)
    if not dtypes.is_floating(x.dtype):
        raise UnsupportedCast(f"an array of {x.dtype} cannot be rounded to {dtypes.dtype_name(to)}. Pass f32.")
    if not dtypes.can_store(to) or to == np.float64:
        raise UnsupportedCast(
            f"stochastic rounding to {dtypes.dtype_name(to)} is not supported. Write f32, bf16, f16, a float8 type or "
            "int8."
        )
    result: jax.Array = on_auto_axes(functools.partial(_stochastic_cast, dtype=to), x, key)
    return result


@functools.partial(jax.jit, static_argnames=("dtype",))
def _stochastic_cast(x: jax.Array, key: jax.Array, *, dtype: np.dtype) -> jax.Array:
    x = dtypes.saturating_cast(x, F32)
    if dtype == F32:
        return x
    random = random_bits(key, x.shape)
    if dtype == _BF16:
        return jnp.where(jnp.isfinite(x), _to_bfloat16(x, random), x.astype(dtype))
    # Chosen in float32: XLA's CPU backend would widen float8 for the choice, and lose subnormal numbers of e5m2fnuz.
    return dtypes.saturating_cast(jnp.where(jnp.isfinite(x), _to_multiple(x, dtype, random), x), dtype)


def _to_bfloat16(x: jax.Array, random: jax.Array) -> jax.Array:
    """Returns finite float32 numbers rounded to bfloat16, which is the first half of their bits.

    A carry of the last 16 bits and 16 random bits adds one step.  This is right for subnormal numbers too, which CPUs
    flush to zero in float32 arithmetic.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    magnitude = (bits & jnp.uint32(0x7FFFFFFF)) + (random >> 16)
    magnitude = jnp.minimum(magnitude >> 16, jnp.uint32(0x7F7F))  # the largest finite number
    return jax.lax.bitcast_convert_type((bits >> 31 << 15 | magnitude).astype(jnp.uint16), jnp.bfloat16)


def _to_multiple(x: jax.Array, dtype: np.dtype, random: jax.Array) -> jax.Array:
    """Returns finite float32 numbers rounded to multiples of the step of `dtype` at their magnitude, in float32.

    Steps are powers of two within the normal range of float32, so that products with them and remainders are exact.
    """
    magnitude = jnp.minimum(jnp.abs(x), jnp.float32(dtypes.largest(dtype)))
    if dtype.kind == "i":
        step = inverse = jnp.ones_like(magnitude)
    else:
        info = ml_dtypes.finfo(dtype)
        exponent = jax.lax.bitcast_convert_type(magnitude, jnp.int32) >> 23  # biased by 127
        exponent = jnp.maximum(exponent, info.minexp + 127) - info.nmant
        step = jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)
        inverse = jax.lax.bitcast_convert_type((254 - exponent) << 23, jnp.float32)
    steps = magnitude * inverse
    whole = jnp.floor(steps)
    above = random < ((steps - whole) * jnp.float32(2**32)).astype(jnp.uint32)
    return jnp.copysign((whole + above.astype(jnp.float32)) * step, x)


def requantize(
    weight: ArrayLike, format: Any, *, key: jax.Array | None = None, scale_inv: ArrayLike | None = None
) -> ScaledArray:
    """Returns `weight` in a narrow format, rounded to nearest, or stochastically with a key.

    weight     (..., rows, columns)  floating point
    format     a Format, its name, or a dtype, completed as by `quantize`
    key        a key of `jax.random`; None: to nearest
    scale_inv  (..., ceil(rows/block[0]), ceil(columns/block[1]))  scales to use, in the format's dtype of scales, as
               for delayed scaling; None: those of the format's rule. Values beyond the largest are clipped

    The mean of stochastic results is the weight, except of values that are clipped: under given scales, in mxfp8 whose
    rule clips the largest values of a block, and by an ulp of float32 under scales that were rounded down.

    >>> scaled = requantize(jnp.full((1, 4), 0.3), "int8", scale_inv=jnp.full((1, 1), 0.25))
    >>> scaled.values.tolist(), scaled.dequantize().tolist()
    ([[1, 1, 1, 1]], [[0.25, 0.25, 0.25, 0.25]])

    Raises:
      UnsupportedCast: if `weight` is not floating point, the format is not narrow, or the scales have another dtype.
      InvalidScale: if `weight` has fewer than two dimensions, or the shape of the scales does not fit it.
    """
    if key is None:
        return quantize(weight, format, scale_inv=scale_inv)
    weight, format = as_operands(weight, format)
    scales = None if scale_inv is None else as_scales(scale_inv, weight.shape, format)
    result: ScaledArray = on_auto_axes(functools.partial(_requantize, format=format), weight, key, scales)
    return result


@functools.partial(jax.jit, static_argnames=("format",))
def _requantize(weight: jax.Array, key: jax.Array, scale_inv: jax.Array | None, *, format: Format) -> ScaledArray:
    """Returns a float32 array rounded stochastically.

    The quotient may be off by an ulp, without the barrier to fusion of `quantize`, so that XLA keeps no wide array.
    """
    assert format.block is not None
    assert format.scale is not None
    if scale_inv is None:
        scale_inv = encode_scales(fresh_scales(weight, format, exact=True), format.scale)
    quotient = weight / expand(decode_scales(scale_inv), weight.shape, format.block)
    return ScaledArray(stochastic_cast(quotient, format.values, key), scale_inv, format)
