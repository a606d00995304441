"""Reading safetensors without torch: a header that is checked, and tensors read into memory of our own.

The format (https://github.com/huggingface/safetensors): eight bytes of little-endian length, a JSON header, the data.
Nothing is memory-mapped: a mapped file that is truncated meanwhile kills the process.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from typing import Any, BinaryIO

import numpy as np

from ...policies.dtypes import as_dtype
from ...policies.errors import InvalidCheckpoint, MissingFile, UnknownDtype, shown
from ..json_file import LARGEST, parse_object

ALIGNMENT = 64
"""Bytes; XLA's CPU backend adopts a buffer that is aligned so, and copies any other."""

_MOST_AXES = 8
_DTYPES = frozenset("F64 F32 F16 BF16 F8_E4M3 F8_E5M2 F8_E8M0 I64 I32 I16 I8 U64 U32 U16 U8 BOOL C64".split())


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: `bytes` bytes of `file` from `offset` on, an array of `shape` and `dtype`.

    file_bytes  the length of the file when its header was read
    """

    name: str
    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    file_bytes: int

    @property
    def bytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, start: int = 0, stop: int | None = None, into: np.ndarray | None = None) -> np.ndarray:
        """Rows `start` to `stop` of the first axis, in memory of our own that is aligned to 64 bytes, or in `into`.

        into  contiguous, of the rows' shape and dtype

        Raises:
          InvalidCheckpoint: where the file has changed its length since its header was read, or cannot be read.
        """
        shape, row = self.shape, 0
        if shape:
            start, stop, _ = slice(start, stop).indices(shape[0])
            shape, row = (max(stop - start, 0), *shape[1:]), self.bytes // max(shape[0], 1)
        if into is None:
            into = aligned_empty(math.prod(shape) * self.dtype.itemsize).view(self.dtype).reshape(shape)
        assert into.shape == shape
        assert into.dtype == self.dtype
        buffer, done = into.reshape(-1).view(np.uint8), 0
        try:
            with open(self.file, "rb", buffering=0) as file:
                if (size := os.fstat(file.fileno()).st_size) != self.file_bytes:
                    raise _damaged(self.file, f"it had {self.file_bytes} bytes when it was opened and has {size} now")
                file.seek(self.offset + start * row)
                while done < buffer.nbytes:
                    count = file.readinto(buffer.data[done:])
                    if not count:
                        text = f"{shown(self.name)} ends {buffer.nbytes - done} bytes early"
                        raise _damaged(self.file, text)
                    done += count
        except OSError as error:
            raise InvalidCheckpoint(f"{self.file}: {shown(self.name)} cannot be read: {error}.") from error
        return into


def read_header(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in the order of the data.

    Raises:
      MissingFile: where there is no such file.
      InvalidCheckpoint: a header that is cut short, malformed, or at odds with the length of the file: every byte of
        data belongs to exactly one tensor.
    """
    path = pathlib.Path(path)
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise _damaged(path, "this is no file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, start = _header(path, file, size)
    except FileNotFoundError as error:
        raise MissingFile(f"{path}: there is no such file. Is the download complete?") from error
    except OSError as error:
        raise InvalidCheckpoint(f"{path}: cannot be read: {error}.") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _damaged(path, f"__metadata__ is no mapping from text to text but {shown(metadata)}")
    entries = [_entry(path, name, entry, size) for name, entry in header.items()]
    end, tensors = 0, {}
    for (first, last), tensor in sorted(entries, key=lambda entry: entry[0]):
        if first != end:
            what = "overlaps the tensor before it" if first < end else "leaves a hole before it"
            where = f"{shown(tensor.name)} lies at bytes {first} to {last}"
            raise _damaged(path, f"{where}, which {what} (data up to {end})")
        end = last
        tensors[tensor.name] = dataclasses.replace(tensor, offset=start + first)
    if start + end != size:
        raise _damaged(path, f"the header promises {start + end} bytes, the file has {size}")
    return tensors


def aligned_empty(count: int) -> np.ndarray:
    """`count` uninitialised bytes that begin at a multiple of 64."""
    raw = np.empty(count + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + count]


def _damaged(path: pathlib.Path, text: str) -> InvalidCheckpoint:
    return InvalidCheckpoint(f"{path}: {text}. The file is damaged or incomplete: fetch it again.")


def _header(path: pathlib.Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header and the byte at which data begins."""
    if size < 8:
        raise _damaged(path, f"a safetensors file begins with eight bytes of length, this one has {size} bytes")
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, LARGEST):
        claim = f"the header claims {length} bytes, the file has {size - 8} after its first eight"
        raise _damaged(path, f"{claim}, and no header needs more than {LARGEST >> 20} MiB")
    try:
        return parse_object(file.read(length)), 8 + length
    except ValueError as error:
        raise _damaged(path, f"the header: {error}") from error


def _entry(path: pathlib.Path, name: str, entry: Any, size: int) -> tuple[tuple[int, int], Tensor]:
    """A tensor of a file of `size` bytes and its data offsets, each checked for itself."""
    if not name.isprintable():
        raise _damaged(path, f"{shown(name)} is no name of a tensor")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"{shown(name)} has no dtype, shape and data_offsets")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"{shown(name)} has shape {shown(shape)} and data_offsets {shown(offsets)}")
    if len(shape) > _MOST_AXES:
        raise _damaged(path, f"{shown(name)} has {len(shape)} axes, and no tensor here needs more than {_MOST_AXES}")
    if not isinstance(dtype_name, str) or dtype_name not in _DTYPES:
        raise InvalidCheckpoint(f"{path}: {shown(name)} has the dtype {shown(dtype_name)}, which perparam cannot read.")
    try:
        # Named as in the header; as_dtype refuses F64 while JAX has no 64-bit floats.
        dtype = as_dtype(dtype_name)
    except UnknownDtype as error:
        raise InvalidCheckpoint(f"{path}: {shown(name)}: {error}") from error
    if math.prod(side or 1 for side in shape) >= 2**48:  # numpy counts so too, whatever is multiplied by none
        raise _damaged(path, f"{shown(name)} has shape {shown(shape)}, larger than any array")
    tensor, (first, last) = Tensor(name, path, tuple(shape), dtype, 0, size), offsets
    if tensor.bytes != last - first:
        raise _damaged(
            path,
            f"{shown(name)}, {dtype_name} {tensor.shape}, is {tensor.bytes} bytes, its offsets say {last - first}",
        )
    return (first, last), tensor


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
