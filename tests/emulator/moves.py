"""Instructions that move values between registers and threads, and convert them: none has effects beyond a register."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .faults import Fault
from .operands import BOOL, DTYPES, E4M3, E5M2, RANK_SHIFT, THREADS, U16, U32, U64, Step, raw, source
from .ptx import Instruction, inside

if TYPE_CHECKING:
    from .warpgroup import Warpgroup


LARGEST = {E4M3: 448.0, E5M2: 57344.0}


def _mov(ins: Instruction, dtype: np.dtype) -> Step:
    target, value = ins.operands
    if target[0] == "{":  # the lowest bits first
        parts = inside(target)
        narrow, read = np.dtype(f"uint{8 * dtype.itemsize // len(parts)}"), source(value, raw(dtype))

        def unpack(group: Warpgroup) -> None:
            halves = read(group).copy().view(narrow).reshape(THREADS, len(parts))
            for i, part in enumerate(parts):
                if part != "_":
                    group.write(part, halves[:, i].copy())

        return unpack
    if value[0] == "{":
        parts = inside(value)
        narrow = np.dtype(f"uint{8 * dtype.itemsize // len(parts)}")
        sources = [source(part, narrow) for part in parts]
        return lambda group: group.write(
            target, np.stack([read(group) for read in sources], axis=1).view(raw(dtype))[:, 0]
        )
    read = source(value, raw(dtype))
    return lambda group: group.write(target, read(group))


def _narrow(values: np.ndarray, dtype: np.dtype, saturate: bool) -> np.ndarray:
    if saturate or dtype in LARGEST:  # a conversion to float8 always saturates, and keeps NaN
        values = np.clip(values, -LARGEST[dtype], LARGEST[dtype])
    with np.errstate(all="ignore"):
        return values.astype(dtype)


def _cvt(ins: Instruction) -> Step:
    to, of = ins.parts[-2:]
    target, *operands = ins.operands
    if to.endswith("x2"):
        out = DTYPES[to.removesuffix("x2")]
        packed = raw(np.dtype(f"uint{16 * out.itemsize}"))
        if of.endswith("x2"):
            narrow = DTYPES[of.removesuffix("x2")]
            read = source(operands[0], U16)
            return lambda group: group.write(
                target, read(group).copy().view(narrow).astype(np.float32).astype(out).view(packed)
            )
        high, low = (source(operand, DTYPES[of]) for operand in operands)

        def pack(group: Warpgroup) -> None:
            values = np.stack([low(group), high(group)], axis=1)
            group.write(target, _narrow(values, out, "satfinite" in ins.parts).view(packed)[:, 0])

        return pack
    out, read = DTYPES[to], source(operands[0], DTYPES[of])

    def step(group: Warpgroup) -> None:
        values = read(group)
        if out.kind in "iu" and values.dtype.kind not in "iu":
            rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
            values = next(rounding[part] for part in ins.parts if part in rounding)(values)
        with np.errstate(all="ignore"):
            group.write(target, values.astype(out).view(raw(out)))

    return step


def _shuffle(ins: Instruction) -> Step:
    target, value, lane, *_ = ins.operands
    read, read_lane = source(value, U32), source(lane, U32)
    threads = np.arange(THREADS)

    def step(group: Warpgroup) -> None:
        lanes = read_lane(group).astype(int)
        chosen = {"bfly": threads % 32 ^ lanes, "idx": lanes, "up": threads % 32 - lanes, "down": threads % 32 + lanes}
        place = chosen[ins.parts[2]]
        place = np.where((place >= 0) & (place < 32), place, threads % 32)
        group.write(target, read(group)[threads // 32 * 32 + place])

    return step


def _elect(ins: Instruction) -> Step:
    lane, elected = ins.operands[0].split("|")

    def step(group: Warpgroup) -> None:
        group.write(elected, np.arange(THREADS) % 32 == 0)
        group.write(lane, np.zeros(THREADS, np.uint32))

    return step


def _select(ins: Instruction, dtype: np.dtype) -> Step:
    target, yes, no, condition = ins.operands
    a, b, choose = source(yes, dtype), source(no, dtype), source(condition, BOOL)
    return lambda group: group.write(target, np.where(choose(group), a(group), b(group)).view(raw(dtype)))


def _map(ins: Instruction) -> Step:
    """The address of the same place in the shared memory of another block of the cluster."""
    target, place, rank = ins.operands
    read, read_rank = source(place, U32), source(rank, U32)

    def step(group: Warpgroup) -> None:
        ranks = read_rank(group)
        if (mask := group.mask) is not None and (ranks[mask] >= group.block.cluster_size).any():
            raise Fault(f"{ins}: a cluster has {group.block.cluster_size} thread blocks")
        group.write(target, read(group) + ((ranks + U32.type(1)) << U32.type(RANK_SHIFT)))

    return step


def compile_move(ins: Instruction) -> Step | None:
    """Returns what an instruction does to a warpgroup, or None if it is not one of this file."""
    root, last = ins.parts[0], ins.parts[-1]
    if root in ("nop", "setmaxnreg", "prefetch", "pragma"):
        return lambda group: None
    if root == "mapa":
        return _map(ins)
    if root == "elect":
        return _elect(ins)
    if root == "shfl":
        return _shuffle(ins)
    if root == "cvt":
        return _cvt(ins)
    if root == "cvta":
        return _mov(ins, U64)
    if last in DTYPES and root in ("mov", "selp"):
        return (_mov if root == "mov" else _select)(ins, DTYPES[last])
    return None
