"""Blocks: the division of the last two axes of an array into rectangles that share one scale."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from .errors import InvalidPolicy, InvalidScale

if TYPE_CHECKING:
    from jaxtyping import Array, Float

Block = tuple[int, int]
"""(rows, columns) that share one scale; -1 is the whole axis."""

DEFAULT_BLOCK: Block = (128, 128)
"""The default block for quantisation, which published FP8 checkpoints use."""


def as_block(block: Any) -> Block:
    """Returns `block` as two Python integers.

    Raises:
      InvalidPolicy: unless `block` is two integers, each positive and below 2**31, or -1.
    """
    try:
        rows, columns = (operator.index(side) for side in block)
    except (TypeError, ValueError):
        rows = columns = 0
    if not all(0 < side < 2**31 or side == -1 for side in (rows, columns)) or any(
        isinstance(side, bool) for side in block
    ):
        raise InvalidPolicy(
            f"block: expected two positive integers such as [128, 128], found {block!r}. Write -1 for a whole axis."
        )
    return rows, columns


def block_sides(block: Block, shape: tuple[int, ...]) -> Block:
    """Returns `block` for an array of `shape` with -1 replaced by the length of the axis.

    >>> block_sides((1, -1), (8, 576))
    (1, 576)
    """
    rows, columns = (max(dim, 1) if side == -1 else side for side, dim in zip(block, shape[-2:], strict=True))
    return rows, columns


def grid_shape(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """Returns the shape of the scales of an array: leading axes unchanged, then `ceil(dim / block)` of the last two.

    >>> grid_shape((8, 576, 200), (128, 128))
    (8, 5, 2)

    Raises:
      InvalidScale: for a shape of fewer than two dimensions.
    """
    if len(shape) < 2:
        raise InvalidScale(
            f"blocks need two or more dimensions, found the shape {shape}. Use a wide dtype such as f32 or bf16."
        )
    sides = block_sides(block, shape)
    return (*shape[:-2], *(-(-dim // side) for dim, side in zip(shape[-2:], sides, strict=True)))


def check_grid(shape: tuple[int, ...], grid: tuple[int, ...], block: Block, where: str = "scale_inv") -> None:
    """Raises InvalidScale unless scales of shape `grid` fit an array of `shape` in blocks of size `block`."""
    expected = grid_shape(shape, block)
    if tuple(grid) != expected:
        raise InvalidScale(
            f"{where}: scales of shape {tuple(grid)} do not fit a kernel of shape {tuple(shape)} in blocks of "
            f"{tuple(block)}, expected {expected}. Name the block the kernel was quantised with. "
            "A ScaledArray includes its block."
        )


def expand(scales: Float[Array, "*batch down across"], shape: tuple[int, ...], block: Block) -> jax.Array:
    """Returns `scales` broadcast to one scale for each element of an array of `shape`."""
    for axis, side in zip((-2, -1), block_sides(block, shape), strict=True):
        if scales.shape[axis] != 1:  # `repeat`, not a gather: XLA fuses it without an index for each element
            scales = jax.lax.slice_in_dim(jnp.repeat(scales, side, axis), 0, shape[axis], axis=axis)
    return jnp.broadcast_to(scales, shape)


def split_blocks(values: Float[Array, "*batch rows columns"], block: Block) -> jax.Array:
    """Returns `values` reshaped into blocks, (*batch, down, height, across, width), with ragged edges zero-padded."""
    rows, columns = values.shape[-2:]
    sides = block_sides(block, values.shape)
    height, width = min(sides[0], max(rows, 1)), min(sides[1], max(columns, 1))
    *leading, down, across = grid_shape(values.shape, (height, width))
    padding = [(0, 0)] * len(leading) + [(0, down * height - rows), (0, across * width - columns)]
    return jnp.pad(values, padding).reshape(*leading, down, height, across, width)


def block_amax(values: Float[Array, "*batch rows columns"], block: Block) -> Float[Array, "*batch down across"]:
    """Returns the largest magnitude of each block in float32; NaN for a block that contains NaN."""
    blocks = split_blocks(jnp.abs(values.astype(jnp.float32)), block)
    # On CPUs XLA's maximum over several axes does not propagate NaN.
    return jnp.where(jnp.isnan(blocks).any(axis=(-3, -1)), jnp.nan, blocks.max(axis=(-3, -1), initial=0.0))
