"""Arrays that are built from rows and placed on their devices, each device with only its slice."""

from __future__ import annotations

import math

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

    def needs(self, start: int, stop: int) -> bool:
        """Whether a device of this process holds any of rows `start` to `stop`."""
        return any(_meets(box, start, stop) for box in self._slices)

    def buffer(self, start: int, stop: int) -> np.ndarray | None:
        """Memory of rows `start` to `stop`, if exactly one slice contains them, in full width; else None."""
        for box, array in self._slices.items():
            if not box:
                return array
            (first, last), *rest = box
            whole = all(side == (0, size) for side, size in zip(rest, self.shape[1:], strict=True))
            if whole and first <= start and stop <= last and sum(_meets(box, start, stop) for box in self._slices) == 1:
                return array[start - first : stop - first]
        return None

    def write(self, start: int, rows: np.ndarray) -> None:
        """Copies `rows` into the array, from row `start` on."""
        if not self.shape:
            for array in self._slices.values():
                array[...] = rows
            return
        for box, array in self._slices.items():
            (first, last), *rest = box
            low, high = max(start, first), min(start + len(rows), last)
            if low < high:
                columns = tuple(slice(*side) for side in rest)
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
            result = jax.make_array_from_single_device_arrays(self.shape, self.sharding, parts)
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
