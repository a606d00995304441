"""The gradient of a kernel in a product, and operands of narrow products in the gradients of x and of a kernel.

Narrow products are those of FP8 training: the gradient of the result is quantised row by row in blocks along the axis
that is summed, of 128 values unless the format has its own; so is x for the gradient of the kernel; the kernel has its
own blocks.  Sums are float32.  Sources: DeepSeek-V3 (2024), section 3.3; torchao's `prototype/blockwise_fp8_training`;
for e5m2 gradients beside e4m3 operands, Transformer Engine's recipe HYBRID.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .. import dtypes
from ..blocks import DEFAULT_BLOCK
from ..errors import UnsupportedCast
from ..formats import Format
from ..scaled_array import ScaledArray, quantize, quantize_rows
from ..scales import E4M3
from . import oracle
from .calls import Call, Operands


def frozen(kernel: jax.Array | ScaledArray) -> jax.Array | ScaledArray:
    """Returns a kernel without its proxy."""
    return kernel.frozen() if isinstance(kernel, ScaledArray) else kernel


def with_empty_proxy(kernel: jax.Array | ScaledArray) -> jax.Array | ScaledArray:
    """Returns a kernel whose proxy has its dtype and no values, as it is kept for the backward pass."""
    if not isinstance(kernel, ScaledArray) or kernel.proxy is None:
        return kernel
    return dataclasses.replace(kernel, proxy=kernel.proxy[..., :0])


def cotangent(kernel: jax.Array | ScaledArray, gradient: jax.Array | None) -> jax.Array | ScaledArray | None:
    """Returns the gradient of a kernel as JAX expects it: that of a ScaledArray is at its proxy."""
    if gradient is None or not isinstance(kernel, ScaledArray):
        return gradient
    nothing: Any = None
    return ScaledArray(nothing, nothing, kernel.format, gradient)


def gradient_of_kernel(call: Call, gradient: jax.Array, operands: Operands) -> jax.Array:
    """Returns gradient.T @ x (out, in), float32, for the gradient (rows, out) of the product and x as it multiplied."""
    rows = oracle.wide_rows(operands.x)
    if not isinstance(operands.x, ScaledArray) and call.weight is not None:
        rows = rows.astype(call.weight)
    if rows.dtype != gradient.dtype:
        rows, gradient = rows.astype(jnp.float32), gradient.astype(jnp.float32)
    return oracle.dot(gradient.T, rows.T)


def transposed(kernel: jax.Array | ScaledArray, format: Format) -> ScaledArray:
    """Returns the transpose (in, out) of a kernel (out, in), quantised for products in `format` if it is not narrow."""
    if not isinstance(kernel, ScaledArray):
        kernel = quantize(kernel, _beside(format).completed(DEFAULT_BLOCK))
    block = kernel.block[1], kernel.block[0]
    scale = kernel.format.scale
    return ScaledArray(_turned(kernel.values), _turned(kernel.scale_inv), Format(kernel.dtype, block, scale))


def _turned(array: jax.Array) -> jax.Array:
    """Returns the transpose of an array with values of a byte, as bits.

    XLA's CPU backend would widen float8, and computes wrong numbers for e8m0 (JAX 0.10).
    """
    if array.dtype.itemsize > 1:
        return array.T
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(array, jnp.uint8).T, array.dtype)


def columns(x: jax.Array, format: Format) -> ScaledArray:
    """Returns the transpose (in, rows) of x (rows, in), quantised along its rows for products in `format`."""
    beside = _beside(format)
    return quantize_rows(x.T, beside.of_rows(beside.values))


def _beside(format: Format) -> Format:
    """Returns the format of what is multiplied with gradients in `format`: e4m3, or the same if it has a name."""
    return format if format.name is not None else Format(E4M3)


def check_backward(format: Format | None) -> None:
    """Raises UnsupportedCast for a format that products of gradients cannot have."""
    if format is None:
        return
    if not format.narrow or format.values.kind == "i" or (format.name is None and format.block is not None):
        raise UnsupportedCast(
            f"backward is None, a float8 type or a named format, found {format}. Write one of these: "
            f"{dtypes.dtype_name(E4M3)}, f8_e5m2, mxfp8."
        )
