"""Hopper kernels of attention for one token of each sequence over the filled slots of the cache, in two launches.

The first divides the filled slots among thread blocks, each of which computes a part of the softmax and of its sums;
the second combines the parts in a fixed order, so that the result is deterministic.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...policies import targets
from ...policies.matmul import hopper_quantize, warpgroup
from ...policies.matmul.shards import vary
from ..kv_cache import LayerCache
from .reference import SCALES, Operand

TILE = 64
"""Slots that are processed at a time."""

STAGES = 2
"""Tiles of keys and values in shared memory at the same time.  With 64 slots of 128 columns these are 64 KiB, so that
two thread blocks fit on a multiprocessor, and about 100 KiB are being copied: at 1 µs enough for 10 TB/s."""

BLOCKS = 2
"""Thread blocks for each multiprocessor."""

TOGETHER = 8
"""Parts of the sums that the second launch reads at the same time."""

MASKED, LEAST = -(2.0**100), -(2.0**99)
"""The score of a slot that is not seen, and a number below all others, from which maxima start: the weight of such a
slot, 2**(MASKED - maximum), is 0 even if no slot is seen."""


def accepts(heads: int, kv: int, d: int, slots: int) -> bool:
    """Returns whether `attend` takes so many query and key heads of d columns, and so many slots of the cache."""
    return d in (64, 128) and heads * d % 128 == 0 and heads // kv <= warpgroup.ROWS and slots % TILE == 0


def splits(heads: int, slots: int, processors: int) -> int:
    """Returns the number of thread blocks among which the slots of each head are divided.

    heads       number of key heads in all sequences
    slots       slots of the cache, filled or not
    processors  streaming multiprocessors of the GPU

    >>> splits(8, 4096, 132), splits(8, 128, 132), splits(512, 4096, 132)
    (33, 2, 1)
    """
    return max(1, min(BLOCKS * processors // heads, math.ceil(slots / TILE)))


def attend(
    q: jax.Array,
    cache: LayerCache,
    queries: jax.Array,
    slots: jax.Array,
    length: jax.Array,
    *,
    rows: int,
    window: int | None,
    narrow: bool,
    interpret: Any = None,
) -> Operand:
    """Returns attention over the filled slots as an operand (rows, heads * d), see `reference.attend`.

    The heads are a multiple of 128 columns, d is 64 or 128, and the number of slots a multiple of 64, see `accepts`.
    Of a query that sees no slot, all results are zero.
    """
    kv, d, count = cache.keys.shape[1:]
    batch, heads, _ = q.shape
    parts = splits(batch * kv, count, targets.multiprocessors())
    operands = q, cache.keys, cache.values, queries, slots, length.reshape(1)
    sums, statistics = partial_sums(*operands, parts=parts, window=window, interpret=interpret)
    shape = heads * d // 128, 128 // d, d
    result = combine(
        sums.reshape(batch, parts, *shape),
        statistics.reshape(batch, parts, 2, *shape[:2]),
        operands[-1],
        rows=rows,
        slots=count,
        dtype=q.dtype,
        narrow=narrow,
        interpret=interpret,
    )
    values, *scales = vary(result, operands)
    return values.reshape(rows, heads * d), scales[0] if scales else None


def _tiles(length: Any, slots: int, parts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the filled slots, their tiles, and how many tiles each part has at most."""
    filled = jnp.clip(length[0], 0, slots)
    tiles = lax.div(filled + (TILE - 1), TILE)
    return filled, tiles, lax.div(tiles + (parts - 1), parts)


