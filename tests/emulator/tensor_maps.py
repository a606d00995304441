"""Copies of boxes between global and shared memory, as tensor maps describe them."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from .faults import Misaligned, OutOfBounds

NO_SWIZZLE = 16
"""Bytes within which rows are swizzled if they are not: units of 16 bytes stay in order."""

ALIGNMENT = {16: 128, 32: 256, 64: 512, 128: 1024}
"""Bytes of which a box's address in shared memory has to be a multiple, by swizzle: a tensor copy needs 128, and the
pattern of a swizzle repeats after eight rows."""


def swizzled(addresses: np.ndarray, swizzle: int) -> np.ndarray:
    """Returns the addresses at which bytes are that would be at `addresses` without swizzle.

    >>> swizzled(np.array([0, 128, 256 + 16]), 128).tolist()
    [0, 144, 304]
    """
    return addresses ^ ((addresses >> 3) & (swizzle - 16))


class Global:
    """Global memory: arrays of bytes at addresses far from each other."""

    def __init__(self, arrays: list[np.ndarray]):
        self.arrays = arrays

    @property
    def addresses(self) -> list[int]:
        return [(i + 1) << 40 for i in range(len(self.arrays))]

    def locate(self, addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the array that the addresses are in, and the indices of their bytes."""
        number, offsets = int(addresses.flat[0] >> 40) - 1, addresses & ((1 << 40) - 1)
        if not 0 <= number < len(self.arrays) or (addresses >> 40 != number + 1).any():
            raise OutOfBounds(f"global address {int(addresses.flat[0]):#x} is in no operand")
        if offsets.max() >= self.arrays[number].size:
            raise OutOfBounds(f"byte {offsets.max()} of global operand {number}, which has {self.arrays[number].size}")
        return self.arrays[number], offsets

    def read(self, addresses: np.ndarray) -> np.ndarray:
        array, offsets = self.locate(addresses)
        return array[offsets]

    def write(self, addresses: np.ndarray, values: np.ndarray) -> None:
        array, offsets = self.locate(addresses)
        array[offsets] = values


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """A tensor map, all dimensions from the slowest to the fastest.

    base      address in global memory
    itemsize  bytes of an element
    sizes     elements of the tensor, (rank,)
    strides   elements between neighbours, (rank,)
    box       elements of a copy, (rank,)
    swizzle   bytes within which rows of the box are swizzled in shared memory: 16 (not), 32, 64 or 128
    """

    base: int
    itemsize: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int

    def __post_init__(self) -> None:
        row = self.box[-1] * self.itemsize
        if self.base % 16 or row % 16 or any(stride * self.itemsize % 16 for stride in self.strides[:-1]):
            raise Misaligned(f"base, rows and strides of a tensor map are multiples of 16 bytes: {self}")
        if self.strides[-1] != 1 or max(self.box) > 256 or (self.swizzle > NO_SWIZZLE and row > self.swizzle):
            raise OutOfBounds(
                f"a tensor map has a box of up to 256 elements a side, and of its swizzle's bytes: {self}"
            )

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.itemsize

    @functools.cached_property
    def _grid(self) -> list[np.ndarray]:
        rank = len(self.box)
        return [np.arange(side).reshape([-1 if i == j else 1 for j in range(rank)]) for i, side in enumerate(self.box)]

    def _elements(self, start: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the global addresses of a box's bytes (bytes,), and which of them are within the tensor."""
        places = [grid + first for grid, first in zip(self._grid, start, strict=True)]
        offsets = sum(place * stride for place, stride in zip(places, self.strides, strict=True))
        inside = np.ones(self.box, bool)
        for place, size in zip(places, self.sizes, strict=True):
            inside = inside & (place >= 0) & (place < size)
        addresses = self.base + np.broadcast_to(offsets, self.box).reshape(-1, 1) * self.itemsize
        each = addresses + np.arange(self.itemsize)
        return each.reshape(-1), np.repeat(inside.reshape(-1), self.itemsize)

    def load(self, memory: Global, start: tuple[int, ...]) -> np.ndarray:
        """Returns the bytes of the box at `start`, zero outside of the tensor."""
        addresses, inside = self._elements(start)
        data = np.zeros(addresses.size, np.uint8)
        if inside.any():
            data[inside] = memory.read(addresses[inside])
        return data

    def store(self, memory: Global, start: tuple[int, ...], data: np.ndarray) -> None:
        """Writes the bytes of a box, except those outside of the tensor."""
        addresses, inside = self._elements(start)
        if inside.any():
            memory.write(addresses[inside], data[inside])

    def places(self, address: int) -> np.ndarray:
        """Returns the addresses in shared memory of the bytes of a box that begins at `address`."""
        if address % ALIGNMENT[self.swizzle]:
            raise Misaligned(
                f"shared address {address:#x} of a tensor copy with swizzle {self.swizzle} is no multiple of"
                f" {ALIGNMENT[self.swizzle]}"
            )
        addresses = address + np.arange(self.bytes)
        return swizzled(addresses, self.swizzle) if self.swizzle > NO_SWIZZLE else addresses
