"""Products of groups of rows on any device: a loop over tiles of rows, each a `scaled_matmul` with one group's kernel.

Only kernels of groups with rows are read, and no more than one kernel is widened at a time.  The tiles of a group begin
at its first row.  The last one may reach into the next groups, whose own tiles come later and overwrite what it wrote
there; so rows need no padding between groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..scaled_array import ScaledArray
from ..targets import targeting
from .backward import cotangent, frozen
from .face import scaled_matmuls
from .grouped_calls import GroupedCall, GroupedImplementation, Kernel
from .shards import vary

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}
"""The integers that have as many bytes."""

LARGEST_TILE = 512
"""Rows of the largest tile: with so many, reading a kernel again takes a small part of the time of its products."""

UNKNOWN_TILE = 32
"""Rows of a tile where the number of rows is symbolic, as in an exported program."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Tiles:
    """The tiles of rows, in the order of the groups.

    height  rows of a tile
    starts  (groups,) the first row of each group
    ends    (groups,) the row after the last one of each group
    counts  (groups,) tiles of all groups up to and including each
    """

    height: int = dataclasses.field(metadata={"static": True})
    starts: jax.Array
    ends: jax.Array
    counts: jax.Array

    @classmethod
    def of(cls, rows: Any, sizes: jax.Array) -> _Tiles:
        """Returns the tiles of `rows` rows in groups of these sizes, of which no group reaches beyond the rows."""
        height = tile_height(rows, sizes.shape[0])
        ends = jnp.minimum(jnp.cumsum(jnp.clip(sizes, 0, rows)), rows)
        starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
        return cls(height, starts, ends, jnp.cumsum(-(-(ends - starts) // height)))

    def place(self, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the group of a tile and its first row."""
        group = jnp.sum(self.counts <= tile, dtype=jnp.int32)
        before = jnp.where(group > 0, self.counts[group - 1], 0)
        return group, self.starts[group] + (tile - before) * self.height

    def padded(self, x: jax.Array) -> jax.Array:
        """Returns x (rows, columns) with a tile of zeros after it, since the last tile may reach beyond the rows."""
        return jnp.pad(x, ((0, self.height), (0, 0)))

    def rows(self, x: jax.Array, start: jax.Array) -> jax.Array:
        """Returns the rows of one tile of a padded array."""
        return _slice(x, start, self.height)

    def in_groups(self, x: jax.Array) -> jax.Array:
        """Returns x (rows, columns) with zeros in rows after the last group, where its last tile may have reached."""
        return jnp.where((jnp.arange(x.shape[0]) < self.ends[-1])[:, None], x, jnp.zeros_like(x))


def tile_height(rows: Any, groups: int) -> int:
    """Returns the rows of a tile: a power of two of about twice the average group, so that few groups have two tiles.

    >>> tile_height(8, 128), tile_height(4096, 128), tile_height(2**20, 8)
    (1, 64, 512)
    """
    if not isinstance(rows, int):
        return UNKNOWN_TILE
    return min(1 << max(-(-2 * rows // max(groups, 1)) - 1, 0).bit_length(), LARGEST_TILE)


def _products(call: GroupedCall, x: jax.Array, kernels: Sequence[Kernel]) -> tuple[jax.Array, ...]:
    """Returns the products of rows of one group."""
    with targeting(call.target):
        return scaled_matmuls(
            x,
            [kernel if isinstance(kernel, ScaledArray) else (kernel, None) for kernel in kernels],
            compute=call.compute,
            result=call.calls[0].result,
            backward=call.backward,
        )


def _of_group(kernels: Sequence[Kernel], group: jax.Array) -> tuple[Kernel, ...]:
    """Returns the kernels of one group."""
    chosen: tuple[Kernel, ...] = jax.tree.map(lambda array: _slice(array, group, 1)[0], tuple(kernels))
    return chosen


def _slice(array: jax.Array, start: jax.Array, rows: int) -> jax.Array:
    """Returns rows of an array, of which nothing else is read.

    XLA has no slices of float8 and bfloat16 on CPUs, and would widen the whole array; bits it slices. Without the
    barrier it would copy all bits before the loop: 201 MB for 128 kernels of 768×2048.
    """
    array, start = jax.lax.optimization_barrier((array, start))
    dtype = array.dtype
    bits = jax.lax.bitcast_convert_type(array, _BITS[dtype.itemsize])
    return jax.lax.bitcast_convert_type(jax.lax.dynamic_slice_in_dim(bits, start, rows), dtype)


def _updated(bits: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    """Returns the bits of an array of which these rows are replaced, without widening the array as in `_slice`."""
    return jax.lax.dynamic_update_slice_in_dim(bits, jax.lax.bitcast_convert_type(rows, bits.dtype), start, axis=0)


def _no_bits(shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    """Returns the bits of an array of zeros."""
    return jnp.zeros(shape, _BITS[dtype.itemsize])


def products(
    call: GroupedCall, x: jax.Array, kernels: Sequence[Kernel], group_sizes: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns the products (rows, out) of x with each stack of kernels, tile by tile."""
    tiles = _Tiles.of(x.shape[0], group_sizes)
    padded = tiles.padded(x)
    dtype = call.calls[0].result

    def body(tile: jax.Array, results: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        group, start = tiles.place(tile)
        products = _products(call, tiles.rows(padded, start), _of_group(kernels, group))
        return tuple(_updated(bits, product, start) for bits, product in zip(results, products, strict=True))

    zeros = tuple(_no_bits((padded.shape[0], kernel.shape[1]), dtype) for kernel in kernels)
    zeros = vary(zeros, (x, kernels, group_sizes))
    results = jax.lax.fori_loop(0, tiles.counts[-1], body, zeros)
    return tuple(jax.lax.bitcast_convert_type(tiles.in_groups(bits[: x.shape[0]]), dtype) for bits in results)


def gradients(
    call: GroupedCall,
    x: jax.Array,
    kernels: Sequence[Kernel],
    group_sizes: jax.Array,
    gradients: Sequence[jax.Array],
) -> tuple[jax.Array, tuple[Kernel | None, ...]]:
    """Returns the gradients of x and of the kernels, None for one that is frozen: those of `scaled_matmul`, by tile.

    That of a ScaledArray is a ScaledArray with a gradient as its proxy.
    """
    tiles = _Tiles.of(x.shape[0], group_sizes)
    padded, padded_gradients = tiles.padded(x), tuple(map(tiles.padded, gradients))
    trained = [i for i, kernel in enumerate(kernels) if is_trained(kernel)]
    arrays = tuple(map(frozen, kernels))
    dtypes = {i: _wide_dtype(kernels[i]) for i in trained}

    def body(tile: jax.Array, sums: tuple[jax.Array, list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
        dx, dkernels = sums
        group, start = tiles.place(tile)
        of_group = _of_group(arrays, group)

        def products(rows: jax.Array, wide: list[jax.Array]) -> tuple[jax.Array, ...]:
            chosen = dict(zip(trained, wide, strict=True))
            return _products(call, rows, [_with(kernel, chosen.get(i)) for i, kernel in enumerate(of_group)])

        # Marked as varying: the gradient of one that does not vary would be added up over devices with other groups.
        wide = [
            vary(jnp.zeros(kernel.shape, dtypes[i]), (x, kernels))
            if isinstance(kernel := of_group[i], ScaledArray)
            else kernel
            for i in trained
        ]
        in_group = (start + jnp.arange(tiles.height) < tiles.ends[group])[:, None]
        tile_rows = tiles.rows(padded, start)
        if call.backward is not None:  # rows of other groups would enter the scales of x
            tile_rows = jnp.where(in_group, tile_rows, jnp.zeros_like(tile_rows))
        _, pull_back = jax.vjp(products, tile_rows, wide)
        rows = tuple(tiles.rows(gradient, start) for gradient in padded_gradients)
        d_rows, d_wide = pull_back(tuple(jnp.where(in_group, each, jnp.zeros_like(each)) for each in rows))
        dx = _updated(dx, d_rows, start)
        # In float32, since a group may have many tiles.
        return dx, [total.at[group].add(one.astype(total.dtype)) for total, one in zip(dkernels, d_wide, strict=True)]

    zeros = [jnp.zeros(kernels[i].shape, jnp.float64 if dtypes[i] == np.float64 else jnp.float32) for i in trained]
    begin = vary((_no_bits(padded.shape, x.dtype), zeros), (x, kernels, group_sizes, gradients))
    dx, dkernels = jax.lax.fori_loop(0, tiles.counts[-1], body, begin)
    found = {i: total.astype(dtypes[i]) for i, total in zip(trained, dkernels, strict=True)}
    gradient = jax.lax.bitcast_convert_type(dx[: x.shape[0]], x.dtype)
    return gradient, tuple(cotangent(kernel, found.get(i)) for i, kernel in enumerate(kernels))


def is_trained(kernel: Kernel) -> bool:
    """Returns whether a kernel has a gradient."""
    return not isinstance(kernel, ScaledArray) or kernel.proxy is not None


def _wide_dtype(kernel: Kernel) -> np.dtype:
    """Returns the dtype of the gradient of a kernel."""
    array = kernel.proxy if isinstance(kernel, ScaledArray) else kernel
    assert array is not None
    return np.dtype(array.dtype)


def _with(kernel: Kernel, wide: jax.Array | None) -> Kernel:
    """Returns a kernel with a wide array that receives its gradient: its proxy, or the kernel itself."""
    if wide is None:
        return kernel
    return dataclasses.replace(kernel, proxy=wide) if isinstance(kernel, ScaledArray) else wide


LOOP = GroupedImplementation("loop", "a loop over tiles of rows of one group each", lambda call: None, products)
