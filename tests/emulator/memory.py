"""Instructions of threads that access memory: loads and stores, also of matrices."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from .operands import DTYPES, THREADS, U32, Effect, address, source
from .ptx import Instruction, inside

if TYPE_CHECKING:
    from .warpgroup import Warpgroup


def _access(ins: Instruction) -> tuple[int, int]:
    """Returns the number of elements that a load or store has for each thread, and their bytes."""
    count = next((int(part[1:]) for part in ins.parts if re.fullmatch(r"v\d", part)), 1)
    return count, DTYPES[ins.parts[-1]].itemsize


def _load(ins: Instruction) -> Effect:
    count, size = _access(ins)
    targets, place = inside(ins.operands[0]), address(ins.operands[1])
    shared = ins.parts[1].startswith("shared")

    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        yield
        addresses = place(group)[mask, None] + np.arange(count * size)
        data = np.zeros((THREADS, count * size), np.uint8)
        if mask.any():
            memory = group.block.shared.load(group.warp_of[mask], addresses) if shared else None
            data[mask] = group.block.memory.read(addresses) if memory is None else memory
        for i, target in enumerate(targets):
            group.write(target, data[:, i * size : (i + 1) * size].copy().view(f"uint{8 * size}")[:, 0], mask)

    return effect


def _store(ins: Instruction) -> Effect:
    count, size = _access(ins)
    place = address(ins.operands[0])
    sources = [source(operand, np.dtype(f"uint{8 * size}")) for operand in inside(ins.operands[1])]
    shared = ins.parts[1].startswith("shared")

    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        yield
        addresses = place(group)[mask, None] + np.arange(count * size)
        data = np.stack([read(group) for read in sources], axis=1).view(np.uint8)[mask]
        if mask.any() and shared:
            group.block.shared.store(group.warp_of[mask], addresses, data)
        elif mask.any():
            group.block.memory.write(addresses, data)

    return effect


def _matrices(ins: Instruction) -> Effect:
    """Loads or stores of 8×8 matrices: eight threads have the addresses of a matrix' rows, four the values of a row."""
    loads = ins.parts[0] == "ldmatrix"
    registers, place = (ins.operands[0], ins.operands[1]) if loads else (ins.operands[1], ins.operands[0])
    names, at = inside(registers), address(place)
    sources = [] if loads else [source(name, U32) for name in names]
    if ins.parts[-1] != "b16" or "m8n8" not in ins.parts:
        raise NotImplementedError(str(ins))
    count, transposed = len(names), "trans" in ins.parts

    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        yield
        rows = at(group).reshape(4, 32)[:, : 8 * count].reshape(-1, 1) + np.arange(16)
        warps, shared = np.repeat(group.warps, 8 * count), group.block.shared
        if loads:
            data = shared.load(warps, rows).view(np.uint16).reshape(4, count, 8, 8)
            data = np.ascontiguousarray(data.swapaxes(2, 3) if transposed else data)
            for i, name in enumerate(names):
                group.write(name, data[:, i].copy().view(np.uint32).reshape(THREADS), mask)
        else:
            values = np.stack([read(group).reshape(4, 32) for read in sources], axis=1)
            data = values.view(np.uint16).reshape(4, count, 8, 8)
            data = np.ascontiguousarray(data.swapaxes(2, 3) if transposed else data)
            shared.store(warps, rows, data.view(np.uint8).reshape(-1, 16))

    return effect


def _param(ins: Instruction) -> Effect:
    (name,) = inside(ins.operands[1])

    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        group.write(ins.operands[0], np.full(THREADS, group.block.argument(name), np.uint64))
        yield

    return effect


TABLE = {
    "ld.param": _param,
    "ld.shared": _load,
    "ld.global": _load,
    "st.shared": _store,
    "st.global": _store,
    "ldmatrix": _matrices,
    "stmatrix": _matrices,
}
"""Functions that make the effect of an instruction, by the start of its opcode."""
