"""Tiles of the kernels that compute rows: 512 numbers in registers of a warpgroup, and how they are read and written.

Each of a tile's four warps has 128 columns of a row, of which each thread has 4 neighbours: a warp reads or writes them
at once, and they share a scale if they are quantised.  The four are blocks of columns of one row, or the same columns
of four rows.  So no rows are added for the sake of a matrix instruction, which has 64.

Arrays (rows, columns) are given to these kernels as (rows, columns/128, 128), which copies nothing.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...policies.matmul import warpgroup
from ...policies.matmul.hopper_quantize import COLUMNS, scales_of
from .reference import SCALES

WARPS = 4
"""Of a warpgroup, and blocks of 128 columns in a tile."""

TILE = WARPS, COLUMNS

LAYOUT = plgpu.Layout.TILED(plgpu.Tiling((TILE, (COLUMNS // 32,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
"""Which thread has which number of a tile."""

PARAMETERS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, unsafe_no_auto_barriers=True)
"""Without a barrier of the warpgroup before and after each write: threads read nothing that others have written, but
where each of them has arrived at a barrier."""

Place = tuple[Any, Any]
"""Rows and blocks of columns of a tile: four of one and one of the other, as indices."""

Operand = Sequence[Any]
"""References to an operand of a matrix product: its values (rows, blocks, 128), in the activations' dtype, or in
float8_e4m3fn with scales (blocks, max(rows, SCALES))."""


def wide_place(row: Any, block: Any) -> Place:
    """Returns the place of four blocks of columns of a row."""
    return row, pl.ds(block, WARPS)


def tall_place(row: Any, block: Any) -> Place:
    """Returns the place of a block of columns of four rows."""
    return pl.ds(row, WARPS), block


def blocked(x: jax.Array) -> jax.Array:
    """Returns x (..., columns) as (..., columns/128, 128)."""
    return x.reshape(*x.shape[:-1], -1, COLUMNS)


def load(ref: Any, layout: Any = LAYOUT) -> jax.Array:
    """Returns a tile of global memory in float32."""
    return warpgroup.load(ref, layout, optimized=False).astype(jnp.float32)


def rounded(tile: jax.Array, dtype: np.dtype) -> jax.Array:
    """Returns a tile rounded to `dtype`, in float32, in which everything is computed."""
    return tile.astype(dtype).astype(jnp.float32)


def terms(sums: Any, place: Place, together: int) -> list[jax.Array]:
    """Returns the tiles whose sum is a tile of a product, from its sums (parts, rows, blocks, 128).

    Up to `together` parts are read at once, into 4 registers of each thread each: the latency of memory counts once.
    """
    parts = sums.shape[0]
    chunks = parts // together if parts > together else 0

    def add(chunk: jax.Array, total: jax.Array) -> jax.Array:
        first = chunk * together
        return functools.reduce(operator.add, [load(sums.at[first + i, *place]) for i in range(together)], total)

    first = [lax.fori_loop(0, chunks, add, warpgroup.full(TILE, 0, LAYOUT))] if chunks else []
    return [*first, *(load(sums.at[part, *place]) for part in range(chunks * together, parts))]


def product(terms: list[jax.Array], dtype: np.dtype) -> jax.Array:
    """Returns a tile of a product, rounded to `dtype`: the sum of its terms, in their order."""
    return rounded(functools.reduce(operator.add, terms), dtype)


def operand_types(rows: int, columns: int, dtype: np.dtype, *, narrow: bool) -> list[jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of the references of an operand."""
    values = jax.ShapeDtypeStruct((rows, columns // COLUMNS, COLUMNS), jnp.float8_e4m3fn if narrow else dtype)
    scales = jax.ShapeDtypeStruct((columns // COLUMNS, max(rows, SCALES)), jnp.float32)
    return [values, scales] if narrow else [values]


def pad_scales(refs: Operand, place: Place) -> None:
    """Writes ones as the scales beyond the rows of an operand, for the blocks of a tile.

    Between reads of memory and the first use of their results, this takes no time.
    """
    values, *scales = refs
    row, block = place
    for first in range(values.shape[0], SCALES if scales else 0, values.shape[0]):
        beyond = pl.ds(row.start + first, row.size) if isinstance(row, pl.Slice) else row + first
        warpgroup.store(scales[0].at[block, beyond], warpgroup.full((WARPS,), 1, LAYOUT.reduce(1)))


def store_operand(refs: Operand, places: list[Place], found: list[jax.Array]) -> None:
    """Writes tiles of an operand, which are rounded to the activations' dtype, as they are or quantised."""
    values, *scales = refs
    if not scales:
        for place, tile in zip(places, found, strict=True):
            values[place] = tile.astype(values.dtype)
        return
    by_row = [scales_of(jnp.max(jnp.abs(tile), axis=1)) for tile in found]
    quotients = [tile / lax.broadcast_in_dim(each, TILE, [0]) for tile, each in zip(found, by_row, strict=True)]
    for place, quotient, each in zip(places, quotients, by_row, strict=True):
        values[place] = quotient.astype(values.dtype)
        warpgroup.store(scales[0].at[place[::-1]], each)
