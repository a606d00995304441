"""Hopper kernel that combines the parts of attention over the filled slots: the second launch of `hopper_attention`."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...policies.matmul import hopper_quantize, warpgroup
from .reference import SCALES

TILE = 64
"""Slots that are processed at a time."""

TOGETHER = 8
"""Parts of the sums that the second launch reads at the same time."""

LEAST = -(2.0**99)
"""A number below all scores, from which maxima start."""


def tiles_of(length: Any, slots: int, parts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the filled slots, their tiles, and how many tiles each part has at most."""
    filled = jnp.clip(length[0], 0, slots)
    tiles = lax.div(filled + (TILE - 1), TILE)
    return filled, tiles, lax.div(tiles + (parts - 1), parts)


def combine(
    sums: jax.Array,
    statistics: jax.Array,
    length: jax.Array,
    *,
    rows: int,
    slots: int,
    dtype: Any,
    narrow: bool,
    interpret: Any,
) -> list[jax.Array]:
    """Returns the sums of all parts over the weights of all, in `dtype` or quantised, in blocks of 128 columns.

    sums        (batch, parts, blocks, heads, d) float32    heads of a block: 128 / d
    statistics  (batch, parts, 2, blocks, heads) float32
    values      (rows, blocks, heads, d)
    scales      (blocks, max(rows, SCALES)) float32, only if `narrow`
    """
    batch, parts, blocks, heads, d = sums.shape
    warps = math.gcd(blocks, 4)
    each = d // 32
    dims: tuple[Any, ...] = () if warps == 1 else (-4,)
    if warps < 4:
        dims = (*dims, plgpu.Replicated(4 // warps))
    tiling = plgpu.Tiling(((warps, heads, d), (each,)))
    layout = plgpu.Layout.TILED(tiling, warp_dims=dims, lane_dims=(-2,), vector_dim=-1)
    shape = (warps, heads, d)

    def body(sums_gmem: Any, statistics_gmem: Any, length_gmem: Any, values_gmem: Any, *scales_gmem: Any) -> None:
        row, group = lax.axis_index("row"), lax.axis_index("group")
        here = pl.ds(group * warps, warps)
        tiles, share = tiles_of(length_gmem, slots, parts)[1:]
        active = jnp.maximum(lax.div(tiles + share - 1, jnp.maximum(share, 1)), 1)

        def across(array: jax.Array) -> jax.Array:
            result: jax.Array = plgpu.layout_cast(lax.broadcast_in_dim(array, shape, (0, 1)), layout)
            return result

        def read(ref: Any, layout: Any) -> jax.Array:
            return warpgroup.load(ref, layout, optimized=False)

        def statistic(part: Any, which: int) -> jax.Array:
            return read(statistics_gmem.at[row, part, which, here], layout.reduce(2))

        def step(i: Any, carry: Any) -> Any:
            maximum, total, result = carry
            numbers = [i * TOGETHER + j for j in range(min(TOGETHER, parts))]
            places = [jnp.minimum(number, active - 1) for number in numbers]
            # A part that is read a second time has no weight.
            shares = [(number < active).astype(jnp.float32) for number in numbers]
            maxima = [statistic(place, 0) for place in places]
            totals = [statistic(place, 1) for place in places]
            terms = [read(sums_gmem.at[row, place, here], layout) for place in places]
            new = maximum
            for one in maxima:
                new = jnp.maximum(new, one)
            factor = jnp.exp2(maximum - new)
            total, result = total * factor, result * across(factor)
            for one, amount, term, weight in zip(maxima, totals, terms, shares, strict=True):
                factor = jnp.exp2(one - new) * weight
                total, result = total + amount * factor, result + term * across(factor)
            return new, total, result

        def put(result: jax.Array) -> None:
            """Writes float32 results, rounded to `dtype` or quantised."""
            rounded = result.astype(dtype)
            if not narrow:
                warpgroup.store(values_gmem.at[row, here], rounded)
                return
            wide = rounded.astype(jnp.float32)
            few, column = layout.reduce(2), _column(warps)
            scales = jnp.max(jnp.abs(wide), axis=2)
            if heads > 1:  # Mosaic infers no layout of the maximum of an axis of length 1
                scales = plgpu.layout_cast(jnp.max(plgpu.layout_cast(scales, few), axis=1), few.reduce(1))
            scales = hopper_quantize.scales_of(scales)
            if heads > 1:
                one = plgpu.layout_cast(lax.broadcast_in_dim(scales, (warps, 1), (0,)), column)
                scales = plgpu.layout_cast(lax.broadcast_in_dim(scales, shape[:2], (0,)), few)
            else:
                one = plgpu.layout_cast(scales, column)
            warpgroup.store(values_gmem.at[row, here], (wide / across(scales)).astype(jnp.float8_e4m3fn))
            warpgroup.store(scales_gmem[0].at[here, pl.ds(row, 1)], one)
            for i in range(1, SCALES // rows):
                ones = plgpu.layout_cast(jnp.ones((warps, 1), jnp.float32), _column(warps))
                warpgroup.store(scales_gmem[0].at[here, pl.ds(row + i * rows, 1)], ones)

        @pl.when(row < batch)
        def _() -> None:
            few = layout.reduce(2)
            maximum = plgpu.layout_cast(jnp.full(shape[:2], LEAST, jnp.float32), few)
            total = plgpu.layout_cast(jnp.zeros(shape[:2], jnp.float32), few)
            start = maximum, total, plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
            steps = lax.div(active + (TOGETHER - 1), TOGETHER)
            _, total, result = lax.fori_loop(0, steps, step, start)
            put(result / across(jnp.where(total > 0, total, 1.0)))

        @pl.when(row >= batch)
        def _() -> None:
            put(plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout))

    results = [jax.ShapeDtypeStruct((rows, blocks, heads, d), jnp.float8_e4m3fn if narrow else dtype)]
    if narrow:
        results.append(jax.ShapeDtypeStruct((blocks, max(rows, SCALES)), jnp.float32))
    settings = {} if interpret is None else {"interpret": interpret}
    launch = plgpu.kernel(
        body,
        out_type=results,
        grid=(blocks // warps, rows),
        grid_names=("group", "row"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **settings,
    )
    result: list[jax.Array] = launch(sums, statistics, length)
    return result


def _column(warps: int) -> Any:
    """Returns a layout of (warps, 1), a row in all threads of a warp."""
    dims: tuple[Any, ...] = () if warps == 1 else (-2,)
    if warps < 4:
        dims = (*dims, plgpu.Replicated(4 // warps))
    tiling = plgpu.Tiling(((warps, 1),))
    return plgpu.Layout.TILED(tiling, warp_dims=dims, lane_dims=(plgpu.Replicated(32),), vector_dim=-1)
