"""`grouped_matmul` and `grouped_matmuls`: products of groups of rows with one kernel each, as in a mixture of experts.

A loop takes one tile of rows at a time, which belong to one group, and computes `scaled_matmul` of them with the kernel
of that group.  Only kernels of groups with rows are read, and no more than one kernel is widened at a time.  The
tiles of a group begin at its first row.  The last one may reach into the next groups, whose own tiles come later and
overwrite what it wrote there; so rows need no padding between groups.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from .. import dtypes
from ..errors import UnsupportedCast
from ..formats import Format, ScaledArray, as_format
from ..targets import Target, here, targeting
from .face import scaled_matmuls

Kernel = jax.Array | ScaledArray

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}
"""The integers that have as many bytes."""

LARGEST_TILE = 512
"""Rows of the largest tile: with so many, reading a kernel again takes a small part of the time of its products."""

UNKNOWN_TILE = 32
"""Rows of a tile where the number of rows is symbolic, as in an exported program."""


def grouped_matmul(
    x: ArrayLike,
    kernel: ArrayLike | ScaledArray,
    group_sizes: ArrayLike,
    *,
    compute: Any = None,
    result: DTypeLike | None = None,
) -> jax.Array:
    """Returns the `scaled_matmul` (rows, out) of each group of rows of x with the group's own kernel.

    x            (rows, in)           f32, bf16 or f16, sorted by group
    kernel       (groups, out, in)    any float that is not narrow; or a ScaledArray
    group_sizes  (groups,) integers   rows of each group; their sum is `rows`
    compute      as for `scaled_matmul`
    result       likewise

    It is `jax.lax.ragged_dot` for kernels with scales, in the layout of checkpoints, and has gradients.

    >>> kernel = jnp.stack([jnp.eye(2), 10 * jnp.eye(2), 100 * jnp.eye(2)])
    >>> grouped_matmul(jnp.array([[1.0, 2.0], [3.0, 4.0]]), kernel, [1, 0, 1]).tolist()
    [[1.0, 2.0], [300.0, 400.0]]

    Raises:
      InvalidScale: if the shape of the scales does not fit the kernel.
      UnsupportedCast: if shapes or sizes do not match, or a dtype is not supported.
    """
    return grouped_matmuls(x, [kernel], group_sizes, compute=compute, result=result)[0]


def grouped_matmuls(
    x: ArrayLike,
    kernels: Sequence[ArrayLike | ScaledArray],
    group_sizes: ArrayLike,
    *,
    compute: Any = None,
    result: DTypeLike | None = None,
) -> tuple[jax.Array, ...]:
    """Returns the `grouped_matmul` of one x with each of several kernels of the same groups; out may differ."""
    x, sizes = jnp.asarray(x), jnp.asarray(group_sizes)
    arrays = tuple(kernel if isinstance(kernel, ScaledArray) else jnp.asarray(kernel) for kernel in kernels)
    for kernel in arrays:
        _check(x, kernel, sizes)
    options = _Options(
        None if compute is None else as_format(compute),
        np.dtype(x.dtype) if result is None else dtypes.as_dtype(result),
        here(),
    )
    return _compiled(options, x, arrays, sizes.astype(jnp.int32)) if arrays else ()


@dataclasses.dataclass(frozen=True)
class _Options:
    """The static arguments of a product, and the target for which it is traced."""

    compute: Format | None
    result: np.dtype
    target: Target

    def products(self, x: jax.Array, kernels: Sequence[Kernel]) -> tuple[jax.Array, ...]:
        """Returns the products of rows of one group."""
        with targeting(self.target):
            return scaled_matmuls(
                x,
                [kernel if isinstance(kernel, ScaledArray) else (kernel, None) for kernel in kernels],
                compute=self.compute,
                result=self.result,
            )


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
        """Returns the tiles of `rows` rows in groups of these sizes."""
        height, ends = tile_height(rows, sizes.shape[0]), jnp.cumsum(sizes)
        return cls(height, ends - sizes, ends, jnp.cumsum(-(-sizes // height)))

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


def tile_height(rows: Any, groups: int) -> int:
    """Returns the rows of a tile: a power of two of about twice the average group, so that few groups have two tiles.

    >>> tile_height(8, 128), tile_height(4096, 128), tile_height(2**20, 8)
    (1, 64, 512)
    """
    if not isinstance(rows, int):
        return UNKNOWN_TILE
    return min(1 << max(-(-2 * rows // max(groups, 1)) - 1, 0).bit_length(), LARGEST_TILE)


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


@functools.partial(jax.jit, static_argnums=0)
def _compiled(options: _Options, x: jax.Array, kernels: tuple[Kernel, ...], sizes: jax.Array) -> tuple[jax.Array, ...]:
    return _grouped(options, x, kernels, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(options: _Options, x: jax.Array, kernels: tuple[Kernel, ...], sizes: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the products for checked operands."""
    tiles = _Tiles.of(x.shape[0], sizes)
    padded = tiles.padded(x)

    def body(tile: jax.Array, results: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        group, start = tiles.place(tile)
        products = options.products(tiles.rows(padded, start), _of_group(kernels, group))
        return tuple(_updated(bits, product, start) for bits, product in zip(results, products, strict=True))

    zeros = tuple(_no_bits((padded.shape[0], kernel.shape[1]), options.result) for kernel in kernels)
    results = jax.lax.fori_loop(0, tiles.counts[-1], body, zeros)
    return tuple(jax.lax.bitcast_convert_type(bits[: x.shape[0]], options.result) for bits in results)


def _forward(options: _Options, x: jax.Array, kernels: tuple[Kernel, ...], sizes: jax.Array) -> Any:
    return _grouped(options, x, kernels, sizes), (x, kernels, sizes)


def _backward(options: _Options, residuals: Any, gradients: tuple[jax.Array, ...]) -> Any:
    """Returns the gradients of x and of the kernels, None for a ScaledArray: those of `scaled_matmul`, tile by tile."""
    x, kernels, sizes = residuals
    tiles = _Tiles.of(x.shape[0], sizes)
    padded, padded_gradients = tiles.padded(x), tuple(map(tiles.padded, gradients))
    trained = [i for i, kernel in enumerate(kernels) if not isinstance(kernel, ScaledArray)]

    def body(tile: jax.Array, sums: tuple[jax.Array, list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
        dx, dkernels = sums
        group, start = tiles.place(tile)
        of_group = _of_group(kernels, group)

        def products(rows: jax.Array, wide: list[Kernel]) -> tuple[jax.Array, ...]:
            chosen = dict(zip(trained, wide, strict=True))
            return options.products(rows, [chosen.get(i, kernel) for i, kernel in enumerate(of_group)])

        _, pull_back = jax.vjp(products, tiles.rows(padded, start), [of_group[i] for i in trained])
        in_group = (start + jnp.arange(tiles.height) < tiles.ends[group])[:, None]
        rows = tuple(tiles.rows(gradient, start) for gradient in padded_gradients)
        d_rows, d_wide = pull_back(tuple(jnp.where(in_group, each, jnp.zeros_like(each)) for each in rows))
        dx = _updated(dx, d_rows, start)
        # In float32, since a group may have many tiles.
        return dx, [total.at[group].add(one.astype(total.dtype)) for total, one in zip(dkernels, d_wide, strict=True)]

    zeros = [
        jnp.zeros(kernels[i].shape, jnp.float64 if kernels[i].dtype == jnp.float64 else jnp.float32) for i in trained
    ]
    dx, dkernels = jax.lax.fori_loop(0, tiles.counts[-1], body, (_no_bits(padded.shape, x.dtype), zeros))
    found = {i: total.astype(kernels[i].dtype) for i, total in zip(trained, dkernels, strict=True)}
    gradient = jax.lax.bitcast_convert_type(dx[: x.shape[0]], x.dtype)
    return gradient, tuple(found.get(i) for i in range(len(kernels))), None


_grouped.defvjp(_forward, _backward)


def _check(x: jax.Array, kernel: Kernel, sizes: jax.Array) -> None:
    if kernel.ndim != 3 or x.ndim != 2 or x.shape[-1] != kernel.shape[-1]:
        raise UnsupportedCast(
            f"x of shape {x.shape} and a kernel of shape {kernel.shape} do not match: expected (rows, in) and "
            "(groups, out, in)."
        )
    if not isinstance(kernel, ScaledArray) and dtypes.is_narrow(np.dtype(kernel.dtype)):
        raise UnsupportedCast(f"a kernel of {kernel.dtype} needs scales. Pass a ScaledArray.")
    if sizes.shape != kernel.shape[:1] or not jnp.issubdtype(sizes.dtype, jnp.integer) or not sizes.shape[0]:
        raise UnsupportedCast(
            f"group_sizes: expected integers of shape ({kernel.shape[0]},), one for each kernel, found {sizes.dtype} "
            f"{sizes.shape}."
        )
    if not isinstance(sizes, jax.core.Tracer):
        counts = np.asarray(sizes)
        if counts.sum() != x.shape[0] or (counts < 0).any():
            raise UnsupportedCast(
                f"group_sizes: expected sizes of 0 or more whose sum is the {x.shape[0]} rows of x, found "
                f"{counts.tolist()[:8]} with the sum {counts.sum()}."
            )
