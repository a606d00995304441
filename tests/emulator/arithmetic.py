"""Instructions that compute with numbers: sums and products, comparisons, and operations on bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .operands import BOOL, DTYPES, U32, Step, raw, source
from .ptx import Instruction

if TYPE_CHECKING:
    from .warpgroup import Warpgroup


def _elementwise(function: Callable[..., np.ndarray], ins: Instruction, dtype: np.dtype, out: np.dtype | None = None):
    target, *operands = ins.operands
    sources, out = [source(operand, dtype) for operand in operands], out or dtype

    def step(group: Warpgroup) -> None:
        with np.errstate(all="ignore"):
            group.write(target, np.asarray(function(*(read(group) for read in sources))).astype(out).view(raw(out)))

    return step


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    # The product of two float32 is exact in float64: at most the sum is rounded twice.
    return a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)


def _maximum(parts: tuple[str, ...], dtype: np.dtype, most: bool):
    if dtype.kind in "iu" or "NaN" in parts:
        return np.maximum if most else np.minimum
    return np.fmax if most else np.fmin


def _compare(name: str) -> Callable[..., np.ndarray]:
    ordered = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
    ordered |= {"ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
    if name in ("nan", "num"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if name in ordered:  # of floats, `ne` is false for NaN
        return lambda a, b: ordered[name](a, b) & ((a == a) & (b == b) if name == "ne" else True)
    return lambda a, b: ordered[name.removesuffix("u")](a, b) | np.isnan(a) | np.isnan(b)


def _shift(ins: Instruction, dtype: np.dtype) -> Step:
    target, value, count = ins.operands
    read, read_count = source(value, dtype), source(count, U32)
    left, bits = ins.parts[0] == "shl", 8 * dtype.itemsize

    def step(group: Warpgroup) -> None:
        values, counts = read(group), read_count(group).astype(np.uint64)
        enough = np.minimum(counts, bits - 1).astype(dtype)
        shifted = values << enough if left else values >> enough
        gone = np.zeros_like(values) if left or dtype.kind == "u" else shifted
        group.write(target, np.where(counts < bits, shifted, gone).view(raw(dtype)))

    return step


def _bit_field(value: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    wide = value.astype(np.int64 if value.dtype.kind == "i" else np.uint64).view(np.uint64)
    place, count = (
        operand.view(raw(operand.dtype)).astype(np.uint64) & np.uint64(255) for operand in (position, length)
    )
    field = (wide >> place) & ((np.uint64(1) << count) - np.uint64(1))
    if value.dtype.kind == "i":
        sign = np.where(count > 0, np.uint64(1) << (np.maximum(count, 1) - np.uint64(1)).astype(np.uint64), 0)
        field = (field ^ sign.astype(np.uint64)) - sign.astype(np.uint64)
    return field.view(np.int64 if value.dtype.kind == "i" else np.uint64)


def _wide(ins: Instruction, dtype: np.dtype) -> Step:
    out = np.dtype(f"{'int' if dtype.kind == 'i' else 'uint'}{16 * dtype.itemsize}")
    target, *operands = ins.operands
    sources = [source(operand, dtype) for operand in operands[:2]]
    added = source(operands[2], out) if len(operands) > 2 else None

    def step(group: Warpgroup) -> None:
        a, b = (read(group).astype(out) for read in sources)
        group.write(target, (a * b + (added(group) if added else out.type(0))).view(raw(out)))

    return step


def _high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of a product of integers of 16, 32 or 64 bits."""
    wide = a.astype(object) * b.astype(object)  # Python's integers, which have any number of bits
    return np.asarray(wide >> 8 * a.itemsize).astype(a.dtype)


def _packed(ins: Instruction, dtype: np.dtype, function: Callable[..., np.ndarray]) -> Step:
    """An instruction on two 16-bit numbers in a register."""
    target, *operands = ins.operands
    sources = [source(operand, U32) for operand in operands]

    def step(group: Warpgroup) -> None:
        values = [read(group).copy().view(dtype).astype(np.float32) for read in sources]
        with np.errstate(all="ignore"):
            group.write(target, function(*values).astype(dtype).view(np.uint32))

    return step


