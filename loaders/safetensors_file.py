"""Reading safetensors without torch: a header that is checked, and tensors read into memory of our own.

The format (https://github.com/huggingface/safetensors): eight bytes of little-endian length, a JSON header, the data.
Nothing is memory-mapped: a mapped file that is truncated meanwhile kills the process.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from typing import Any, BinaryIO

import numpy as np

from ..policies.dtypes import as_dtype
from ..policies.errors import InvalidCheckpoint, MissingFile, UnknownDtype

ALIGNMENT = 64
"""Bytes; XLA's CPU backend adopts a buffer that is aligned so, and copies any other."""

_LARGEST_HEADER = 100_000_000  # bytes; the reference implementation's limit
_DTYPES = frozenset("F64 F32 F16 BF16 F8_E4M3 F8_E5M2 F8_E8M0 I64 I32 I16 I8 U64 U32 U16 U8 BOOL C64".split())


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: `bytes` bytes of `file` from `offset` on, an array of `shape` and `dtype`."""

    name: str
    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    @property
    def bytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in the order of the data.

    Raises:
      MissingFile: where there is no such file.
      InvalidCheckpoint: a header that is cut short, malformed, or at odds with the length of the file: every byte of
        data belongs to exactly one tensor.
    """
    path = pathlib.Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, start = _header(path, file, size)
    except FileNotFoundError as error:
        raise MissingFile(f"{path}: there is no such file. Is the download complete?") from error
    except OSError as error:
        raise InvalidCheckpoint(f"{path}: cannot be read: {error}.") from error
    header.pop("__metadata__", None)
    entries = [_entry(path, name, entry) for name, entry in header.items()]
    end, tensors = 0, {}
    for (first, last), tensor in sorted(entries, key=lambda entry: entry[0]):
        if first != end:
            what = "overlaps the tensor before it" if first < end else "leaves a hole before it"
            raise _damaged(path, f"{tensor.name!r} lies at bytes {first} to {last}, which {what} (data up to {end})")
        end = last
        tensors[tensor.name] = dataclasses.replace(tensor, offset=start + first)
    if start + end != size:
        raise _damaged(path, f"the header promises {start + end} bytes, the file has {size}")
    return tensors


def read_tensor(tensor: Tensor) -> np.ndarray:
    """The tensor as an array that owns its memory, aligned to 64 bytes.

    Raises:
      InvalidCheckpoint: where the file has become shorter since its header was read.
    """
    buffer = aligned_empty(tensor.bytes)
    try:
        with open(tensor.file, "rb", buffering=0) as file:
            file.seek(tensor.offset)
            done = 0
            while done < tensor.bytes:
                count = file.readinto(buffer.data[done:])
                if not count:
                    raise _damaged(tensor.file, f"{tensor.name!r} ends after {done} of {tensor.bytes} bytes")
                done += count
    except OSError as error:
        raise InvalidCheckpoint(f"{tensor.file}: {tensor.name!r} cannot be read: {error}.") from error
    return buffer.view(tensor.dtype).reshape(tensor.shape)


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
    if length > min(size - 8, _LARGEST_HEADER):
        raise _damaged(path, f"the header claims {length} bytes, the file has {size - 8} after its first eight")
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"the header is no JSON object of tensors ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, f"the header is no JSON object but {type(header).__name__}")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is written twice")
    return result


def _entry(path: pathlib.Path, name: str, entry: Any) -> tuple[tuple[int, int], Tensor]:
    """A tensor and its data offsets, each checked for itself."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"{name!r} has no dtype, shape and data_offsets")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"{name!r} has shape {shape!r} and data_offsets {offsets!r}")
    if not isinstance(dtype_name, str) or dtype_name not in _DTYPES:
        raise InvalidCheckpoint(f"{path}: {name!r} has the dtype {dtype_name!r}, which perparam cannot read.")
    try:
        # Named as in the header; as_dtype refuses F64 while JAX has no 64-bit floats.
        dtype = as_dtype(dtype_name)
    except UnknownDtype as error:
        raise InvalidCheckpoint(f"{path}: {name!r}: {error}") from error
    tensor, (first, last) = Tensor(name, path, tuple(shape), dtype, 0), offsets
    if tensor.bytes != last - first:
        raise _damaged(
            path,
            f"{name!r}, {dtype_name} {tensor.shape}, is {tensor.bytes} bytes, its offsets say {last - first}",
        )
    return (first, last), tensor


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
