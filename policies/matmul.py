"""The block-scaled matmul: the one place through which every linear layer goes.

This is the formulation in plain jnp, right for every shape, block and mode, which faster ones will be held against.
A narrow kernel is widened inside the compiled program, at the use.  On a CPU that goes slab by slab: XLA's CPU backend
schedules plain `widen -> dot` pairs so that the float copies of all layers are alive together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from . import dtypes
from .blocks import check_grid, dequantize, expand, grid_shape, quantize
from .errors import UnsupportedCast
from .slots import DEFAULT_BLOCK, Block, as_block

SLAB = 256
"""Rows of a kernel that are widened at a time."""

ACTIVATION_BLOCK = 128
"""Columns of a row of activations that share a scale where both operands are narrow (`activation_scheme: dynamic`)."""


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
    x, kernel, scale_inv = jnp.asarray(x), jnp.asarray(kernel), None if scale_inv is None else jnp.asarray(scale_inv)
    compute, block = None if compute is None else dtypes.as_dtype(compute), as_block(block)
    _check(x, kernel, scale_inv, block, compute)
    return _matmul(x, kernel, scale_inv, block, compute)


@functools.partial(jax.jit, static_argnames=("block", "compute"))
def _matmul(
    x: jax.Array, kernel: jax.Array, scale_inv: jax.Array | None, block: Block, compute: np.dtype | None
) -> jax.Array:
    """`scaled_matmul` of operands that fit; compiled, so that a shape is traced once wherever it is called from."""
    result = x.dtype
    # Tied to x, a kernel is nothing that a compiler could cast once, outside a decoding loop, and carry along.
    x, kernel, scale_inv = jax.lax.optimization_barrier((x, kernel, scale_inv))
    narrow = dtypes.is_narrow(kernel.dtype)
    if compute is not None and dtypes.is_narrow(compute):
        x = _straight_through(x.astype(jnp.float32), _rounded(x, compute, (1, ACTIVATION_BLOCK)))
        if not narrow and scale_inv is None:
            kernel = _straight_through(kernel.astype(jnp.float32), _rounded(kernel, compute, block))
    elif compute is not None:
        x = x.astype(compute)
    elif narrow or scale_inv is not None:
        x = x.astype(jnp.float32)
    if narrow:
        if scale_inv is None:
            scale_inv = jnp.ones(grid_shape(kernel.shape, block), jnp.float32)
        return _scaled_dot(x, kernel, scale_inv, block).astype(result)
    weight = kernel if scale_inv is None else dequantize(kernel, scale_inv, block)
    return _dot(x, dtypes.saturating_cast(weight, x.dtype)).astype(result)


def _dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x (..., in) @ weight (out, in).T in float32."""
    # float32 means float32 on every device, where some default to fewer bits.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    axes = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, axes, precision=precision, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scaled_dot(x: jax.Array, kernel: jax.Array, scale_inv: jax.Array, block: Block) -> jax.Array:
    """x (..., in) @ (kernel * scale_inv).T in float32, the weight rounded to x's dtype; the kernel is narrow."""

    def whole(x: jax.Array, kernel: jax.Array, scale_inv: jax.Array) -> jax.Array:
        return _dot(x, dtypes.saturating_cast(dequantize(kernel, scale_inv, block), x.dtype))

    def slabs(x: jax.Array, kernel: jax.Array, scale_inv: jax.Array) -> jax.Array:
        def write(start: jax.Array | int, height: int, y: jax.Array) -> jax.Array:
            part = _dot(x, _slab(kernel, scale_inv, block, start, height, x.dtype))
            return jax.lax.dynamic_update_slice_in_dim(y, part, start, axis=y.ndim - 1)

        rows = kernel.shape[0]
        return _over_slabs(rows, write, jnp.zeros((*x.shape[:-1], rows), jnp.float32))

    return jax.lax.platform_dependent(x, kernel, scale_inv, cpu=slabs, default=whole)


def _scaled_dot_forward(x, kernel, scale_inv, block):
    return _scaled_dot(x, kernel, scale_inv, block), (x[..., :0], kernel, scale_inv)


