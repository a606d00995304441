"""Hopper kernel that adds a product to the residual stream of few rows, and normalises the result.

A thread block has a whole row, whose mean square it needs.  It reads about 64 KiB of sums, in a narrow model as in a
wide one, since the columns of narrow products are split in more parts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...policies.matmul import warpgroup
from ...policies.matmul.hopper_quantize import COLUMNS
from ...policies.matmul.shards import vary
from . import tiles
from .reference import Operand

WARPGROUPS = 7
"""Limit of the warpgroups of a thread block: with 8, a thread would have only 64 registers."""

REGISTERS, OTHERS = 65536 // 128, 40
"""Registers of a multiprocessor for each thread of a warpgroup, and those of a thread that are not for terms."""

TOGETHER = 16
"""Limit of the terms of products that a thread reads at once, with 4 registers each."""


def division(count: int) -> tuple[int, int, int]:
    """Returns how `count` tiles are divided: the number of warpgroups, tiles of each, and parts that are read at once.

    >>> [division(count) for count in (2, 7, 8, 10, 11)]
    [(2, 1, 16), (7, 1, 8), (4, 2, 8), (5, 2, 7), (6, 2, 5)]
    """
    each = pl.cdiv(count, WARPGROUPS)
    groups = pl.cdiv(count, each)
    terms = min(TOGETHER, (REGISTERS // groups - OTHERS) // 4)
    return groups, each, max(1, terms // each)


def add_and_norm(
    stream: jax.Array, sums: jax.Array | None, scale: jax.Array, *, eps: float, narrow: bool, interpret: Any = None
) -> tuple[jax.Array, Operand]:
    """`(stream, operand)`: the stream with a product added, and its norm: `reference.add_and_norm` in one launch.

    stream  (rows, hidden)         bf16 or f16; rows are a multiple of 4, hidden of 128
    sums    (parts, rows, hidden)  float32, or one part in stream's dtype; None adds nothing
    scale   (hidden,)              of the norm, in stream's dtype
    narrow  whether the norm is quantised

    Parts are added in their order, squares in a fixed one.  The square root is PTX's `rsqrt.approx.f32`, at most 2 ulp
    off; quotients of the quantisation are those of `hopper_quantize`.

    A tile is four blocks of columns of a row; if a row has no multiple of four blocks, a tile is a block of columns of
    four rows, and so has a thread block.
    """
    rows, hidden = stream.shape
    blocks, dtype = hidden // COLUMNS, stream.dtype
    is_wide = blocks % tiles.WARPS == 0
    count = blocks // tiles.WARPS if is_wide else blocks
    groups, each, together = division(count)

    def body(*refs: Any, squares_smem: Any, ready: Any) -> None:
        stream_gmem, scale_gmem, *rest = refs
        sums_gmem, added_gmem, *operand_gmem = (None, None, *rest) if sums is None else rest
        group, index = lax.axis_index("warpgroup"), lax.axis_index("row_tile")
        # The last warpgroup may have the last tile several times: it computes and writes the same.
        numbers = [jnp.minimum(group * each + i, count - 1) for i in range(each)]
        if is_wide:
            places = [tiles.wide_place(index, number * tiles.WARPS) for number in numbers]
        else:
            places = [tiles.tall_place(index * tiles.WARPS, number) for number in numbers]

        # All is read before anything is computed.
        here = [tiles.load(stream_gmem.at[place]) for place in places]
        terms = [] if sums is None else [tiles.terms(sums_gmem, place, together) for place in places]
        scales = [_scale(scale_gmem.at[block], is_wide) for _, block in places]
        for place in places:
            tiles.pad_scales(operand_gmem, place)
        if sums is not None:
            products = [tiles.product(of_tile, dtype) for of_tile in terms]
            here = [tiles.rounded(tile + added, dtype) for tile, added in zip(here, products, strict=True)]
        for number, squares in zip(numbers, [jnp.sum(tile * tile, axis=1) for tile in here], strict=True):
            squares_smem[number] = squares
        plgpu.barrier_arrive(ready)
        plgpu.barrier_wait(ready)
        if is_wide:
            mean = _sum([squares_smem[i, j] for i in range(count) for j in range(tiles.WARPS)]) * np.float32(1 / hidden)
            inverse = lax.rsqrt(mean + np.float32(eps))
        else:
            of_tiles = [warpgroup.load(squares_smem.at[i], tiles.LAYOUT.reduce(1)) for i in range(count)]
            inverse = lax.rsqrt(_sum(of_tiles) * np.float32(1 / hidden) + np.float32(eps))
            inverse = lax.broadcast_in_dim(inverse, tiles.TILE, [0])
        normalised = [tiles.rounded(tile * inverse, dtype) for tile in here]
        scaled = [tiles.rounded(tile * factor, dtype) for tile, factor in zip(normalised, scales, strict=True)]
        tiles.store_operand(operand_gmem, places, scaled)
        if added_gmem is not None:
            for place, tile in zip(places, here, strict=True):
                added_gmem[place] = tile.astype(dtype)

    results = tiles.operand_types(rows, hidden, dtype, narrow=narrow)
    if sums is not None:
        results.insert(0, jax.ShapeDtypeStruct((rows, blocks, COLUMNS), dtype))
    settings = {} if interpret is None else {"interpret": interpret}
    run = plgpu.kernel(
        body,
        out_type=tuple(results),
        grid=(rows if is_wide else rows // tiles.WARPS,),
        grid_names=("row_tile",),
        num_threads=groups,
        thread_name="warpgroup",
        scratch_types={
            "squares_smem": plgpu.SMEM((count, tiles.WARPS), jnp.float32),
            "ready": plgpu.Barrier(num_arrivals=groups),
        },
        compiler_params=tiles.PARAMETERS,
        **settings,
    )
    operands = [stream, scale] if sums is None else [stream, scale, sums]
    found = list(vary(run(*map(tiles.blocked, operands)), operands))
    new = stream if sums is None else found.pop(0).reshape(rows, hidden)
    return new, (found[0].reshape(rows, hidden), found[1] if narrow else None)


def _scale(ref: Any, is_wide: bool) -> jax.Array:
    """Returns the scale of the norm for a tile, of four blocks (4, 128) or of one (128,)."""
    if is_wide:
        return tiles.load(ref)
    return lax.broadcast_in_dim(tiles.load(ref, tiles.LAYOUT.reduce(0)), tiles.TILE, [1])


def _sum(values: list[Any]) -> Any:
    """Returns the sum of values: that of the first half plus that of the second."""
    half = len(values) // 2
    return _sum(values[:half]) + _sum(values[half:]) if half else values[0]
