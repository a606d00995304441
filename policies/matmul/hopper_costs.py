"""Estimated costs of the Hopper kernels, by which calls are given to them and divided among thread blocks.

Without Pallas, since plans need the costs on any machine.  The unit is a step: a thread block multiplies 128 columns
of a tile.  With tiles of 128×128, a model of an H200 has 0.3 to 0.6 µs for it.  No cost was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

TILE = 128
"""Rows of a kernel in a tile, the largest number of rows of x in it, and columns of a step."""

FILL = 4
"""Steps to fill and drain the pipeline of a thread block."""

LAUNCH = 7
"""Steps that another launch costs, such as that which adds partial sums: about 3 µs, most of it latency."""

STEP_BYTES = 2**21
"""Bytes of device memory that a GPU reads or writes in the time of a step, at 4 to 5 TB/s."""

MARGIN = 0.9
"""`hopper columns` is preferred to `hopper rows` for many rows if its cost is less than this part of the other's: the
latter's order of tiles makes better use of the second-level cache, which these costs do not contain."""


def row_tile(rows: int) -> int:
    """Returns the number of rows of x in a tile: the smallest of 8, 16, … 128 that is at least `rows`, or 128."""
    tile: int = min(max(8, 2 ** math.ceil(math.log2(max(rows, 1)))), TILE)
    return tile


def splits(tiles: int, steps: int, tile: int, processors: int) -> int:
    """Returns the number of thread blocks among which `hopper columns` splits the columns of each tile.

    tiles       number of tiles of the result
    steps       number of steps of each tile
    tile        rows of x in a tile
    processors  streaming multiprocessors of the GPU

    >>> splits(32, 32, 8, 132), splits(192, 32, 8, 132), splits(1187, 32, 8, 132)
    (4, 2, 1)
    """
    counts = (count for count in range(1, steps + 1) if steps % count == 0)
    return min(counts, key=lambda count: _split_cost(count, tiles, steps, tile, processors))


def _split_cost(count: int, tiles: int, steps: int, tile: int, processors: int) -> float:
    """Returns the steps of tiles that are split among `count` thread blocks each.

    A wave of `processors` blocks takes the steps of one of them, those to fill and drain the pipeline, and for partial
    sums the bytes written and read as a fraction of the bytes of a step.
    """
    partial = 4 * tile / (64 + tile) if count > 1 else 0
    return math.ceil(tiles * count / processors) * (steps // count + FILL + partial)


def tiles_of(rows: int, outs: Sequence[int]) -> int:
    """Returns the number of tiles of the products of x with kernels that have `outs` rows."""
    return math.ceil(rows / row_tile(rows)) * sum(outs) // TILE


def columns_cost(rows: int, outs: Sequence[int], features: int, processors: int) -> float:
    """Returns the steps of one launch of `hopper columns`, and of the one that adds its partial sums.

    rows        rows of x
    outs        rows of each kernel
    features    columns of x and of the kernels
    processors  streaming multiprocessors of the GPU

    >>> columns_cost(128, [1024], 4096, 132), columns_cost(512, [4096], 4096, 132)
    (15.666666666666666, 36)
    """
    call = tiles_of(rows, outs), features // TILE, row_tile(rows), processors
    count = splits(*call)
    return _split_cost(count, *call) + LAUNCH * (count > 1)


def rows_cost(rows: int, outs: Sequence[int], features: int, processors: int) -> float:
    """Returns the steps of `hopper rows`, which launches each kernel by itself; arguments as for `columns_cost`.

    Its thread blocks fill their pipelines once, since these go on across tiles.

    >>> rows_cost(128, [1024], 4096, 132), rows_cost(512, [4096], 4096, 132)
    (36, 36)
    """
    waves = (math.ceil(tiles_of(rows, [out]) / processors) for out in outs)
    return sum(count * (features // TILE) + FILL for count in waves) + LAUNCH * (len(outs) - 1)


def shared_cost(rows: int, outs: Sequence[int], features: int, processors: int, itemsize: int) -> float:
    """Returns the steps of one launch of `hopper columns`, and of copies that separate the results of the kernels.

    itemsize  bytes of an element of the results

    XLA may avoid the copies, where it slices the results in the operations that read them.
    """
    copied = 2 * rows * sum(outs) * itemsize if len(outs) > 1 else 0
    return columns_cost(rows, outs, features, processors) + copied / STEP_BYTES


def apart_cost(rows: int, outs: Sequence[int], features: int, processors: int) -> float:
    """Returns the steps of `hopper columns` with a launch for each kernel; arguments as for `columns_cost`."""
    return sum(columns_cost(rows, [out], features, processors) for out in outs) + LAUNCH * (len(outs) - 1)
