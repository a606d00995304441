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
from ...policies.matmul import warpgroup
from ...policies.matmul.shards import vary
from ..kv_cache import LayerCache
from .hopper_combine import LEAST, TILE, combine, tiles_of
from .reference import Operand

STAGES = 2
"""Tiles of keys and values in shared memory at the same time.  With 64 slots of 128 columns these are 64 KiB, so that
two thread blocks fit on a multiprocessor, and about 100 KiB are being copied: at 1 µs enough for 10 TB/s."""

BLOCKS = 2
"""Thread blocks for each multiprocessor."""

MASKED = 2 * LEAST
"""The score of a slot that is not seen.  Its weight, 2**(MASKED - maximum), is 0 even if no slot is seen."""


def accepts(heads: int, kv: int, d: int, slots: int, *, narrow: bool) -> bool:
    """Returns whether `attend` takes so many query and key heads of d columns, and so many slots of the cache.

    Mosaic cannot write the scale of a single block of 128 columns, so that their number is even if it quantises.
    """
    columns = 256 if narrow else 128
    return d in (64, 128) and heads * d % columns == 0 and heads // kv <= warpgroup.ROWS and slots % TILE == 0


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
        filled, tiles, share = tiles_of(length_gmem, count, parts)
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
