"""Tiles of rows that are sorted by group: which group and which rows each tile has, for `hopper_grouped_kernel`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from .hopper_costs import row_tile

ALIGNMENT = 8
"""First rows of tiles are multiples of this, as tensor copies of swizzled tiles require.  So x needs no padding between
groups: a tile may begin with up to 7 rows of another group, and end with others, whose results nobody reads."""


def tile_height(rows: int, groups: int) -> int:
    """Returns the rows of a tile, 8 to 128: at least twice the average group, so that few groups have two tiles.

    Up to 64 rows there are 4 more for what a tile has of other groups: with so few rows, most bytes that a step copies
    are those of the kernel, which a second tile of the group would copy and widen again.

    >>> tile_height(8, 128), tile_height(512, 128), tile_height(4096, 128), tile_height(32768, 128)
    (8, 16, 64, 128)
    """
    twice = -(-2 * rows // groups)
    return max(row_tile(twice), min(row_tile(twice + ALIGNMENT // 2), 64))


def most_tiles(rows: int, groups: int, height: int) -> int:
    """Returns the largest number of tiles that groups of altogether `rows` rows can have.

    >>> most_tiles(8, 128, 8), most_tiles(32768, 128, 128)
    (8, 390)
    """
    used = min(rows, groups)
    # A group of n rows whose first tile begins up to 7 rows before it has at most 1 + (n + 6) // height tiles.  And
    # each of its tiles contains a multiple of 8 rows of x, of which groups share at most one with the next.
    return min(used + (rows + (ALIGNMENT - 2) * used) // height, -(-rows // ALIGNMENT) + used - 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowTiles:
    """The tiles of rows, in the order of the groups.

    height  rows of a tile
    until   (groups,)  int32  number of tiles of all groups up to and including each
    groups  (tiles,)   int32  group of each tile; of tiles beyond those of all groups, any
    starts  (tiles,)   int32  first row of each tile, divided by 8
    places  (rows,)    int32  where each row is among the rows of all tiles
    inside  (rows,)    bool   whether a group has the row: sizes may have a smaller sum than there are rows
    """

    height: int = dataclasses.field(metadata={"static": True})
    until: jax.Array
    groups: jax.Array
    starts: jax.Array
    places: jax.Array
    inside: jax.Array

    @classmethod
    def of(cls, rows: int, sizes: jax.Array) -> RowTiles:
        """Returns the tiles of `rows` rows in groups of `sizes` (groups,) int32, which end with the rows."""
        height = tile_height(rows, sizes.shape[0])
        last = max(-(-rows // ALIGNMENT) * ALIGNMENT - height, 0)  # the first row of the last tile within x
        ends = lax.min(_sums(lax.clamp(0, sizes, rows)), rows)
        first = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
        aligned = lax.sub(first, lax.rem(first, ALIGNMENT))
        until = _sums(jnp.where(ends > first, lax.div(ends - aligned + (height - 1), height), 0))
        before = jnp.concatenate([jnp.zeros_like(until[:1]), until[:-1]])

        def start_of(tile: jax.Array, group: jax.Array) -> jax.Array:
            return lax.min(aligned[group] + (tile - before[group]) * height, last)

        tile = lax.iota(jnp.int32, most_tiles(rows, sizes.shape[0], height))
        groups = _group_of(tile, until)
        row = lax.iota(jnp.int32, rows)
        group = _group_of(row, ends)
        own = before[group] + lax.div(row - aligned[group], height)
        places = own * height + row - start_of(own, group)
        return cls(height, until, groups, lax.div(start_of(tile, groups), ALIGNMENT), places, row < ends[-1])


def _sums(numbers: jax.Array) -> jax.Array:
    """Returns the sum of each number and those before it, as a reduction: `cumsum` is several launches on a GPU."""
    index = lax.iota(jnp.int32, numbers.shape[0])
    return jnp.where(index <= index[:, None], numbers, 0).sum(axis=1, dtype=jnp.int32)


def _group_of(index: jax.Array, ends: jax.Array) -> jax.Array:
    """Returns the group of each index by the ends of the groups; the last group for an index beyond all."""
    return lax.min((ends <= index[:, None]).sum(axis=1, dtype=jnp.int32), ends.shape[0] - 1)
