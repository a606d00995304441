"""Hopper kernel for groups of rows with a kernel matrix each, as in a mixture of experts: W8A16 and W8A8.

As in `hopper_columns` the operands are swapped, out.T = kernel @ x.T, so that a tile has as few as 8 rows of x, and
kernels are widened in registers.  A table has the group and the first row of each tile of rows; the kernels of all
groups are one matrix (groups * out, in), of which a thread block copies the tiles of that group.  So kernels of groups
without rows are not read.

Thread blocks are persistent: each has as many tiles as the table has, and its pipeline of copies goes on across tiles,
since the kernel of an expert has few columns.  Adjacent thread blocks have the same rows of x and adjacent tiles of the
kernel, and the next tiles of rows mostly the same group, so that the second-level cache has what is read again.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import warpgroup
from .hopper_columns import SCALES, stages, widened_columns
from .hopper_costs import TILE
from .hopper_grouped_tiles import ALIGNMENT, RowTiles
from .shards import vary

MOST_STAGES = 12
"""Steps whose operands are in shared memory at the same time, if it has room for them."""


def scales_of(rows: int, height: int) -> int:
    """Returns for how many rows there are scales, so that the copies for tiles of `height` rows end within them."""
    return rows + max(SCALES - height, 0)


def shares(outs: tuple[int, ...], processors: int) -> list[int]:
    """Returns the first thread block of each kernel, and their number: kernels have blocks in proportion to their rows.

    Each has at least one, of at least as many blocks as there are kernels.

    >>> shares((768, 768), 132), shares((128, 384), 5)
    ([0, 66, 132], [0, 1, 5])
    """
    total, starts = sum(outs), [0]
    for i in range(len(outs)):
        left = len(outs) - 1 - i  # kernels that need a thread block, too
        end = processors * sum(outs[: i + 1]) // total
        starts.append(min(max(end, starts[-1] + 1), processors - left))
    return starts


def products(
    x: jax.Array,
    x_scales: jax.Array | None,
    tiles: RowTiles,
    kernels: tuple[jax.Array, ...],
    scales: tuple[jax.Array, ...],
    *,
    blocks: tuple[tuple[int, int], ...],
    result: np.dtype,
    processors: int,
    interpret: Any = None,
) -> jax.Array:
    """Returns the products (tiles, tile, out of all kernels) of each tile of rows with the kernels of its group.

    x           (rows, in)  bfloat16 or float16, or float8_e4m3fn with scales; a multiple of 8 rows, and at least a tile
    x_scales    (in/128, scales_of(rows, tile))  float32, or None
    tiles       the tiles of these rows: 8, 16, 32, 64 or 128 rows each
    kernels     (groups, out, in) each, float8; out and in multiples of 128
    scales      (groups, out/block[0], in/block[1]) each, float32; both sides of a block multiples of 128
    blocks      the block of each kernel
    processors  streaming multiprocessors, each of which has one persistent thread block; at least one for each kernel

    What no row of a group has, such as tiles that are not used, is undefined.
    """
    height, steps, count = tiles.height, x.shape[1] // TILE, tiles.groups.shape[0]
    groups, outs = kernels[0].shape[0], tuple(kernel.shape[1] for kernel in kernels)
    firsts = shares(outs, processors)
    part_columns = widened_columns(height) if x_scales is None else TILE
    activations = [x] if x_scales is None else [x, x_scales]
    columns = np.cumsum([0, *outs])

    def body(*refs: Any, out_smem: Any) -> None:
        x_gmem, refs = refs[: len(activations)], refs[len(activations) :]
        until_gmem, groups_gmem, starts_gmem, *rest = refs
        kernels_gmem, scales_gmem, out_gmem = rest[: len(kernels)], rest[len(kernels) : -1], rest[-1]
        half, block_index = lax.axis_index("warpgroup"), lax.axis_index("block")
        half_rows = pl.ds(half * warpgroup.ROWS, warpgroup.ROWS)

        def run(j: int) -> None:
            kernel_gmem, scale_gmem, block = kernels_gmem[j], scales_gmem[j], blocks[j]
            blocks_here, across = firsts[j + 1] - firsts[j], outs[j] // TILE
            first = block_index - firsts[j]

            def place(i: Any) -> tuple[Any, Any]:
                """Returns the tile of rows and that of the kernel of this thread block's tile number `i`."""
                tile = i * blocks_here + first
                return lax.div(tile, across), lax.rem(tile, across)

            def step(index: Any, *arguments: Any) -> Any:
                x_smem, *row_scales, kernel_smem, total = arguments
                i, k = index
                m, n = place(i)
                scale = scale_gmem[groups_gmem[m], n * TILE // block[0], k * TILE // block[1]]
                kernel_tile = kernel_smem.at[half_rows]
                if row_scales:
                    partial = warpgroup.product(kernel_tile, x_smem)
                    first_scales = row_scales[0].at[0, pl.ds(0, height)]
                    by_row = warpgroup.load(first_scales, plgpu.Layout.WGMMA.reduce(0)) * scale
                    total += partial * lax.broadcast_in_dim(by_row, partial.shape, [1])
                else:
                    total += warpgroup.product_widened(kernel_tile, x_smem, part_columns) * scale

                def finish() -> jax.Array:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    warpgroup.store_transposed(out_smem.at[half], total.astype(result))
                    plgpu.commit_smem()
                    columns_here = pl.ds(int(columns[j]) + n * TILE + half * warpgroup.ROWS, warpgroup.ROWS)
                    plgpu.copy_smem_to_gmem(out_smem.at[half], out_gmem.at[m, :, columns_here])
                    return warpgroup.zeros(height)

                return lax.cond(k == steps - 1, finish, lambda: total)

            operand = functools.partial(plgpu.BlockSpec, memory_space=plgpu.SMEM)
            x_spec = operand(
                (pl.Element(height), TILE),
                lambda i, k: (starts_gmem[place(i)[0]] * ALIGNMENT, k),
                transforms=warpgroup.tiled(x.dtype, TILE),
            )
            scales_spec = operand(
                (1, pl.Element(max(height, SCALES))), lambda i, k: (k, starts_gmem[place(i)[0]] * ALIGNMENT)
            )
            kernel_spec = operand(
                (TILE, TILE),
                lambda i, k: (groups_gmem[place(i)[0]] * across + place(i)[1], k),
                transforms=warpgroup.tiled(kernel_gmem.dtype, part_columns),
            )
            tiles_here = lax.div(until_gmem[groups - 1] * across - first + blocks_here - 1, blocks_here)
            warpgroup.pipeline(
                step,
                grid=(tiles_here, steps),
                in_specs=[x_spec, *([scales_spec] * (len(activations) - 1)), kernel_spec],
                max_concurrent_steps=stages(MOST_STAGES, height, x.dtype, result),
                compute_context=lambda evaluate: evaluate(warpgroup.zeros(height)),
            )(*x_gmem, kernel_gmem)

        for j in range(len(kernels)):
            if len(kernels) == 1:
                run(j)
            else:
                pl.when((block_index >= firsts[j]) & (block_index < firsts[j + 1]))(functools.partial(run, j))
        plgpu.wait_smem_to_gmem(0)

    launch = warpgroup.kernel(
        body,
        jax.ShapeDtypeStruct((count, height, int(columns[-1])), result),
        grid=(processors,),
        grid_names=("block",),
        scratch_types={
            "out_smem": plgpu.SMEM(
                (2, height, warpgroup.ROWS), result, transforms=warpgroup.tiled(result, warpgroup.ROWS)
            )
        },
        interpret=interpret,
    )
    matrices = (kernel.reshape(-1, kernel.shape[-1]) for kernel in kernels)
    operands = (
        *activations,
        tiles.until,
        tiles.groups,
        tiles.starts,
        *matrices,
        *(scale.astype(jnp.float32) for scale in scales),
    )
    y: jax.Array = vary(launch(*operands), operands)
    return y
