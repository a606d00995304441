"""Reading of safetensors files without torch: their headers, strictly checked, and rows of their tensors.

The format (https://github.com/huggingface/safetensors) is eight bytes of little-endian length, a JSON header, the data.
Files are not memory-mapped, since access to a mapped file that was truncated kills the process.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...policies.blocks import Block, as_block
from ...policies.dtypes import as_dtype
from ...policies.errors import InvalidCheckpoint, MissingFile, shown
from ..json_file import LARGEST, parse_object
from ..layout import BLOCKS
from .runs import runs

Box = tuple[tuple[int, int], ...]

ALIGNMENT = 64
"""In bytes; XLA's CPU backend uses a buffer with this alignment without a copy."""

PAGE = 4096
"""In bytes. Fewer bytes than these between two runs of needed bytes are read too, since the system reads whole pages.

On 2 CPU cores, for files in memory, reading what is between is faster than a call for each run up to about 12 KiB; a
disk or a network takes longer for these bytes.
"""

_CHUNK = 2**20  # bytes that are read at a time where columns are copied out of whole rows
_MOST_AXES = 8
_DTYPES = frozenset("F64 F32 F16 BF16 F8_E4M3 F8_E5M2 F8_E8M0 I64 I32 I16 I8 U64 U32 U16 U8 BOOL C64".split())


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a safetensors file.

    name        in the file
    file        path of the file
    shape       of the array
    dtype       of the array
    offset      position of the data in the file, in bytes
    file_bytes  length of the file when its header was read
    block       the block of its scales, if the file's metadata has it
    """

    name: str
    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    file_bytes: int
    block: Block | None = None

    @property
    def bytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(
        self,
        start: int = 0,
        stop: int | None = None,
        into: np.ndarray | None = None,
        within: Sequence[tuple[int, int]] | None = None,
    ) -> np.ndarray:
        """Rows `start` to `stop` along the first axis, in `into` or in new memory aligned to 64 bytes.

        into    contiguous array of the result's shape and dtype; None: allocate one
        within  start and stop along each of the other axes; None: all of them

        Of the bytes outside `within`, only runs shorter than PAGE are read.

        Raises:
          InvalidCheckpoint: the length of the file has changed since its header was read, or it cannot be read.
        """
        shape, first = self.shape, 0
        sides = tuple(within) if within is not None else tuple((0, size) for size in shape[1:])
        if shape:
            first, last, _ = slice(start, stop).indices(shape[0])
            shape = (max(last - first, 0), *(high - low for low, high in sides))
        if into is None:
            into = aligned_empty(math.prod(shape) * self.dtype.itemsize).view(self.dtype).reshape(shape)
        assert into.shape == shape
        assert into.dtype == self.dtype
        try:
            with open(self.file, "rb", buffering=0) as file:
                if (size := os.fstat(file.fileno()).st_size) != self.file_bytes:
                    raise _damaged(self.file, f"it had {self.file_bytes} bytes when it was opened and has {size} now")
                self._fill(file, () if not shape else ((first, first + shape[0]), *sides), into)
        except OSError as error:
            raise InvalidCheckpoint(f"{self.file}: {shown(self.name)} cannot be read: {error}.") from error
        return into

    def _fill(self, file: io.FileIO, box: Box, into: np.ndarray) -> None:
        """Reads a part of the tensor into an array; `box` has start and stop along each axis."""
        if not into.size:
            return
        places, gap = runs(self.shape, box, self.dtype.itemsize)
        if len(places) == 1 or gap >= PAGE:
            for place, part in zip(places.tolist(), into.reshape(len(places), -1), strict=True):
                self._fill_bytes(file, place, part)
            return
        row, columns = self.bytes // self.shape[0], tuple(slice(*side) for side in box[1:])
        height = min(max(_CHUNK // row, 1), len(into))
        whole = aligned_empty(height * row).view(self.dtype).reshape(height, *self.shape[1:])
        for start in range(0, len(into), height):
            rows = whole[: len(into) - start]
            self._fill_bytes(file, (box[0][0] + start) * row, rows)
            into[start : start + len(rows)] = rows[(slice(None), *columns)]

    def _fill_bytes(self, file: io.FileIO, start: int, into: np.ndarray) -> None:
        """Reads into an array the tensor's data from byte `start` on."""
        buffer, done = into.reshape(-1).view(np.uint8), 0
        file.seek(self.offset + start)
        while done < buffer.nbytes:
            count = file.readinto(buffer.data[done:])
            if not count:
                text = f"the file ends within {shown(self.name)}, at byte {done} of {buffer.nbytes}"
                raise _damaged(self.file, text)
            done += count


