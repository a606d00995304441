"""Hopper kernel that quantises activations to e4m3 in one pass, which reads them once.

XLA generates three kernels for the same computation, of which two read the activations: one for the largest magnitudes
and one for the quotients.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import dtypes
from ..scales import E4M3, F32
from . import warpgroup
from .shards import vary

ROWS = warpgroup.ROWS
"""Rows of x per thread block."""

COLUMNS = 128
"""Columns that share a scale."""

LARGEST = dtypes.largest(E4M3)
"""448, that is 7 times a power of two."""


def scales_of(amax: jax.Array) -> jax.Array:
    """Returns the scales (rows,) of largest magnitudes (rows,): those of `amax_rule`, correctly rounded.

    Mosaic's division is PTX's `div.full.f32`, which is up to 2 ulp off.  Here the remainder of an approximate quotient
    is exact in float32, fused or not, since 448 q = 512 q - 64 q.  Half of it does not overflow, and small magnitudes
    are scaled so that it does not underflow.
    """
    small = amax < 2.0**-60
    scaled = jnp.where(small, amax * 2.0**64, amax)
    approximate = scaled * (1 / LARGEST)
    half = (scaled * 0.5 - approximate * (LARGEST * 4 / 7)) + approximate * (LARGEST / 14)
    quotient = jnp.where(approximate < jnp.inf, approximate + half * (2 / LARGEST), approximate)
    quotient = jnp.where(small, quotient * 2.0**-64, quotient)
    return jnp.where(amax == 0, 1.0, jnp.maximum(quotient, dtypes.smallest_normal(F32)))


def quantize(x: jax.Array, *, interpret: Any = None) -> tuple[jax.Array, jax.Array]:
    """Returns `(values, scales)` of x quantised in blocks of (1, 128), the scales transposed.

    x       (rows, in)      f32, bf16 or f16; at least 64 rows, a multiple of 8; in is a multiple of 128
    values  (rows, in)      float8_e4m3fn
    scales  (in/128, rows)  float32

    Scales are those of `amax_rule`, correctly rounded; XLA's own code for GPUs may be an ulp off.  The quotients
    x / scale are PTX's `div.full.f32`, at most 2 ulp of float32 off, so that about two values in a million are rounded
    to the other of two e4m3 neighbours.  Correct rounding would cost hardly any instructions, but 24 to 64 more
    registers per thread.

    The last block of rows may reach beyond x: tensor copies read zeros there, and write nothing.  Scales are copied as
    plain bytes, without bounds, so that their target is padded.
    """
    rows, columns = x.shape
    blocks = pl.cdiv(rows, ROWS)

    def body(
        x_gmem: Any, values_gmem: Any, scales_gmem: Any, *, x_smem: Any, values_smem: Any, scales_smem: Any, ready: Any
    ) -> None:
        m, k = lax.axis_index("row_tile"), lax.axis_index("column_block")
        tile = (pl.ds(m * ROWS, ROWS), pl.ds(k * COLUMNS, COLUMNS))
        plgpu.copy_gmem_to_smem(x_gmem.at[tile], x_smem, ready)
        plgpu.barrier_wait(ready)
        wide = warpgroup.load(x_smem, plgpu.Layout.WGMMA).astype(jnp.float32)
        scales = scales_of(jnp.max(jnp.abs(wide), axis=1))
        scales_smem[...] = scales
        values_smem[...] = (wide / lax.broadcast_in_dim(scales, wide.shape, [0])).astype(jnp.float8_e4m3fn)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(values_smem, values_gmem.at[tile])
        plgpu.copy_smem_to_gmem(scales_smem, scales_gmem.at[k, tile[0]])
        plgpu.wait_smem_to_gmem(0)

    shape = (ROWS, COLUMNS)
    settings = {} if interpret is None else {"interpret": interpret}
    run = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((rows, columns), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((columns // COLUMNS, blocks * ROWS), jnp.float32),
        ),
        grid=(columns // COLUMNS, blocks),
        grid_names=("column_block", "row_tile"),
        scratch_types={
            "x_smem": plgpu.SMEM(shape, x.dtype, transforms=warpgroup.tiled(x.dtype, COLUMNS)),
            "values_smem": plgpu.SMEM(shape, jnp.float8_e4m3fn, transforms=warpgroup.tiled(jnp.float8_e4m3fn, COLUMNS)),
            "scales_smem": plgpu.SMEM((ROWS,), jnp.float32),
            "ready": plgpu.Barrier(),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **settings,
    )
    values, scales = vary(run(x), x)
    return values, scales[:, :rows]
