"""Hopper kernel that norms and rotates queries and keys, and writes keys and values to the cache, in one launch."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...policies.matmul import warpgroup
from ...policies.matmul.shards import vary
from ..kv_cache import LayerCache

WARPS, LANES = 4, 32
"""Warps of a warpgroup, and threads of a warp."""


def accepts(heads: int, kv: int, d: int) -> bool:
    """Returns whether `rotate_and_store` takes so many query and key heads of d columns.

    Mosaic takes no heads one by one: it cannot merge an axis of length 1 with the columns beside it.
    """
    return d in (64, 128) and math.gcd(heads, kv, WARPS) > 1


def layout_of(heads: int, columns: int) -> Any:
    """Returns a layout of (heads, columns, 1) in registers in which a warp has a head: no sum over columns leaves it.

    heads    2 or 4; fewer than the warps of a warpgroup are repeated
    columns  a multiple of 32

    The last axis is that of slots in the cache of keys, since Mosaic requires a contiguous last axis of what it writes.
    """
    tiles = ((heads, columns, 1), (LANES, 1))[: 1 if columns == LANES else 2]
    warps: tuple[Any, ...] = (-1 - 2 * len(tiles),)
    if heads < WARPS:
        warps = (*warps, plgpu.Replicated(WARPS // heads))
    return plgpu.Layout.TILED(plgpu.Tiling(tiles), warp_dims=warps, lane_dims=(-2,), vector_dim=-1)


def rotate_and_store(
    sums: jax.Array,
    scales: tuple[jax.Array, jax.Array] | None,
    cos: jax.Array,
    sin: jax.Array,
    cache: LayerCache,
    start: jax.Array,
    *,
    eps: float,
    interpret: Any = None,
) -> tuple[jax.Array, LayerCache]:
    """Returns `(q, cache)`, see `reference.rotate_and_store`; the cache is updated in place.

    A thread block has two or four heads of a sequence, a warp each, and reads their sums directly to registers.
    `accepts` says which shapes it takes.
    """
    batch, kv, d, slots = cache.keys.shape
    parts, rows, width = sums.shape
    heads, half, dtype = width // d - 2 * kv, d // 2, cos.dtype
    together = math.gcd(heads, kv, WARPS)
    column = layout_of(together, half)
    layout = column.reduce(2)
    halves = pl.ds(0, half), pl.ds(half, half)
    norms = () if scales is None else scales

    def body(sums_gmem: Any, cos_gmem: Any, sin_gmem: Any, start_gmem: Any, *refs: Any) -> None:
        *scales_gmem, keys_gmem, values_gmem, q_gmem = refs
        b, group = lax.axis_index("sequence"), lax.axis_index("group")
        first = group * together
        slot = jnp.clip(start_gmem[0], 0, slots - 1)

        def load(ref: Any, layout: Any) -> jax.Array:
            return warpgroup.load(ref, layout, optimized=False).astype(jnp.float32)

        def load_vector(ref: Any) -> jax.Array:
            """Returns a vector of columns, the same for each head."""
            return across(load(ref, layout.reduce(0)))

        def rounded(x: jax.Array) -> jax.Array:
            return x.astype(dtype).astype(jnp.float32)

        def across(vector: jax.Array) -> jax.Array:
            return plgpu.layout_cast(lax.broadcast_in_dim(vector, (together, half), (1,)), layout)

        def product() -> tuple[jax.Array, ...]:
            def half_of(columns: Any) -> jax.Array:
                at = lambda part: sums_gmem.at[part, b, pl.ds(first, together), columns]  # noqa: E731
                return rounded(functools.reduce(jnp.add, (load(at(part), layout) for part in range(parts))))

            return tuple(map(half_of, halves))

        def normed_and_rotated(scale: Any) -> tuple[jax.Array, ...]:
            left, right = product()
            if scales is not None:
                squares = jnp.sum(left * left + right * right, axis=1)
                factor = lax.broadcast_in_dim(lax.rsqrt(squares * (1 / d) + eps), (together, half), (0,))
                factor = plgpu.layout_cast(factor, layout)
                left, right = (
                    rounded(rounded(x * factor) * load_vector(scale.at[columns]))
                    for x, columns in zip((left, right), halves, strict=True)
                )
            cos, sin = (load_vector(ref.at[b]) for ref in (cos_gmem, sin_gmem))
            return (
                rounded(rounded(left * cos) - rounded(right * sin)),
                rounded(rounded(right * cos) + rounded(left * sin)),
            )

        def store(ref: Any, value: jax.Array) -> None:
            warpgroup.store(ref, value.astype(dtype))

        @pl.when(first < heads)
        def _() -> None:
            for columns, value in zip(halves, normed_and_rotated(scales_gmem and scales_gmem[0]), strict=True):
                store(q_gmem.at[b, pl.ds(first, together), columns], value)

        @pl.when((first >= heads) & (first < heads + kv))
        def _() -> None:
            for columns, value in zip(halves, normed_and_rotated(scales_gmem and scales_gmem[1]), strict=True):
                key = plgpu.layout_cast(lax.broadcast_in_dim(value, (together, half, 1), (0, 1)), column)
                store(keys_gmem.at[b, pl.ds(first - heads, together), columns, pl.ds(slot, 1)], key)

        @pl.when(first >= heads + kv)
        def _() -> None:
            for columns, value in zip(halves, product(), strict=True):
                store(values_gmem.at[b, pl.ds(first - heads - kv, together), slot, columns], value)

    launch = warpgroup.kernel_in_place(
        body,
        jax.ShapeDtypeStruct((batch, heads, d), dtype),
        grid=(batch, (heads + 2 * kv) // together),
        grid_names=("sequence", "group"),
        interpret=interpret,
    )
    operands = sums.reshape(parts, rows, -1, d), cos, sin, start.reshape(1), *norms
    q, (keys, values) = vary(launch(operands, (cache.keys, cache.values)), operands)
    return q, LayerCache(keys, values, None, None, cache.dtype)