def read_header(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """{name: tensor} of a safetensors file, in the order of the data.

    Raises:
      MissingFile: there is no such file.
      InvalidCheckpoint: a header that is truncated or malformed, or does not fit the length of the file; every byte of
        data must belong to exactly one tensor.
    """
    path = pathlib.Path(path)
    try:
        if path.exists() and not path.is_file():  # opening a pipe would block
            raise _damaged(path, "not a regular file")
        with open(path, "rb") as file:
            return tensors_of(path, file.read, os.fstat(file.fileno()).st_size)
    except FileNotFoundError as error:
        raise MissingFile(f"{path}: there is no such file. Is the download complete?") from error
    except OSError as error:
        raise InvalidCheckpoint(f"{path}: cannot be read: {error}.") from error


def tensors_of(path: pathlib.Path, read: Callable[[int], bytes], size: int) -> dict[str, Tensor]:
    """{name: tensor} of a safetensors file; see `read_header`.

    path  of the file, for errors and for the tensors
    read  returns the next bytes of the file, at most as many as it is asked for; only the header is read
    size  length of the file in bytes
    """
    header, start = _header(path, read, size)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _damaged(path, f"__metadata__: expected a mapping from text to text, found {shown(metadata)}")
    blocks = _blocks(path, metadata.get(BLOCKS, "{}"))
    entries = [_entry(path, name, entry, size) for name, entry in header.items()]
    end, tensors = 0, {}
    for (first, last), tensor in sorted(entries, key=lambda entry: entry[0]):
        if first != end:
            what = "overlaps the tensor before it" if first < end else "leaves a gap before it"
            where = f"{shown(tensor.name)} is at bytes {first} to {last}"
            raise _damaged(path, f"{where}, which {what} (it ends at {end})")
        end = last
        tensors[tensor.name] = dataclasses.replace(tensor, offset=start + first, block=blocks.get(tensor.name))
    if start + end != size:
        raise _damaged(path, f"the header describes {start + end} bytes, the file has {size}")
    return tensors


def aligned_empty(count: int) -> np.ndarray:
    """`count` uninitialised bytes, aligned to 64 bytes."""
    raw = np.empty(count + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + count]


def _damaged(path: pathlib.Path, text: str) -> InvalidCheckpoint:
    return InvalidCheckpoint(f"{path}: {text}. The file is damaged or incomplete: fetch it again.")


def _header(path: pathlib.Path, read: Callable[[int], bytes], size: int) -> tuple[dict[str, Any], int]:
    """The JSON header, and the offset of the data in bytes."""
    if size < 8:
        raise _damaged(path, f"a safetensors file begins with eight bytes of length, this one has {size} bytes")
    length = int.from_bytes(read(8), "little")
    if length > min(size - 8, LARGEST):
        claim = f"the header has a length of {length} bytes, the file has {size - 8} after its first eight"
        raise _damaged(path, f"{claim}, and the limit is {LARGEST >> 20} MiB")
    try:
        return parse_object(read(length)), 8 + length
    except ValueError as error:
        raise _damaged(path, f"the header: {error}") from error


def _blocks(path: pathlib.Path, text: str) -> dict[str, Block]:
    """{tensor name: block} in the metadata that perparam writes."""
    try:
        return {name: as_block(block) for name, block in parse_object(text.encode()).items()}
    except (ValueError, TypeError) as error:
        raise _damaged(path, f"{BLOCKS} in __metadata__: {error}") from error


def _entry(path: pathlib.Path, name: str, entry: Any, size: int) -> tuple[tuple[int, int], Tensor]:
    """`((start, stop), tensor)` of a header's entry in a file of `size` bytes, with `offset` still 0."""
    if not name.isprintable():
        raise _damaged(path, f"{shown(name)} is not a valid name of a tensor")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"{shown(name)}: expected dtype, shape and data_offsets, and nothing else")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"{shown(name)} has shape {shown(shape)} and data_offsets {shown(offsets)}")
    if len(shape) > _MOST_AXES:
        raise _damaged(path, f"{shown(name)} has {len(shape)} axes, and the limit is {_MOST_AXES}")
    if not isinstance(dtype_name, str) or dtype_name not in _DTYPES:
        raise InvalidCheckpoint(f"{path}: {shown(name)} has the dtype {shown(dtype_name)}, which perparam cannot read.")
    dtype = np.dtype(np.float64) if dtype_name == "F64" else as_dtype(dtype_name)  # without jax_enable_x64 too
    if math.prod(side or 1 for side in shape) >= 2**48:  # numpy has this limit even if another axis is empty
        raise _damaged(path, f"{shown(name)} has shape {shown(shape)}, larger than any array")
    tensor, (first, last) = Tensor(name, path, tuple(shape), dtype, 0, size), offsets
    if tensor.bytes != last - first:
        raise _damaged(
            path,
            f"{shown(name)}, {dtype_name} {tensor.shape}, has {tensor.bytes} bytes, its offsets span {last - first}",
        )
    return (first, last), tensor


def _are_sizes(values: Any) -> bool:
    """Whether `values` is a list of integers from 0 to 2**63 - 1."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
