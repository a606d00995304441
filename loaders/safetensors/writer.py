"""Writing of safetensors files: laid out from shapes and dtypes, then filled in any order and from any thread."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors

from ...policies.blocks import Block
from ...policies.errors import InvalidSize, SaveFailed, shown
from ..layout import BLOCKS, INDEX, WHOLE
from .runs import runs

NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
}
"""Names in safetensors files of the dtypes that models are saved in."""

ALL_NAMES = NAMES | {
    np.dtype(getattr(ml_dtypes, name, name)): short
    for name, short in {
        "float64": "F64", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0", "int64": "I64", "int32": "I32",
        "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
        "complex64": "C64",
    }.items()
}  # fmt: skip
"""Names of all dtypes that are read and written."""

_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


Tensors = dict[str, jax.ShapeDtypeStruct]
"""{name: shape and dtype} of tensors to write."""


def tensor_bytes(tensor: jax.ShapeDtypeStruct) -> int:
    """Bytes of data of a tensor."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def size_in_bytes(size: int | str) -> int:
    """A size in bytes, from a number or from text in Hugging Face's notation: "5GB" is 5 * 10**9, "512MiB" 512 * 2**20.

    >>> size_in_bytes("5GB")
    5000000000

    Raises:
      InvalidSize: any other value.
    """
    count = 0
    if isinstance(size, str) and (text := re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*(\w*)\s*", size, re.ASCII)):
        bits = text[2].endswith("b") and len(text[2]) == 2  # as Hugging Face reads "5Gb"
        count = 0 if bits else int(float(text[1]) * _UNITS.get(text[2].upper(), 0))
    elif isinstance(size, (int, np.integer)) and not isinstance(size, bool):
        count = int(size)
    if count < 1:
        raise InvalidSize(f"expected a number of bytes or text such as '5GB' or '512MiB', found {shown(size)}.")
    return count


def in_shards(groups: Iterable[Tensors], limit: int) -> dict[str, Tensors]:
    """{file name: tensors}: the groups in order, each in one file, at most `limit` bytes of data in a file.

    A group that is larger than `limit` has its own file.
    """
    shards: list[Tensors] = [{}]
    room = limit
    for group in groups:
        size = sum(map(tensor_bytes, group.values()))
        if size > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1] |= group
        room -= size
    if len(shards) == 1:
        return {WHOLE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": tensors for i, tensors in enumerate(shards, 1)}


class Writer:
    """A writer of the safetensors files of a folder and of their index; allocates all disk space when it is made.

    folder  exists, without these files
    shards  {file name: tensors}
    blocks  {tensor name: block} for the metadata; `Tensor.block` has it again
    create  False: another writer has made the files, of the same shards and blocks, and this one fills them

    Raises:
      OSError: the disk is full, or another error of the file system, here and in `write` and `close`.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        shards: dict[str, Tensors],
        blocks: Mapping[str, Block] | None = None,
        *,
        create: bool = True,
    ):
        self._folder, self._shards, self._blocks, self._create = folder, shards, blocks or {}, create
        self._places: dict[str, tuple[int, int]] = {}
        self._files: list[int] = []
        with contextlib.ExitStack() as stack:
            stack.callback(self._release)
            for name, tensors in shards.items():
                self._open(folder / name, tensors)
            stack.pop_all()
        if create and len(shards) > 1:
            total = sum(tensor_bytes(tensor) for tensors in shards.values() for tensor in tensors.values())
            names = {name: file for file, tensors in shards.items() for name in tensors}
            index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _open(self, path: pathlib.Path, tensors: Tensors) -> None:
        """Opens a file, and gives it its header and space for its tensors if it is created."""
        # The widest dtype first, as in the reference implementation, so that each tensor begins at a multiple of its
        # dtype's size.
        end, header, places = 0, dict[str, Any](), {}
        for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
            places[name] = end
            offsets = [end, end + tensor_bytes(tensor)]
            header[name] = {
                "dtype": ALL_NAMES[np.dtype(tensor.dtype)],
                "shape": list(tensor.shape),
                "data_offsets": offsets,
            }
            end = offsets[1]
        # transformers refuses files without this format in their metadata.
        metadata = {"format": "pt"}
        if blocks := {name: self._blocks[name] for name in header if name in self._blocks}:
            metadata[BLOCKS] = json.dumps(blocks)
        text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 64)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL if self._create else os.O_WRONLY
        file = os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666)
        self._files.append(file)
        start = 8 + len(text)
        if self._create:
            _reserve(file, start + end)
            _write_at(file, 0, len(text).to_bytes(8, "little") + text)
        self._places |= {name: (file, start + place) for name, place in places.items()}

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Writes `values` into the data of tensor `name`, from byte `start` on."""
        file, place = self._places[name]
        _write_at(file, place + start, np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)

    def write_part(self, name: str, shape: Sequence[int], box: Sequence[tuple[int, int]], values: np.ndarray) -> None:
        """Writes a part of tensor `name`, which has this shape; `box` is the part's start and stop along each axis."""
        if not values.size:
            return
        places, _ = runs(shape, box, values.dtype.itemsize)
        for place, part in zip(places.tolist(), np.ascontiguousarray(values).reshape(len(places), -1), strict=True):
            self.write(name, place, part)

    def close(self) -> None:
        """Flushes the files to the disk, and checks that the reference implementation can open them.

        Raises:
          SaveFailed: it cannot.
        """
        for file in self._files:
            os.fsync(file)
        self._release()
        for name, tensors in self._shards.items():
            try:
                with safetensors.safe_open(self._folder / name, framework="np") as file:
                    names = set(file.keys())
            except safetensors.SafetensorError as error:
                raise SaveFailed(
                    f"{self._folder / name}: safetensors cannot read what was written: {error}."
                ) from error
            assert names == tensors.keys()

    def _release(self) -> None:
        while self._files:
            os.close(self._files.pop())

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        self._release()


def _reserve(file: int, size: int) -> None:
    """Allocates `size` bytes of disk space, so that a full disk is an error before any work is done."""
    if hasattr(os, "posix_fallocate") and size:
        try:
            return os.posix_fallocate(file, 0, size)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
    os.ftruncate(file, size)


def _write_at(file: int, place: int, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest.nbytes:
        count = os.pwrite(file, rest, place)
        place, rest = place + count, rest[count:]
