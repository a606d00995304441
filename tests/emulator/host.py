"""Runs the host code that launches a kernel: which grid, arguments and tensor maps it has.

Mosaic GPU prints that code as LLVM IR if the environment variable MOSAIC_GPU_DUMP_HOST_LLVM is set.  It is
straight-line code that describes the tensor maps, so that nothing about boxes or swizzles has to be assumed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from .tensor_maps import TensorMap

ITEMSIZES = {1: 1, 2: 2, 3: 4, 4: 8, 5: 2, 6: 4, 7: 2}
"""Bytes of an element by Mosaic's number of the dtype: integers of 8 to 64 bits, float16, float32, bfloat16."""

ARGUMENTS = {"mosaic_gpu_launch_kernel": 12, "mosaic_gpu_build_kernel_spec": 13}
"""Place of the table of the kernel's arguments in those of the function that launches it, which JAX 0.12 renamed."""

_WIDTHS = {"ptr": 8, "i64": 8, "i32": 4, "i8": 1}


@dataclasses.dataclass(frozen=True)
class Launch:
    """A launch of a kernel.

    grid       thread blocks in x, y and z
    shared     bytes of dynamic shared memory
    arguments  for each parameter of the kernel a number, or the tensor maps that are in it by their offset
    """

    grid: tuple[int, int, int]
    shared: int
    arguments: tuple[int | dict[int, TensorMap], ...]


class _Code:
    """Values of a function's variables, and the memory that it has written, by address."""

    def __init__(self, buffers: Sequence[int], argument: str):
        self.values: dict[str, Any] = {"%0": 0, "%1": 0, argument: 1 << 20}
        self.cells: dict[int, Any] = {(1 << 20) + 8 * i: address for i, address in enumerate(buffers)}
        self.maps: dict[int, TensorMap] = {}
        self.top = 1 << 24

    def value(self, text: str) -> Any:
        text = text.strip().split()[-1]
        return {} if text in ("undef", "poison") else self.values[text] if text.startswith("%") else int(text)

    def cell(self, address: int) -> Any:
        if address not in self.cells:
            raise ValueError(f"the kernel has more operands or results than the {len(self.cells)} that are known")
        return self.cells[address]

    def array(self, address: int, count: int) -> tuple[int, ...]:
        return tuple(self.cell(address + 8 * i) for i in range(count))

    def run(self, line: str) -> Launch | None:
        name, _, code = line.strip().rpartition(" = ")
        operation, _, rest = code.partition(" ")
        result: Any = None
        if operation == "alloca":
            result, self.top = self.top, self.top + (1 << 16)
        elif operation in ("ptrtoint", "inttoptr"):
            result = self.value(rest.partition(" to ")[0])
        elif operation in ("add", "mul"):
            a, b = map(self.value, re.sub(r"^(?:nsw |nuw )*\w+ ", "", rest).split(","))
            result = a + b if operation == "add" else a * b
        elif operation == "insertvalue":
            match = re.fullmatch(r"\{.*?\} (\S+), \S+ (\S+), ([\d, ]+)", rest)
            assert match
            result = {**self.value(match[1]), match[3]: self.value(match[2])}
        elif operation == "extractvalue":
            match = re.fullmatch(r"\{.*?\} (\S+), ([\d, ]+)", rest)
            assert match
            result = self.value(match[1])[match[2]]
        elif operation == "getelementptr":
            result = self.element(re.sub(r"^(?:inbounds |nuw |nusw )*", "", rest))
        elif operation == "load":
            kind, pointer = re.fullmatch(r"(.*), ptr (\S+), align \d+", rest).groups()  # type: ignore[union-attr]
            address = self.value(pointer)
            result = address if kind.startswith("[") else self.cell(address)
        elif operation == "store":
            kind, value, pointer = re.fullmatch(r"(\S+|\[.*\]) (\S+), ptr (\S+), align \d+", rest).groups()  # type: ignore[union-attr]
            address = self.value(pointer)
            if kind.startswith("["):  # an array of tensor maps
                start = self.value(value)
                moved = {address + place - start: found for place, found in self.maps.items() if place >= start}
                self.maps |= moved
            else:
                self.cells[address] = self.value(value)
        elif operation == "call":
            return self.call(rest)
        elif operation not in ("ret", "}", ""):
            raise NotImplementedError(f"host code: {line}")
        if name:
            self.values[name] = result
        return None

    def element(self, rest: str) -> int:
        structure = re.match(r"\{ ptr, .*? \}, ptr (\S+), i32 0, i32 (\d)", rest)
        if structure:
            return int(self.value(structure[1])) + 8 * int(structure[2])
        kind, pointer, index = re.fullmatch(r"(\w+), (ptr \S+), (\w+ \S+)", rest).groups()  # type: ignore[union-attr]
        return int(self.value(pointer)) + _WIDTHS[kind] * int(self.value(index))

    def call(self, rest: str) -> Launch | None:
        match = re.fullmatch(r"\w+ @(\w+)\((.*)\)", rest)
        assert match
        values = [self.value(argument) for argument in match[2].split(",")]
        if match[1] == "mosaic_gpu_init_tma_desc":
            address, base, kind, rank, sizes, strides, swizzle, box = values
            arrays = (self.array(place, rank) for place in (sizes, strides, box))
            self.maps[address] = TensorMap(base, ITEMSIZES[kind], *arrays, swizzle)
            return None
        if match[1] not in ARGUMENTS:
            raise NotImplementedError(f"host code: {rest}")
        if any(side > 1 for side in values[4:7]):
            raise NotImplementedError("clusters of thread blocks")
        table = values[ARGUMENTS[match[1]]]
        arguments: list[int | dict[int, TensorMap]] = []
        while (place := table + 8 * len(arguments)) in self.cells:
            address = self.cells[place]
            maps = {at - address: found for at, found in self.maps.items() if 0 <= at - address < 1 << 16}
            arguments.append(self.cells.get(address, maps))
        return Launch((values[1], values[2], values[3]), values[10], tuple(arguments))


def launch(text: str, buffers: Sequence[int]) -> Launch:
    """Returns the launch in LLVM IR of a kernel's host code, for operands and results at the addresses `buffers`."""
    names = "|".join(ARGUMENTS)
    match = re.search(
        rf"^define void @\w+\((?:ptr %\d, )+ptr (%\d)\) \{{\n((?:(?!^\}}).)*@(?:{names})\(.*?)^\}}",
        text,
        re.DOTALL | re.M,
    )
    if not match:
        raise ValueError("no host code: set MOSAIC_GPU_DUMP_HOST_LLVM before the kernel is compiled")
    code = _Code(buffers, match[1])
    for line in match[2].splitlines():
        if found := code.run(line):
            return found
    raise ValueError("the host code launches nothing")