def _scaled_dot_backward(block, residuals, gradient):
    """dx = gradient @ (kernel * scale_inv).  Narrow kernels and their scales are frozen."""
    like_x, kernel, scale_inv = residuals

    def add(start: jax.Array | int, height: int, dx: jax.Array) -> jax.Array:
        columns = jax.lax.dynamic_slice_in_dim(gradient, start, height, axis=gradient.ndim - 1)
        weight = _slab(kernel, scale_inv, block, start, height, like_x.dtype)
        return dx + _dot(columns, weight.astype(jnp.float32).T)

    rows, features = kernel.shape
    dx = _over_slabs(rows, add, jnp.zeros((*gradient.shape[:-1], features), jnp.float32))
    return dx.astype(like_x.dtype), None, None


_scaled_dot.defvjp(_scaled_dot_forward, _scaled_dot_backward)


def _over_slabs(rows: int, step: Callable[[jax.Array | int, int, jax.Array], jax.Array], carry: jax.Array) -> jax.Array:
    """`carry` after `step(start, height, carry)` over all rows of a kernel, SLAB at a time."""
    whole = rows // SLAB
    if whole:
        carry = jax.lax.fori_loop(0, whole, lambda i, carry: step(i * SLAB, SLAB, carry), carry)
    return step(whole * SLAB, rows % SLAB, carry) if rows % SLAB else carry


def _slab(
    kernel: jax.Array, scale_inv: jax.Array, block: Block, start: jax.Array | int, height: int, dtype: np.dtype
) -> jax.Array:
    """`height` rows of the weight from `start` on, in `dtype`."""
    # Sliced as bytes, and tied to the loop's index: XLA converts a float8 array that a loop slices as a whole, before
    # the loop, and copies one that it can reinterpret there.
    kernel, start = jax.lax.optimization_barrier((kernel, start))
    rows = jax.lax.dynamic_slice_in_dim(jax.lax.bitcast_convert_type(kernel, jnp.uint8), start, height)
    values = jax.lax.bitcast_convert_type(rows, kernel.dtype).astype(jnp.float32)
    scales = jnp.take(scale_inv.astype(jnp.float32), (start + jnp.arange(height)) // block[0], axis=0)
    return dtypes.saturating_cast(values * expand(scales, values.shape, (1, block[1])), dtype)


def _rounded(values: jax.Array, dtype: np.dtype, block: Block) -> jax.Array:
    """`values` (..., columns) quantised to `dtype` in blocks of its rows and back, in float32."""
    rows = jax.lax.stop_gradient(values).reshape(math.prod(values.shape[:-1]), values.shape[-1])
    return dequantize(*quantize(rows, dtype, block), block).reshape(values.shape)


@jax.custom_vjp
def _straight_through(exact: jax.Array, rounded: jax.Array) -> jax.Array:
    """`rounded`, with the gradient of `exact`: what rounding throws away has no slope, yet training needs one."""
    return rounded


_straight_through.defvjp(lambda exact, rounded: (rounded, None), lambda _, gradient: (gradient, None))


def _check(
    x: jax.Array, kernel: jax.Array, scale_inv: ArrayLike | None, block: Block, compute: np.dtype | None
) -> None:
    if not dtypes.is_activation(x.dtype):
        raise UnsupportedCast(f"activations are f32, bf16 or f16, found {x.dtype}. Cast x first.")
    if x.ndim < 1 or kernel.ndim != 2 or x.shape[-1] != kernel.shape[1]:
        raise UnsupportedCast(
            f"x of shape {x.shape} and a kernel of shape {kernel.shape} do not meet: "
            "expected (..., in) and (out, in), the kernel as checkpoints store it."
        )
    if not dtypes.is_floating(kernel.dtype) and (scale_inv is None or not dtypes.is_narrow(kernel.dtype)):
        raise UnsupportedCast(f"a kernel is a float, or int8 with scales, found {kernel.dtype}.")
    if (
        compute is not None
        and not dtypes.is_activation(compute)
        and (compute.kind == "i" or not dtypes.is_narrow(compute))
    ):
        raise UnsupportedCast(f"compute is None, f32, bf16, f16 or a float8 type, found {dtypes.dtype_name(compute)}.")
    if scale_inv is not None:
        check_grid(kernel.shape, jnp.shape(scale_inv), block)