def _permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    pool = np.concatenate([a.copy().view(np.uint8).reshape(-1, 4), b.copy().view(np.uint8).reshape(-1, 4)], axis=1)
    chosen = np.stack([(selector >> np.uint32(4 * i)) & np.uint32(15) for i in range(4)], axis=1).astype(int)
    found = np.take_along_axis(pool, chosen & 7, axis=1)
    found = np.where(chosen & 8, np.where(found & 0x80, 0xFF, 0), found).astype(np.uint8)  # bit 3 spreads the sign
    return found.copy().view(np.uint32)[:, 0]


def _logic(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    result = np.zeros_like(a)
    for i in range(8):
        if int(table[0]) >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def _approximate(function: Callable[[np.ndarray], np.ndarray], ulps: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function as far off as the hardware's may be, by some ulps for every other number (float32)."""

    def approximate(a: np.ndarray) -> np.ndarray:
        exact = function(a.astype(np.float64)).astype(np.float32)
        off = exact
        for _ in range(ulps):
            off = np.nextafter(off, np.float32(np.inf))
        return np.where((a.view(np.uint32) & 1 == 1) & (exact != 0), off, exact)

    return approximate


def _fma_down(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Rounded towards minus infinity."""
    exact = _fma(a, b, c)
    near = exact.astype(np.float32)
    return np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near)


_FLOAT = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "fma": _fma}
_FLOAT |= {
    "rcp": _approximate(lambda a: 1 / a, 1),
    "ex2": _approximate(np.exp2, 2),
    "rsqrt": _approximate(lambda a: 1 / np.sqrt(a), 2),  # PTX: a relative error of at most 2**-22.9
}
_INTEGER = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": lambda a, b: a // b,
    "rem": lambda a, b: a % b,
    "mad": lambda a, b, c: a * b + c,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "bfe": _bit_field,
    "lop3": _logic,
    "prmt": _permute,
}
_UNARY = {"neg": np.negative, "abs": np.abs, "not": np.invert}


def _comparison(ins: Instruction, dtype: np.dtype) -> Step:
    return _elementwise(_compare(ins.parts[1]), ins, dtype, BOOL)


def _compare_with(ins: Instruction, dtype: np.dtype) -> Step:
    """A comparison combined with a predicate: `setp.eq.and.b32`."""
    target, a, b, other = ins.operands
    read_a, read_b, read = source(a, dtype), source(b, dtype), source(other.removeprefix("!"), BOOL)
    compare, combine = _compare(ins.parts[1]), {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    return lambda group: group.write(
        target, combine[ins.parts[2]](compare(read_a(group), read_b(group)), read(group) != (other[0] == "!"))
    )


def compile_arithmetic(ins: Instruction) -> Step | None:
    """Returns what an instruction does to a warpgroup, or None if it is not one of this file."""
    root, last = ins.parts[0], ins.parts[-1]
    if last in ("bf16x2", "f16x2"):
        half = DTYPES[last.removesuffix("x2")]
        table = {**_FLOAT, "max": np.fmax, "min": np.fmin, "neg": np.negative, "abs": np.abs}
        return _packed(ins, half, table[root]) if root in table else None
    if last not in DTYPES:
        return None
    dtype = DTYPES[last]
    if root == "setp":
        return _compare_with(ins, dtype) if len(ins.operands) > 3 else _comparison(ins, dtype)
    if root in ("shl", "shr"):
        return _shift(ins, dtype)
    if root in ("mul", "mad") and "wide" in ins.parts:
        return _wide(ins, dtype)
    if root == "mul" and "hi" in ins.parts:
        return _elementwise(_high, ins, dtype)
    if root in ("min", "max"):
        return _elementwise(_maximum(ins.parts, dtype, root == "max"), ins, dtype)
    if root == "not" and dtype.kind == "b":
        return _elementwise(np.logical_not, ins, dtype)
    if root == "fma" and "rm" in ins.parts:
        return _elementwise(_fma_down, ins, dtype)
    if root in _UNARY:
        return _elementwise(_UNARY[root], ins, dtype)
    table = _INTEGER if dtype.kind in "iub" else _FLOAT
    return _elementwise(table[root], ins, dtype) if root in table else None
