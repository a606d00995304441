"""Hopper kernel for many rows with both operands in e4m3 (W8A8, prefill): tiles of 128 rows of x by 128 of the kernel.

After DeepSeek-V3 (arXiv:2412.19437, section 3.3): float8 tensor cores have sums of about 14 bits, so each sum of 128
columns starts at zero and is scaled and added to a float32 sum in registers.  Thread blocks are persistent and process
the tiles in a snake-like order, so that adjacent blocks share operands in the second-level cache.  Their pipeline of
copies goes on across tiles: the first operands of a tile are copied while the tile before it is computed and stored.

Two thread blocks are a cluster: they process two tiles of rows with the same tiles of the kernel, of which each copies
one half to the shared memory of both (multicast), so that a block reads three quarters of the bytes.  A slot is filled
again when both blocks have released it.  If the number of tiles of rows is odd, the last one has a partner beyond x.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import warpgroup
from .shards import vary

TILE = 128
"""Rows of x and of the kernel in a tile, and columns of a step."""

STAGES = 4
"""Steps whose operands are in shared memory at the same time, 32.5 KiB each."""

SNAKE = 8
"""Tiles of the kernel that are processed before the next rows of x, if they divide its number of tiles.

Else as many as divide both: for a narrower last strip LLVM divides by a variable, which JAX 0.12 compiles to a call of
a function, and because of this ptxas waits after every matrix instruction (C7509).
"""


def cluster_size(tiles: tuple[int, int], processors: int) -> int:
    """Returns how many thread blocks share a tile of the kernel: 2, or 1 where this costs less.

    tiles       of rows of x, and of the kernel
    processors  streaming multiprocessors

    The cost is the number of tiles that a block processes times the bytes that it reads for each, in halves of a tile.
    """

    def cost(blocks: int) -> int:
        return pl.cdiv(pl.cdiv(tiles[0], blocks) * tiles[1], processors // blocks) * (2 + 2 // blocks)

    return 2 if min(tiles[0], processors) > 1 and cost(2) <= cost(1) else 1


def product(
    x: jax.Array,
    x_scales: jax.Array,
    kernel: jax.Array,
    scale_inv: jax.Array,
    *,
    block: tuple[int, int],
    result: np.dtype,
    processors: int,
    interpret: Any = None,
) -> jax.Array:
    """Returns the product (rows, out) in dtype `result`.

    x           (rows, in)                   float8_e4m3fn; at least 128 rows, a multiple of 8
    x_scales    (in/128, rows)               float32, transposed so that the scales of a tile are contiguous
    kernel      (out, in)                    float8_e4m3fn; both sides are multiples of 128
    scale_inv   (out/block[0], in/block[1])  float32; both sides of a block are multiples of 128
    processors  streaming multiprocessors, each of which has one persistent thread block

    The last tile of rows may reach or lie beyond x: tensor copies read zeros there, and write nothing.
    """
    rows, columns = x.shape
    tiles, steps = (pl.cdiv(rows, TILE), kernel.shape[0] // TILE), columns // TILE
    blocks = cluster_size(tiles, processors)
    tiles = pl.cdiv(tiles[0], blocks), tiles[1]  # from here on those of a cluster
    clusters = min(processors // blocks, tiles[0] * tiles[1])
    strip = math.gcd(SNAKE, tiles[1])

    def body(
        x_gmem: Any, x_scales_gmem: Any, kernel_gmem: Any, scale_gmem: Any, out_gmem: Any, *, out_smem: Any
    ) -> None:
        half, cluster = lax.axis_index("warpgroup"), lax.axis_index("cluster")
        member = lax.axis_index("member") if blocks > 1 else 0
        half_rows = pl.ds(half * warpgroup.ROWS, warpgroup.ROWS)

        def place(i: Any) -> Any:
            """Returns the row and the column of this thread block's tile number `i`."""
            m, n = plgpu.planar_snake(i * clusters + cluster, tiles, 1, strip)
            return m * blocks + member, n

        def step(index: Any, x_smem: Any, x_scales_smem: Any, kernel_smem: Any, total: jax.Array) -> Any:
            i, k = index
            m, n = place(i)
            scale = scale_gmem[n * TILE // block[0], k * TILE // block[1]]
            partial = warpgroup.product(x_smem.at[half_rows], kernel_smem)
            scales = warpgroup.load(x_scales_smem.at[0, half_rows], plgpu.Layout.WGMMA.reduce(1)) * scale
            if blocks > 1:
                # Pallas releases a slot to both blocks by one thread of each warpgroup, which does not wait for the
                # others, unlike in a block without a cluster, where all threads arrive: so all meet here before.
                plgpu.commit_smem()
            total += partial * lax.broadcast_in_dim(scales, partial.shape, [0])

            def finish() -> jax.Array:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_smem[half] = total.astype(result)
                plgpu.commit_smem()
                half_here = pl.ds(m * TILE + half * warpgroup.ROWS, warpgroup.ROWS)
                plgpu.copy_smem_to_gmem(out_smem.at[half], out_gmem.at[half_here, pl.ds(n * TILE, TILE)])
                return warpgroup.zeros(TILE)

            return lax.cond(k == steps - 1, finish, lambda: total)

        operand = functools.partial(plgpu.BlockSpec, memory_space=plgpu.SMEM)
        tiled = warpgroup.tiled(x.dtype, TILE)
        shared = ("member",) if blocks > 1 else ()
        warpgroup.pipeline(
            step,
            grid=((tiles[0] * tiles[1] - cluster + clusters - 1) // clusters, steps),
            in_specs=[
                operand((TILE, TILE), lambda i, k: (place(i)[0], k), transforms=tiled),
                operand((1, TILE), lambda i, k: (k, place(i)[0])),
                operand((TILE, TILE), lambda i, k: (place(i)[1], k), transforms=tiled, collective_axes=shared),
            ],
            max_concurrent_steps=STAGES,
            compute_context=lambda run: run(warpgroup.zeros(TILE)),
        )(x_gmem, x_scales_gmem, kernel_gmem)
        plgpu.wait_smem_to_gmem(0)

    run = warpgroup.kernel(
        body,
        jax.ShapeDtypeStruct((rows, kernel.shape[0]), result),
        grid=(clusters,),
        grid_names=("cluster",),
        **({"cluster": (blocks,), "cluster_names": ("member",)} if blocks > 1 else {}),
        scratch_types={
            "out_smem": plgpu.SMEM((2, warpgroup.ROWS, TILE), result, transforms=warpgroup.tiled(result, TILE))
        },
        interpret=interpret,
    )
    operands = x, x_scales, kernel, scale_inv.astype(jnp.float32)
    y: jax.Array = vary(run(*operands), operands)
    return y
