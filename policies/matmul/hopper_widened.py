"""Hopper kernel for many rows of x in 16 bits (W8A16, prefill): tiles of 128 rows of x by 128 of the kernel.

As in `hopper_columns` the operands are swapped, and the kernel is widened exactly in registers.  What limits the speed
is the copying of operands from the second-level cache: a step needs 32 KiB of x and 16 KiB of the kernel.  So two
thread blocks are a cluster: they process two tiles of the kernel with the same tiles of x, of which each copies one
half to the shared memory of both (multicast), and a block reads two thirds of the bytes.  Thread blocks are persistent,
and their pipeline of copies goes on across tiles, as in `hopper_rows`.
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

STAGES = {2: 4, 4: 3}
"""Steps whose operands are in shared memory at the same time, 48 KiB each, by the bytes of a number of the result: it
has 32 or 64 KiB beside them."""

SNAKE = 8
"""Pairs of tiles of the kernel that are processed before the next rows of x, or as many as divide both 8 and the number
of pairs: for a narrower last strip LLVM divides by a variable, which JAX 0.12 compiles to a call of a function, and
because of this ptxas waits after every matrix instruction (C7509)."""


def product(
    x: jax.Array,
    kernel: jax.Array,
    scale_inv: jax.Array,
    *,
    block: tuple[int, int],
    result: np.dtype,
    processors: int,
    interpret: Any = None,
) -> jax.Array:
    """Returns the product (rows, out) in dtype `result`.

    x           (rows, in)                   bfloat16 or float16; at least 128 rows, a multiple of 8
    kernel      (out, in)                    float8; out a multiple of 256 unless `processors` is 1, in of 128
    scale_inv   (out/block[0], in/block[1])  float32; both sides of a block are multiples of 128
    processors  streaming multiprocessors, each of which has one persistent thread block

    The last tile of rows may reach beyond x: tensor copies read zeros there, and write nothing.
    """
    rows, columns = x.shape
    members = min(2, processors)
    tiles, steps = (pl.cdiv(rows, TILE), kernel.shape[0] // TILE // members), columns // TILE
    clusters, strip = min(processors // members, tiles[0] * tiles[1]), math.gcd(SNAKE, tiles[1])

    def body(x_gmem: Any, kernel_gmem: Any, scale_gmem: Any, out_gmem: Any, *, out_smem: Any) -> None:
        half, cluster = lax.axis_index("warpgroup"), lax.axis_index("cluster")
        member = lax.axis_index("member") if members > 1 else 0
        half_rows = pl.ds(half * warpgroup.ROWS, warpgroup.ROWS)

        def place(i: Any) -> Any:
            """Returns the tile of x and that of the kernel of this thread block's tile number `i`."""
            m, n = plgpu.planar_snake(i * clusters + cluster, tiles, 1, strip)
            return m, n * members + member

        def step(index: Any, x_smem: Any, kernel_smem: Any, total: jax.Array) -> Any:
            i, k = index
            m, n = place(i)
            scale = scale_gmem[n * TILE // block[0], k * TILE // block[1]]
            left = kernel_smem.at[half_rows]
            total += warpgroup.product_widened(left, x_smem, TILE // 2, synchronise=members > 1) * scale

            def finish() -> jax.Array:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                warpgroup.store_transposed(out_smem.at[half], total.astype(result))
                plgpu.commit_smem()
                columns_here = pl.ds(n * TILE + half * warpgroup.ROWS, warpgroup.ROWS)
                plgpu.copy_smem_to_gmem(out_smem.at[half], out_gmem.at[pl.ds(m * TILE, TILE), columns_here])
                return warpgroup.zeros(TILE)

            return lax.cond(k == steps - 1, finish, lambda: total)

        operand = functools.partial(plgpu.BlockSpec, (TILE, TILE), memory_space=plgpu.SMEM)
        shared = ("member",) if members > 1 else ()
        warpgroup.pipeline(
            step,
            grid=((tiles[0] * tiles[1] - cluster + clusters - 1) // clusters, steps),
            in_specs=[
                operand(
                    lambda i, k: (place(i)[0], k), transforms=warpgroup.tiled(x.dtype, TILE), collective_axes=shared
                ),
                operand(lambda i, k: (place(i)[1], k), transforms=warpgroup.tiled(kernel.dtype, TILE // 2)),
            ],
            max_concurrent_steps=STAGES[result.itemsize],
            compute_context=lambda run: run(warpgroup.zeros(TILE)),
        )(x_gmem, kernel_gmem)
        plgpu.wait_smem_to_gmem(0)

    run = warpgroup.kernel(
        body,
        jax.ShapeDtypeStruct((rows, kernel.shape[0]), result),
        grid=(clusters,),
        grid_names=("cluster",),
        **({"cluster": (members,), "cluster_names": ("member",)} if members > 1 else {}),
        scratch_types={
            "out_smem": plgpu.SMEM(
                (2, TILE, warpgroup.ROWS), result, transforms=warpgroup.tiled(result, warpgroup.ROWS)
            )
        },
        interpret=interpret,
    )
    operands = x, kernel, scale_inv.astype(jnp.float32)
    y: jax.Array = vary(run(*operands), operands)
    return y
