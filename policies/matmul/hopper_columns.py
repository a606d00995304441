"""Hopper kernel with swapped operands, out.T = kernel @ x.T, for few rows (decoding) and for W8A16.

The kernel matrix is the left operand of the matrix instruction, which has 64 rows, and x the right operand, which may
have as few as 8: a step reads 16 KiB of the kernel and as little as 1 KiB of x.  In W8A16, kernels are widened exactly
to the dtype of x in registers.  Sums of 128 columns are scaled and added in float32.  If the kernels have fewer tiles
than the GPU has multiprocessors, their columns are split among thread blocks, and the partial sums are added in a fixed
order: the result is deterministic.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import warpgroup
from .hopper_costs import TILE, row_tile, splits
from .shards import vary

SHARED_MEMORY = 226 * 1024
"""Bytes of shared memory for operands and results: a thread block has 227 KiB, of which barriers need a small part."""

SCALES = 32
"""Minimum number of activation scales in a copy to shared memory: the slots of a pipeline are adjacent, and each must
start at a multiple of 128 bytes."""


def stages(length: int, tile: int, x: np.dtype, out: np.dtype) -> int:
    """Returns the number of steps whose operands are in shared memory at the same time, at most `length`."""
    result = 2 * tile * warpgroup.ROWS * out.itemsize
    step = TILE * TILE + tile * TILE * x.itemsize + 4 * max(tile, SCALES)
    return min(length, (SHARED_MEMORY - result) // step, 12)


def widened_columns(tile: int) -> int:
    """Returns the number of columns of a kernel that are widened at the same time, for `tile` rows of x.

    With 128 rows the sums of a thread occupy 128 registers, and all widened columns another 32; together with addresses
    they would be more than the 168 of a thread.
    """
    return TILE // 2 if tile > 64 else TILE


def products(
    x: jax.Array,
    x_scales: jax.Array | None,
    kernels: tuple[jax.Array, ...],
    scales: tuple[jax.Array, ...],
    *,
    blocks: tuple[tuple[int, int], ...],
    result: np.dtype,
    processors: int,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """Returns the product (rows, out) in dtype `result` for each kernel: the `sums` of one launch, added."""
    partial = sums(
        x, x_scales, kernels, scales, blocks=blocks, result=result, processors=processors, interpret=interpret
    )
    total = partial[0] if partial.shape[0] == 1 else partial.sum(axis=0).astype(result)
    cuts = itertools.accumulate((kernel.shape[0] for kernel in kernels), initial=0)
    return tuple(total[:, start:end] for start, end in itertools.pairwise(cuts))


def sums(
    x: jax.Array,
    x_scales: jax.Array | None,
    kernels: tuple[jax.Array, ...],
    scales: tuple[jax.Array, ...],
    *,
    blocks: tuple[tuple[int, int], ...],
    result: np.dtype,
    processors: int,
    interpret: Any = None,
) -> jax.Array:
    """Returns the sums (parts, rows, out of all kernels) of one launch, of which the products are the sum over parts.

    They are float32, or in dtype `result` if there is one part.

    x         (rows, in)      bfloat16 or float16, or float8_e4m3fn with scales; rows are `row_tile(rows)`, or more than
                              128 and a multiple of 8
    x_scales  (in/128, max(rows, SCALES))  float32, or None
    kernels   (out, in) each  float8; out and in multiples of 128
    scales    (out/block[0], in/block[1]) each, float32; both sides of a block multiples of 128
    blocks    the block of each kernel
    processors  streaming multiprocessors of the GPU

    The last tile of rows may reach beyond x: tensor copies read zeros there, and write nothing.
    """
    rows, columns = x.shape
    tile, steps = row_tile(rows), columns // TILE
    row_tiles = pl.cdiv(rows, tile)
    starts = np.cumsum([0, *(kernel.shape[0] // TILE for kernel in kernels)])
    parts = splits(int(starts[-1]) * row_tiles, steps, tile, processors)
    length = steps // parts
    part_columns = widened_columns(tile) if x_scales is None else TILE
    out = result if parts == 1 else np.dtype(np.float32)
    activations = [x] if x_scales is None else [x, x_scales]

    def body(*refs: Any, out_smem: Any) -> None:
        x_gmem, refs = refs[: len(activations)], refs[len(activations) :]
        kernels_gmem, scales_gmem, out_gmem = refs[: len(kernels)], refs[len(kernels) : -1], refs[-1]
        n, m, part = lax.axis_index("kernel_tile"), lax.axis_index("row_tile"), lax.axis_index("split")
        half = lax.axis_index("warpgroup")
        half_rows = pl.ds(half * warpgroup.ROWS, warpgroup.ROWS)

        def run(kernel_gmem: Any, scale_gmem: Any, block: tuple[int, int], local: Any) -> None:
            def step(index: Any, *arguments: Any) -> jax.Array:
                x_smem, *row_scales, kernel_smem, total = arguments
                k = part * length + index[0]
                scale = scale_gmem[local * TILE // block[0], k * TILE // block[1]]
                kernel_tile = kernel_smem.at[half_rows]
                term: jax.Array
                if row_scales:
                    partial = warpgroup.product(kernel_tile, x_smem)
                    first = row_scales[0].at[0, pl.ds(0, tile)]
                    by_row = warpgroup.load(first, plgpu.Layout.WGMMA.reduce(0)) * scale
                    term = partial * lax.broadcast_in_dim(by_row, partial.shape, [1])
                else:
                    term = warpgroup.product_widened(kernel_tile, x_smem, part_columns) * scale
                new_total: jax.Array = total + term
                return new_total

            def context(evaluate: Any) -> None:
                total = evaluate(warpgroup.zeros(tile))
                warpgroup.store_transposed(out_smem.at[half], total.astype(out))
                plgpu.commit_smem()
                columns_here = pl.ds(n * TILE + half * warpgroup.ROWS, warpgroup.ROWS)
                plgpu.copy_smem_to_gmem(out_smem.at[half], out_gmem.at[part, pl.ds(m * tile, tile), columns_here])
                plgpu.wait_smem_to_gmem(0)

            operand = functools.partial(plgpu.BlockSpec, memory_space=plgpu.SMEM)
            x_spec = operand((tile, TILE), lambda k: (m, part * length + k), transforms=warpgroup.tiled(x.dtype, TILE))
            scales_spec = operand((1, max(tile, SCALES)), lambda k: (part * length + k, m))
            kernel_spec = operand(
                (TILE, TILE),
                lambda k: (local, part * length + k),
                transforms=warpgroup.tiled(kernel_gmem.dtype, part_columns),
            )
            specs = [x_spec, *([scales_spec] * (len(activations) - 1)), kernel_spec]
            warpgroup.pipeline(
                step,
                grid=(length,),
                in_specs=specs,
                max_concurrent_steps=stages(length, tile, x.dtype, out),
                compute_context=context,
            )(*x_gmem, kernel_gmem)

        for i in range(len(kernels)):
            run_kernel = functools.partial(run, kernels_gmem[i], scales_gmem[i], blocks[i], n - int(starts[i]))
            if len(kernels) == 1:
                run_kernel()
            else:
                pl.when((n >= starts[i]) & (n < starts[i + 1]))(run_kernel)

    width = int(starts[-1]) * TILE
    launch = warpgroup.kernel(
        body,
        jax.ShapeDtypeStruct((parts, rows, width), out),
        grid=(int(starts[-1]), row_tiles, parts),
        grid_names=("kernel_tile", "row_tile", "split"),
        scratch_types={
            "out_smem": plgpu.SMEM((2, tile, warpgroup.ROWS), out, transforms=warpgroup.tiled(out, warpgroup.ROWS))
        },
        interpret=interpret,
    )
    operands = *activations, *kernels, *(scale.astype(jnp.float32) for scale in scales)
    partial: jax.Array = vary(launch(*operands), operands)
    return partial
