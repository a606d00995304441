"""Quantisation block by block, in plain jnp: the oracle that every faster implementation is held against.

Invariants, for a weight `w` of any shape, its last two axes cut into blocks that may be ragged at the edges:

- `scale_inv = amax(block) / largest(dtype)` in float32, at least the smallest normal float32; 1 for an all-zero block;
- `kernel = w / scale_inv`, divided correctly rounded, rounded half to even into `dtype`, saturating;
- `kernel * scale_inv` in float32 is the weight: despite its published name the scale is a multiplier.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from . import dtypes
from .errors import InvalidScale, UnsupportedCast
from .slots import DEFAULT_BLOCK, Block, as_block


def grid_shape(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """The shape of the scales of an array of `shape`: leading axes as they are, `ceil(dim / block)` of the last two.

    >>> grid_shape((8, 576, 200), (128, 128))
    (8, 5, 2)
    """
    if len(shape) < 2:
        raise InvalidScale(
            f"blocks lie over two axes, found the shape {shape}. Only parameters of two or more dimensions are narrow."
        )
    return (*shape[:-2], *(math.ceil(dim / side) for dim, side in zip(shape[-2:], block, strict=True)))


def check_grid(shape: tuple[int, ...], grid: tuple[int, ...], block: Block, where: str = "scale_inv") -> None:
    """Raises InvalidScale unless scales of shape `grid` fit a kernel of `shape` in blocks of `block`."""
    expected = grid_shape(shape, block)
    if tuple(grid) != expected:
        raise InvalidScale(
            f"{where}: scales of shape {tuple(grid)} do not fit a kernel of shape {tuple(shape)} in blocks of "
            f"{tuple(block)}, expected {expected}. Name the block the kernel was quantised with."
        )


def expand(scale_inv: jax.Array, shape: tuple[int, ...], block: Block) -> jax.Array:
    """The scale of every element: `scale_inv` repeated over its blocks and cut to `shape`."""
    for axis, side in ((-2, block[0]), (-1, block[1])):
        if scale_inv.shape[axis] != 1:  # repeated, not gathered: XLA fuses a repetition without an index an element
            scale_inv = jax.lax.slice_in_dim(jnp.repeat(scale_inv, side, axis), 0, shape[axis], axis=axis)
    return jnp.broadcast_to(scale_inv, shape)


def split_blocks(values: jax.Array, block: Block) -> jax.Array:
    """`values` (..., rows, columns) cut into blocks, `(..., down, height, across, width)`, edges filled with zeros."""
    rows, columns = values.shape[-2:]
    height, width = min(block[0], max(rows, 1)), min(block[1], max(columns, 1))
    *leading, down, across = grid_shape(values.shape, (height, width))
    padding = [(0, 0)] * len(leading) + [(0, down * height - rows), (0, across * width - columns)]
    return jnp.pad(values, padding).reshape(*leading, down, height, across, width)


def block_amax(weight: jax.Array, block: Block) -> jax.Array:
    """The largest magnitude of each block, or NaN, float32 `(..., ceil(rows/block[0]), ceil(columns/block[1]))`."""
    blocks = split_blocks(jnp.abs(weight.astype(jnp.float32)), block)
    # XLA's maximum over several axes loses NaN on a CPU.
    return jnp.where(jnp.isnan(blocks).any(axis=(-3, -1)), jnp.nan, blocks.max(axis=(-3, -1), initial=0.0))


@functools.partial(jax.jit, static_argnames=("dtype", "block", "scale_dtype"))
def _quantize(weight: jax.Array, dtype: np.dtype, block: Block, scale_dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    amax = block_amax(weight, block)
    # XLA on the CPU turns a division by anything constant along its inner loop into a product with the reciprocal,
    # which is an ulp off in half of all cases.  Behind a barrier the divisor is an array of its own, and the quotient
    # correctly rounded, with and without jit.
    divisor = jax.lax.optimization_barrier(jnp.where(amax < 0, 1.0, jnp.float32(dtypes.largest(dtype))))
    floor = max(dtypes.smallest_normal(np.float32), dtypes.smallest_normal(scale_dtype))
    scale_inv = jnp.where(amax == 0, 1.0, jnp.maximum(amax / divisor, floor))
    scale_inv = dtypes.saturating_cast(scale_inv, scale_dtype)
    divisors = jax.lax.optimization_barrier(expand(scale_inv.astype(jnp.float32), weight.shape, block))
    return dtypes.saturating_cast(weight / divisors, dtype), scale_inv


def quantize(
    weight: ArrayLike, dtype: DTypeLike, block: Block = DEFAULT_BLOCK, *, scale_dtype: DTypeLike = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """The scaled pair `(kernel, scale_inv)` whose product, block by block, is nearest to `weight`.

    weight     (..., rows, columns)  floating point
    kernel     (..., rows, columns)  dtype: one of the float8 types or int8
    scale_inv  (..., ceil(rows/block[0]), ceil(columns/block[1]))  scale_dtype: f32, bf16 or f16

    A scale that is to be stored rounded is rounded before the kernel is quantised with it.  The elementwise error of
    e4m3fn is at most `max(|w| * 2**-4, scale_inv * 2**-10)`.

    >>> kernel, scale_inv = quantize(jnp.array([[448.0, 1.0], [0.0, -896.0]]), "f8_e4m3fn", (1, 2))
    >>> kernel.astype("float32").tolist(), scale_inv.tolist()
    ([[448.0, 1.0], [0.0, -448.0]], [[1.0], [2.0]])

    Raises:
      UnsupportedCast: where `weight` is not floating point or `dtype` is not narrow.
      InvalidScale: where `weight` has fewer than two dimensions.
    """
    dtype, scale_dtype, block = dtypes.as_dtype(dtype), dtypes.as_dtype(scale_dtype), as_block(block)
    weight = jnp.asarray(weight)
    if not dtypes.is_narrow(dtype):
        raise UnsupportedCast(
            f"{dtypes.dtype_name(dtype)} needs no scales. Narrow types are f8_e4m3fn, f8_e5m2, …, int8."
        )
    if not dtypes.is_activation(scale_dtype):
        raise UnsupportedCast(f"scales are f32, bf16 or f16, not {dtypes.dtype_name(scale_dtype)}.")
    if not dtypes.is_floating(weight.dtype) or dtypes.is_narrow(weight.dtype):
        raise UnsupportedCast(f"a {weight.dtype} array cannot be quantised. Give f32, bf16 or f16 weights.")
    grid_shape(weight.shape, block)
    return _quantize(dtypes.saturating_cast(weight, np.float32), dtype, block, scale_dtype)


def dequantize(
    kernel: ArrayLike, scale_inv: ArrayLike, block: Block = DEFAULT_BLOCK, dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """The weight of a scaled pair: `kernel * scale_inv` in float32, then cast to `dtype`, saturating.

    kernel     (..., rows, columns)
    scale_inv  (..., ceil(rows/block[0]), ceil(columns/block[1]))

    >>> dequantize(jnp.ones((1, 3), "float8_e4m3fn"), jnp.array([[2.0, 3.0]]), (1, 2)).tolist()
    [[2.0, 2.0, 3.0]]

    Raises:
      InvalidScale: where the grid of scales does not fit.
    """
    kernel, scale_inv, block = jnp.asarray(kernel), jnp.asarray(scale_inv), as_block(block)
    check_grid(kernel.shape, scale_inv.shape, block)
    return _dequantize(kernel, scale_inv, block, dtypes.as_dtype(dtype))


@functools.partial(jax.jit, static_argnames=("block", "dtype"))
def _dequantize(kernel: jax.Array, scale_inv: jax.Array, block: Block, dtype: np.dtype) -> jax.Array:
    weight = kernel.astype(jnp.float32) * expand(scale_inv.astype(jnp.float32), kernel.shape, block)
    return dtypes.saturating_cast(weight, dtype)
