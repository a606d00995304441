"""Arrays that are built from rows and placed on their devices, each device with only its slice."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Sharding

from .safetensors.reader import aligned_empty

Box = tuple[tuple[int, int], ...]


class Placement:
    """A sink of rows (see `slabs.Sink`) that builds one array and places it on its devices.

    shape, dtype  those of the array
    sharding      None: JAX's default device

    Rows are collected in host memory, one buffer for each slice on devices of this process; on a CPU the buffers become
    the array without a copy.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding | None = None):
        self.shape, self.dtype, self.sharding = shape, dtype, sharding
        self._devices: dict[jax.Device | None, Box] = {None: tuple((0, size) for size in shape)}
        self._only_host = jax.dtypes.canonicalize_dtype(dtype) != dtype
        if sharding is not None and not self._only_host:
            places = sharding.addressable_devices_indices_map(shape)
            self._devices = {device: box_of(index or (), shape) for device, index in places.items()}
        self._slices = {box: _empty(box, dtype) for box in self._devices.values()}

    def box(self) -> Box | None:
        """The part of the array that contains all slices of this process; None: all of it."""
        if not self.shape:
            return None
        sides = zip(*self._slices, strict=True) if self._slices else [((0, 0),)] * len(self.shape)
        hull = tuple((min(low for low, _ in each), max(high for _, high in each)) for each in sides)
        return None if hull == tuple((0, size) for size in self.shape) else hull

    def needs(self, start: int, stop: int) -> bool:
        """Whether a device of this process holds any of rows `start` to `stop`."""
        return any(_meets(box, start, stop) for box in self._slices)

    def buffer(self, start: int, stop: int, within: Sequence[tuple[int, int]] | None = None) -> np.ndarray | None:
        """Memory of rows `start` to `stop`, if exactly one slice contains them, and it is `within` wide; else None.

        within  start and stop along each of the other axes; None: the whole width
        """
        sides = tuple(within) if within is not None else tuple((0, size) for size in self.shape[1:])
        for box, array in self._slices.items():
            if not box:
                return array
            (first, last), *rest = box
            inside = tuple(rest) == sides and first <= start and stop <= last
            if inside and sum(_meets(box, start, stop) for box in self._slices) == 1:
                return array[start - first : stop - first]
        return None

    def write(self, start: int, rows: np.ndarray, within: Sequence[tuple[int, int]] | None = None) -> None:
        """Copies `rows` into the array, from row `start` on.

        within  the part of the other axes that `rows` has; None: all
        """
        if not self.shape:
            for array in self._slices.values():
                array[...] = rows
            return
        for box, array in self._slices.items():
            (first, last), *rest = box
            low, high = max(start, first), min(start + len(rows), last)
            if low < high:
                begins = [0] * len(rest) if within is None else [begin for begin, _ in within]
                columns = tuple(slice(a - begin, b - begin) for (a, b), begin in zip(rest, begins, strict=True))
                array[low - first : high - first] = rows[(slice(low - start, high - start), *columns)]

    def array(self) -> jax.Array | np.ndarray:
        """The array; all rows must have been written, and none may be written after this call.

        A 64-bit array stays on the host while JAX has no 64-bit dtypes.
        """
        if self._only_host:
            (array,) = self._slices.values()
            return array
        if self.sharding is None:
            (array,) = self._slices.values()
            result = jax.device_put(array)
        else:
            parts = [jax.device_put(self._slices[box], device) for device, box in self._devices.items()]
            result = jax.make_array_from_single_device_arrays(self.shape, self.sharding, parts, dtype=self.dtype)
        return result.block_until_ready()  # so that host memory is free before more is read


def _meets(box: Box, start: int, stop: int) -> bool:
    """Whether a slice contains any of rows `start` to `stop`."""
    return not box or (box[0][0] < stop and start < box[0][1])


def box_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    """Start and stop of a slice along each axis."""
    whole = (*index, *(slice(None),) * (len(shape) - len(index)))
    return tuple(each.indices(size)[:2] for each, size in zip(whole, shape, strict=True))


def _empty(box: Box, dtype: np.dtype) -> np.ndarray:
    shape = tuple(stop - start for start, stop in box)
    return aligned_empty(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
