"""Operands of instructions, for the 128 threads of a warpgroup at once: registers, constants and addresses."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from .faults import Fault, Undefined
from .ptx import Instruction, inside

if TYPE_CHECKING:
    from .warpgroup import Warpgroup


THREADS = 128
RANK_SHIFT = 24
"""Bits of an address in shared memory below the number of the block in its cluster, plus one: 0 is one's own."""

BF16, E4M3, E5M2 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)

DTYPES = {
    **{f"b{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"u{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    "f16": np.dtype("float16"),
    "f32": np.dtype("float32"),
    "f64": np.dtype("float64"),
    "bf16": BF16,
    "e4m3": E4M3,
    "e5m2": E5M2,
    "pred": np.dtype(bool),
}
U16, U32, U64, BOOL = (np.dtype(kind) for kind in (np.uint16, np.uint32, np.uint64, bool))

SPECIAL = ("%tid.", "%ntid.", "%ctaid.", "%nctaid.", "%cluster_ctaid.", "%cluster_nctaid.", "%cluster_ctarank")
"""Registers that the hardware sets."""

Source = Callable[["Warpgroup"], np.ndarray]
"""Reads an operand, (threads,)."""

Step = Callable[["Warpgroup"], Any]
"""Runs an instruction that has no effects beyond a register."""

Effect = Callable[["Warpgroup", np.ndarray], Iterator[Callable[[], bool] | None]]
"""Runs an instruction in the threads of a mask (threads,): a generator of None, or of conditions that it waits for."""


def raw(dtype: np.dtype) -> np.dtype:
    """Returns the dtype of a register's bits."""
    return dtype if dtype.kind == "b" else np.dtype(f"uint{8 * dtype.itemsize}")


def is_register(operand: str) -> bool:
    """Returns whether an operand is a register: no number, and no name of a parameter or of shared memory."""
    return operand[0] not in "-0123456789" and not operand.startswith("__") and "_param_" not in operand


def source(operand: str, dtype: np.dtype) -> Source:
    """Returns a function that reads an operand: (threads,) of `dtype`."""
    if operand.startswith(SPECIAL):
        return lambda group: group.special(operand).astype(dtype)
    if is_register(operand):

        def read(group: Warpgroup) -> np.ndarray:
            value = group.registers.get(operand)
            if value is None:
                raise Undefined(f"register {operand} is read before it is written")
            # A wider register is truncated, as bit-sized operands are.
            return value.view(dtype) if value.itemsize == dtype.itemsize else value.astype(raw(dtype)).view(dtype)

        return read
    if operand[:2] in ("0f", "0F"):
        constant = np.full(THREADS, int(operand[2:], 16), np.uint32).view(dtype)
    elif operand[:2] in ("0d", "0D"):
        constant = np.full(THREADS, struct.unpack(">d", bytes.fromhex(operand[2:]))[0], dtype)
    elif operand[0] in "-0123456789":
        bits = int(operand, 0) & ((1 << 8 * dtype.itemsize) - 1)
        constant = np.full(THREADS, bits, raw(dtype)).view(dtype) if dtype.kind != "b" else np.full(THREADS, bool(bits))
    else:
        return lambda group: np.full(THREADS, group.symbol(operand), raw(dtype)).view(dtype)
    return lambda group: constant


def address(operand: str) -> Source:
    """Returns a function that reads the addresses of an operand in brackets: (threads,) int64."""
    (inner,) = inside(operand)
    name, _, offset = inner.partition("+")
    base, distance = source(name, U64), int(offset or 0)
    return lambda group: base(group).astype(np.int64) + distance


def one_thread(mask: np.ndarray, ins: Instruction) -> int | None:
    """Returns the only thread of a mask, or None if there is none."""
    if mask.sum() > 1:
        raise Fault(f"{mask.sum()} threads of a warpgroup execute {ins}")
    return int(mask.argmax()) if mask.any() else None


def uniform(values: np.ndarray, mask: np.ndarray, ins: Instruction) -> int:
    """Returns the value that all threads of a mask have."""
    if len(found := set(values[mask].tolist())) != 1:
        raise Fault(f"threads of a warpgroup have different operands in {ins}")
    return int(found.pop())
