"""The block-scaled matmul: the one place through which every linear layer goes.

This is the formulation in plain jnp, right for every shape, block and mode, which faster ones will be held against.
It widens a narrow kernel to float32 inside the compiled program, at the use.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from . import dtypes
from .blocks import check_grid, dequantize, quantize
from .errors import UnsupportedCast
from .policy import DEFAULT_BLOCK, Block

ACTIVATION_BLOCK = 128
"""Columns of the activations that share a scale where both operands are narrow: what `activation_scheme: dynamic` means."""


def scaled_matmul(
    x: ArrayLike,
    kernel: ArrayLike,
    scale_inv: ArrayLike | None = None,
    *,
    block: Block = DEFAULT_BLOCK,
    compute: DTypeLike | None = None,
) -> jax.Array:
    """`x @ (kernel * scale_inv).T` in x's dtype, accumulated in float32.

    x          (..., in)   f32, bf16 or f16
    kernel     (out, in)   any float, or int8 with scales; (out, in) as checkpoints store it
    scale_inv  (ceil(out/block[0]), ceil(in/block[1]))  what each block is multiplied by; None is the identity
    result     (..., out)  x's dtype

    compute says which dtypes meet in the matmul:

    None             a narrow kernel as stored, scaled in float32, with activations as they are (W8A16); a plain kernel
                     in x's dtype
    a float8 type    both narrow (W8A8): each row of x quantised per 128 columns as it comes, a plain kernel by `block`
    f32, bf16, f16   the weight and x cast to it

    >>> kernel, scale_inv = quantize(jnp.eye(3) * 2, "f8_e4m3fn", (2, 2))
    >>> scaled_matmul(jnp.ones((1, 3)), kernel, scale_inv, block=(2, 2)).tolist()
    [[2.0, 2.0, 2.0]]

    Raises:
      InvalidScale: where the grid of scales does not fit the kernel.
      UnsupportedCast: where shapes or dtypes cannot be multiplied.
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    compute = None if compute is None else dtypes.as_dtype(compute)
    _check(x, kernel, scale_inv, block, compute)
    result = x.dtype
    if compute is not None and dtypes.is_narrow(compute):
        if scale_inv is None and not dtypes.is_narrow(kernel.dtype):
            kernel, scale_inv = quantize(kernel, compute, block)
        x, kernel = _quantized_rows(x, compute), _widened(kernel, scale_inv, block)
    elif compute is not None:
        x, kernel = x.astype(compute), dtypes.saturating_cast(_widened(kernel, scale_inv, block), compute)
    elif scale_inv is not None or dtypes.is_narrow(kernel.dtype):
        x, kernel = x.astype(jnp.float32), _widened(kernel, scale_inv, block)
    else:
        kernel = dtypes.saturating_cast(kernel, x.dtype)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None  # f32 means f32, on every device
    product = jax.lax.dot_general(
        x, kernel, (((x.ndim - 1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
    return product.astype(result)


def _widened(kernel: jax.Array, scale_inv: ArrayLike | None, block: Block) -> jax.Array:
    """The weight in float32."""
    return kernel.astype(jnp.float32) if scale_inv is None else dequantize(kernel, scale_inv, block)


def _quantized_rows(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """x rounded to `dtype` with a scale per row and 128 columns, in float32: the product of payload and scale."""
    rows = x.reshape(-1, x.shape[-1])
    payload, scale = quantize(rows, dtype, (1, ACTIVATION_BLOCK))
    return dequantize(payload, scale, (1, ACTIVATION_BLOCK)).reshape(x.shape)


def _check(x: jax.Array, kernel: jax.Array, scale_inv: ArrayLike | None, block: Block, compute: np.dtype | None) -> None:
    if not dtypes.is_activation(x.dtype):
        raise UnsupportedCast(f"activations are f32, bf16 or f16, found {x.dtype}. Cast x first.")
    if x.ndim < 1 or kernel.ndim != 2 or x.shape[-1] != kernel.shape[1]:
        raise UnsupportedCast(
            f"x of shape {x.shape} and a kernel of shape {kernel.shape} do not meet: "
            "expected (..., in) and (out, in), the kernel as checkpoints store it."
        )
    if not dtypes.is_floating(kernel.dtype) and (scale_inv is None or not dtypes.is_narrow(kernel.dtype)):
        raise UnsupportedCast(f"a kernel is a float, or int8 with scales, found {kernel.dtype}.")
    if compute is not None and not dtypes.is_activation(compute) and (compute.kind == "i" or not dtypes.is_narrow(compute)):
        raise UnsupportedCast(f"compute is None, f32, bf16, f16 or a float8 type, found {dtypes.dtype_name(compute)}.")
    if scale_inv is not None:
        check_grid(kernel.shape, jnp.shape(scale_inv), block)
