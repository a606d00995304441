"""`runs`: where the bytes of a part of an array are in the array's data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def runs(shape: Sequence[int], box: Sequence[tuple[int, int]], itemsize: int) -> tuple[np.ndarray, int]:
    """`(places, gap)`: the first byte of each run of contiguous bytes, and the bytes between two; all are equally long.

    box  start and stop along each axis, in `shape`

    >>> runs((4, 100), ((1, 3), (20, 30)), itemsize=2)  # two rows, ten columns of each
    (array([240, 440]), 180)
    """
    extents = [stop - start for start, stop in box]
    strides = [math.prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape))]
    cut = max((axis for axis, size in enumerate(shape) if extents[axis] != size), default=0)
    if not shape:
        return np.zeros(1, np.int64), 0
    places = np.zeros(1, np.int64)
    for axis in range(cut):
        steps = (box[axis][0] + np.arange(extents[axis])) * strides[axis]
        places = np.add.outer(places, steps).reshape(-1)
    length = extents[cut] * strides[cut]
    return places + box[cut][0] * strides[cut], strides[cut - 1] - length if cut else 0
