"""Rows of arrays that are to be saved, read from their devices or from the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from ..policies.errors import UnsupportedExport
from .placement import box_of


@dataclasses.dataclass(frozen=True)
class ArrayRows:
    """A source of the rows of one array; see `slabs.Source`.

    path   of the parameter, for errors
    array  on its devices or on the host
    """

    path: str
    array: jax.Array | np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        """The array's dtype, in the byte order of this machine."""
        return self.array.dtype.newbyteorder("=")

    def read(
        self,
        start: int = 0,
        stop: int | None = None,
        into: np.ndarray | None = None,
        within: Sequence[tuple[int, int]] | None = None,
    ) -> np.ndarray:
        """Rows `start` to `stop`, on the host; `into` and `within` are not used.

        Raises:
          UnsupportedExport: an array with parts on devices of other processes.
        """
        if not isinstance(self.array, jax.Array) or not self.shape:
            array = np.asarray(self.array)
            return (array[start:stop] if self.shape else array).astype(self.dtype, copy=False)
        if not self.array.is_fully_addressable:
            raise UnsupportedExport(f"{self.path}: is stored on devices of other processes. Gather it first.")
        shards = {box_of(shard.index, self.shape): shard.data for shard in self.array.addressable_shards}
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        if len(shards) == 1:
            (data,) = shards.values()
            return rows_on_host(data, start, stop)
        rows = np.empty((stop - start, *self.shape[1:]), self.dtype)
        for ((first, last), *rest), data in shards.items():
            low, high = max(start, first), min(stop, last)
            if low < high:
                columns = tuple(slice(*side) for side in rest)
                rows[(slice(low - start, high - start), *columns)] = rows_on_host(data, low - first, high - first)
        return rows


def rows_on_host(array: jax.Array, start: int, stop: int) -> np.ndarray:
    """Rows `start` to `stop` of an array on one device, on the host.

    On other devices than a CPU they are sliced there, by one program for all slabs: converting the array itself would
    keep a copy of it on the host.
    """
    if all(device.platform == "cpu" for device in array.devices()):
        return np.asarray(array)[start:stop]
    return np.asarray(jax.lax.dynamic_slice_in_dim(array, start, stop - start))
