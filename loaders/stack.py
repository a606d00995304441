"""`Stack`: one parameter whose slices along the first axis are tensors of their own in a checkpoint, as experts are."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence

import numpy as np

from ..policies.blocks import Block
from ..policies.dtypes import dtype_name
from .safetensors.reader import Tensor, aligned_empty


@dataclasses.dataclass(frozen=True)
class Stack:
    """A source of rows (see `slabs.Source`), where row i of the first axis is the whole of tensor i.

    tensors  of one shape and dtype, in order
    """

    tensors: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of tensors, then the shape of each."""
        return (len(self.tensors), *self.tensors[0].shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the tensors."""
        return self.tensors[0].dtype

    @property
    def name(self) -> str:
        """The name of the first tensor."""
        return self.tensors[0].name

    @property
    def file(self) -> pathlib.Path:
        """The file of the first tensor."""
        return self.tensors[0].file

    @property
    def offset(self) -> int:
        """The position of the first tensor's data in its file."""
        return self.tensors[0].offset

    @property
    def bytes(self) -> int:
        """Bytes of data of all tensors."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def block(self) -> Block | None:
        """None: a stack is part of a model's checkpoint, whose config has the block."""
        return None

    def read(
        self,
        start: int = 0,
        stop: int | None = None,
        into: np.ndarray | None = None,
        within: Sequence[tuple[int, int]] | None = None,
    ) -> np.ndarray:
        """Tensors `start` to `stop`, each read into its place in `into`, or in new memory aligned to 64 bytes.

        within  start and stop along each axis of a tensor; None: all of it

        Raises:
          InvalidCheckpoint: a file that has changed since its header was read, or cannot be read.
        """
        tensors = self.tensors[start:stop]
        (first, last), *rest = within or [(0, size) for size in self.shape[1:]]
        if into is None:
            shape = (len(tensors), last - first, *(high - low for low, high in rest))
            into = aligned_empty(math.prod(shape) * self.dtype.itemsize).view(self.dtype).reshape(shape)
        for place, tensor in zip(into, tensors, strict=True):
            tensor.read(first, last, place, rest)
        return into


def unequal(kernels: Sequence[Tensor], scales: Sequence[Tensor], suffix: str) -> list[str]:
    """The reasons why the tensors of experts cannot be stacked, by name: another shape or dtype than others, no scales.

    scales  those of the kernels that have any
    suffix  end of the name of a kernel's scales
    """
    names = {tensor.name for tensor in scales}
    without = [tensor.name for tensor in kernels if names and f"{tensor.name}{suffix}" not in names]
    return (
        _differences(kernels)
        or [f"missing: {name}{suffix}, which other experts have" for name in without]
        or _differences(scales)
    )


def _differences(tensors: Sequence[Tensor]) -> list[str]:
    kinds = [(tensor.shape, tensor.dtype) for tensor in tensors]
    usual = max(kinds, key=kinds.count, default=None)
    if usual is None:
        return []
    like = tensors[kinds.index(usual)]
    return [
        f"unequal experts: {tensor.name} is {dtype_name(tensor.dtype)} {tensor.shape}, expected "
        f"{dtype_name(like.dtype)} {like.shape} as {like.name}"
        for tensor, kind in zip(tensors, kinds, strict=True)
        if kind != usual
    ]
