"""Instructions that multiply matrices asynchronously (wgmma)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from .faults import Fault, Misaligned, Race
from .operands import BOOL, DTYPES, THREADS, U32, U64, Effect, source
from .ptx import Instruction, inside
from .tensor_maps import NO_SWIZZLE, swizzled

if TYPE_CHECKING:
    from .warpgroup import Warpgroup


def _wait(ins: Instruction) -> Effect:
    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        yield
        done = group.products.finish(int(ins.operands[0]))
        clocks = group.block.clocks
        clocks.learn(group.warps, clocks.products(int(group.warps[0])), done)

    return effect


def _commit(ins: Instruction) -> Effect:
    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        group.products.commit()
        yield

    return effect


def _fence(ins: Instruction) -> Effect:
    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        group.unfenced.clear()
        yield

    return effect


def operand_places(descriptor: int, rows: int, transposed: bool = False) -> np.ndarray:
    """Returns the shared addresses (rows, 32) of an operand of a matrix product: 32 bytes of each row, along K.

    Of a transposed operand, with 16-bit elements, it is M or N that is contiguous: rows of the swizzle's width in bytes
    are 8 steps of K, after which the next 8 begin `stride` bytes, and the next such part of M or N `leading` bytes on.
    """
    start, stride = (descriptor & 0x3FFF) << 4, ((descriptor >> 32) & 0x3FFF) << 4
    leading = ((descriptor >> 16) & 0x3FFF) << 4
    span = {0: NO_SWIZZLE, 1: 128, 2: 64, 3: 32}[descriptor >> 62]
    if span == NO_SWIZZLE:
        raise NotImplementedError("operands of matrix products without swizzle")
    if descriptor >> 49 & 7 or start & 7 * span:
        raise Misaligned(f"an operand of a matrix product begins within the pattern of its swizzle, at {start:#x}")
    row, column = np.arange(rows)[:, None], np.arange(32)
    if transposed:
        step, byte = column // 2, 2 * row + column % 2
        return swizzled(start + byte // span * leading + step // 8 * stride + step % 8 * span + byte % span, span)
    return swizzled(start + row // 8 * stride + row % 8 * span + column, span)


_LANE, _PAIR = np.arange(THREADS) % 32 // 4, np.arange(THREADS) % 4
_ROW = 16 * (np.arange(THREADS) // 32) + _LANE
"""The row of a thread's first element in a result or operand in registers (PTX, wgmma, figures of fragments)."""


def _product(ins: Instruction) -> Effect:
    match = re.search(r"m64n(\d+)k(\d+)\.f32\.(\w+)\.(\w+)$", ins.opcode)
    if not match:
        raise NotImplementedError(str(ins))
    columns, dtypes = int(match[1]), (DTYPES[match[3]], DTYPES[match[4]])
    results, left, right = inside(ins.operands[0]), ins.operands[1], ins.operands[2]
    accumulates, settings = source(ins.operands[3], BOOL), ins.operands[4:]
    fragments = inside(left) if left[0] == "{" else ()
    transposed = tuple(flag != "0" for flag in (settings[2:] or ("0", "0")))
    if settings[:2] != ("1", "1") or (transposed[0] and not fragments):
        raise NotImplementedError(f"negated operands, or a transposed one at the left: {ins}")
    reads = [source(fragment, U32) for fragment in fragments]
    descriptors = [source(operand, U64) for operand in ((right,) if fragments else (left, right))]
    within = 4 // dtypes[0].itemsize  # elements of the left operand in a register

    def left_in_registers(group: Warpgroup) -> np.ndarray:
        a = np.zeros((64, 32 // dtypes[0].itemsize), np.float32)
        for i, read in enumerate(reads):
            values = read(group).copy().view(dtypes[0]).reshape(THREADS, within).astype(np.float32)
            for j in range(within):
                a[_ROW + 8 * (i % 2), within * _PAIR + 4 * within * (i // 2) + j] = values[:, j]
        return a

    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        yield
        if not mask.all():
            raise Fault(f"some threads of a warpgroup do not execute {ins}")
        if unfenced := group.unfenced & {*results, *fragments}:
            raise Race(f"{sorted(unfenced)[0]} was written without wgmma.fence before {ins}")
        block, queue = group.block, group.products
        found = [int(read(group)[0]) for read in descriptors]
        places = [operand_places(found[-1], columns, transposed[-1])]
        if not fragments:
            places.insert(0, operand_places(found[0], 64))
        agent = block.clocks.products(int(group.warps[0]))
        for operand in places:
            block.shared.start_read(
                group.warps, agent, queue.started + 1, operand.reshape(-1), "a matrix product reads"
            )
        block.record.products.append((ins.opcode, {descriptor >> 62 for descriptor in found}))
        a_registers = left_in_registers(group) if fragments else None
        keep = accumulates(group).all()

        def compute() -> None:
            b = block.shared.peek(places[-1]).view(dtypes[1]).astype(np.float64)
            a = block.shared.peek(places[0]).view(dtypes[0]) if a_registers is None else a_registers
            with np.errstate(all="ignore"):
                product = (a.astype(np.float64) @ b.T).astype(np.float32)
                for i, name in enumerate(results):
                    term = product[_ROW + 8 * (i % 4 // 2), 8 * (i // 4) + 2 * _PAIR + i % 2]
                    old = group.registers[name].view(np.float32) if keep else np.float32(0)
                    group.registers[name] = (old + term).astype(np.float32).view(np.uint32)

        queue.open.append(compute)
        queue.written.update(results)
        queue.read.update(fragments)

    return effect


TABLE = {
    "wgmma.fence": _fence,
    "wgmma.commit_group": _commit,
    "wgmma.wait_group": _wait,
    "wgmma.mma_async": _product,
}
"""Functions that make the effect of an instruction, by the start of its opcode."""