def partial_sums(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    queries: jax.Array,
    slots: jax.Array,
    length: jax.Array,
    *,
    parts: int,
    window: int | None,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Returns `(sums, statistics)` of the softmax over each part of the filled slots.

    sums        (batch, parts, heads, d) float32  values times 2**(score - maximum)
    statistics  (batch, parts, 2, heads) float32  maximum of the scores, in units of ln 2, and the sum of the weights

    Parts after the last one with a filled slot are not written, but the first one always is.
    """
    batch, kv, d, count = keys.shape
    group, dtype = q.shape[1] // kv, q.dtype
    halves = d // TILE
    unit = d**-0.5 * math.log2(math.e)
    layout = plgpu.Layout.WGMMA
    shape = (warpgroup.ROWS, TILE)

    def body(
        q_gmem: Any,
        keys_gmem: Any,
        values_gmem: Any,
        queries_gmem: Any,
        slots_gmem: Any,
        length_gmem: Any,
        sums_gmem: Any,
        statistics_gmem: Any,
        *,
        q_smem: Any,
        keys_smem: Any,
        values_smem: Any,
        slots_smem: Any,
        sums_smem: Any,
        statistics_smem: Any,
        q_ready: Any,
        keys_ready: Any,
        values_ready: Any,
    ) -> None:
        part, head, b = (lax.axis_index(name) for name in ("part", "head", "sequence"))
        filled, tiles, share = _tiles(length_gmem, count, parts)
        first = part * share
        steps = jnp.clip(tiles - first, 0, share)
        query = queries_gmem[b]

        def copy_keys(i: Any, stage: Any) -> None:
            columns = pl.ds((first + i) * TILE, TILE)
            plgpu.copy_gmem_to_smem(keys_gmem.at[b, head, :, columns], keys_smem.at[stage], keys_ready.at[stage])
            plgpu.copy_gmem_to_smem(slots_gmem.at[pl.ds(b, 1), columns], slots_smem.at[stage], keys_ready.at[stage])

        def copy_values(i: Any, stage: Any) -> None:
            rows = pl.ds((first + i) * TILE, TILE)
            plgpu.copy_gmem_to_smem(values_gmem.at[b, head, rows], values_smem.at[stage], values_ready.at[stage])

        def across(vector: jax.Array, axis: int) -> jax.Array:
            """Returns a vector of rows (axis 0) or columns (axis 1) as a matrix."""
            result: jax.Array = plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, (axis,)), layout)
            return result

        def step(left: Any, i: Any, carry: Any) -> Any:
            maximum, total, sums = carry
            stage = lax.rem(i, STAGES)
            start = (first + i) * TILE
            plgpu.barrier_wait(keys_ready.at[stage])
            scores = warpgroup.product_plain(left, keys_smem.at[stage]) * unit
            positions = warpgroup.load(slots_smem.at[stage, 0], layout.reduce(0))
            distance = query - positions
            index = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=layout.reduce(0))
            seen = (distance >= 0) & (index < filled - start)
            if window is not None:
                seen &= distance < window
            seen = across(jnp.where(seen, 1, 0), 1) != 0
            scores = jnp.where(seen, scores, MASKED)
            pl.when(i + STAGES < steps)(lambda: copy_keys(i + STAGES, stage))

            new = jnp.maximum(maximum, jnp.max(scores, axis=1))
            weights = jnp.exp2(scores - across(new, 0))
            factor = jnp.exp2(maximum - new)
            total = total * factor + jnp.sum(weights, axis=1)
            narrow = weights.astype(dtype)

            plgpu.barrier_wait(values_ready.at[stage])

            @pl.when(start + TILE > filled)
            def _() -> None:
                # Zero times what was in an unfilled slot could be NaN.
                tile = values_smem.at[stage]
                row = plgpu.broadcasted_iota(jnp.int32, (TILE, d), 0, layout=layout)
                kept = jnp.where(row < filled - start, warpgroup.load(tile, layout), jnp.zeros((), dtype))
                tile[...] = kept
                plgpu.commit_smem()

            each = (values_smem.at[stage, :, pl.ds(j * TILE, TILE)] for j in range(halves))
            sums = tuple(
                old * across(factor, 0) + warpgroup.product_plain(narrow, tile)
                for old, tile in zip(sums, each, strict=True)
            )
            pl.when(i + STAGES < steps)(lambda: copy_values(i + STAGES, stage))
            return new, total, sums

        @pl.when((steps > 0) | (part == 0))
        def _() -> None:
            # The matrix instruction has 64 rows, of which only the first are queries.
            warpgroup.store(q_smem, plgpu.layout_cast(jnp.zeros((warpgroup.ROWS, d), dtype), layout))
            plgpu.commit_smem()
            plgpu.copy_gmem_to_smem(q_gmem.at[b, pl.ds(head * group, group)], q_smem.at[pl.ds(0, group)], q_ready)
            for i in range(STAGES):

                @pl.when(i < steps)
                def _(i: int = i) -> None:
                    copy_keys(i, i)
                    copy_values(i, i)

            plgpu.barrier_wait(q_ready)
            left = warpgroup.load(q_smem, layout, optimized=False)
            rows = layout.reduce(1)
            maximum = plgpu.layout_cast(jnp.full((warpgroup.ROWS,), LEAST, jnp.float32), rows)
            total = plgpu.layout_cast(jnp.zeros((warpgroup.ROWS,), jnp.float32), rows)
            start = maximum, total, tuple(warpgroup.zeros(TILE) for _ in range(halves))
            maximum, total, sums = lax.fori_loop(0, steps, functools.partial(step, left), start)
            warpgroup.store(statistics_smem.at[0], maximum)
            warpgroup.store(statistics_smem.at[1], total)
            for j, columns in enumerate(sums):
                warpgroup.store(sums_smem, columns)
                plgpu.commit_smem()
                target = sums_gmem.at[b, part, pl.ds(head * group, group), pl.ds(j * TILE, TILE)]
                plgpu.copy_smem_to_gmem(sums_smem.at[pl.ds(0, group)], target)
                plgpu.wait_smem_to_gmem(0)
            for i in range(group):
                for j in range(2):
                    statistics_gmem[b, part, j, head * group + i] = statistics_smem[j, i]

    settings = {} if interpret is None else {"interpret": interpret}
    launch = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((batch, parts, kv * group, d), jnp.float32),
            jax.ShapeDtypeStruct((batch, parts, 2, kv * group), jnp.float32),
        ),
        grid=(parts, kv, batch),
        grid_names=("part", "head", "sequence"),
        scratch_types={
            "q_smem": plgpu.SMEM((warpgroup.ROWS, d), dtype),
            "keys_smem": plgpu.SMEM((STAGES, d, TILE), dtype, transforms=warpgroup.tiled(dtype, TILE)),
            "values_smem": plgpu.SMEM((STAGES, TILE, d), dtype, transforms=warpgroup.tiled(dtype, d)),
            "slots_smem": plgpu.SMEM((STAGES, 1, TILE), jnp.int32),
            "sums_smem": plgpu.SMEM(shape, jnp.float32),
            "statistics_smem": plgpu.SMEM((2, warpgroup.ROWS), jnp.float32),
            "q_ready": plgpu.Barrier(),
            "keys_ready": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            "values_ready": plgpu.Barrier(num_barriers=STAGES),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **settings,
    )
    result: tuple[jax.Array, jax.Array] = launch(q, keys, values, queries, slots, length)
    return result


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
        _, tiles, share = _tiles(length_gmem, slots, parts)
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
