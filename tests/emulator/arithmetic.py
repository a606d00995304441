"""Instructions without effects beyond a register, for the 128 threads of a warpgroup at once."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from .faults import Undefined
from .ptx import Instruction, inside

if TYPE_CHECKING:
    from .machine import Warpgroup

THREADS = 128
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
LARGEST = {E4M3: 448.0, E5M2: 57344.0}

Source = Callable[["Warpgroup"], np.ndarray]
Step = Callable[["Warpgroup"], Any]


def raw(dtype: np.dtype) -> np.dtype:
    """Returns the dtype of a register's bits."""
    return dtype if dtype.kind == "b" else np.dtype(f"uint{8 * dtype.itemsize}")


def is_register(operand: str) -> bool:
    """Returns whether an operand is a register: no number, and no name of a parameter or of shared memory."""
    return operand[0] not in "-0123456789" and not operand.startswith("__") and "_param_" not in operand


def source(operand: str, dtype: np.dtype) -> Source:
    """Returns a function that reads an operand: (threads,) of `dtype`."""
    if operand.startswith(("%tid.", "%ctaid.", "%nctaid.", "%ntid.")):
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
    base, distance = source(name, np.dtype(np.uint64)), int(offset or 0)
    return lambda group: base(group).astype(np.int64) + distance


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
    read, read_count = source(value, dtype), source(count, np.dtype(np.uint32))
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
    """The upper half of a product of 16 or 32 bits."""
    wide = np.dtype(f"{a.dtype.kind}{2 * a.itemsize}")
    return ((a.astype(wide) * b.astype(wide)) >> wide.type(8 * a.itemsize)).astype(a.dtype)


def _packed(ins: Instruction, dtype: np.dtype, function: Callable[..., np.ndarray]) -> Step:
    """An instruction on two 16-bit numbers in a register."""
    target, *operands = ins.operands
    sources = [source(operand, np.dtype(np.uint32)) for operand in operands]

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
            read = source(operands[0], np.dtype(np.uint16))
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
    read, read_lane = source(value, np.dtype(np.uint32)), source(lane, np.dtype(np.uint32))
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
    a, b, choose = source(yes, dtype), source(no, dtype), source(condition, np.dtype(bool))
    return lambda group: group.write(target, np.where(choose(group), a(group), b(group)).view(raw(dtype)))


def _comparison(ins: Instruction, dtype: np.dtype) -> Step:
    return _elementwise(_compare(ins.parts[1]), ins, dtype, np.dtype(bool))


def _compare_with(ins: Instruction, dtype: np.dtype) -> Step:
    """A comparison combined with a predicate: `setp.eq.and.b32`."""
    target, a, b, other = ins.operands
    read_a, read_b, read = source(a, dtype), source(b, dtype), source(other.removeprefix("!"), np.dtype(bool))
    compare, combine = _compare(ins.parts[1]), {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    return lambda group: group.write(
        target, combine[ins.parts[2]](compare(read_a(group), read_b(group)), read(group) != (other[0] == "!"))
    )


def compile_arithmetic(ins: Instruction) -> Step | None:
    """Returns what an instruction does to a warpgroup, or None if it is not one of this file."""
    root, last = ins.parts[0], ins.parts[-1]
    if root in ("nop", "setmaxnreg", "prefetch", "pragma"):
        return lambda group: None
    if root == "elect":
        return _elect(ins)
    if root == "shfl":
        return _shuffle(ins)
    if root == "cvt":
        return _cvt(ins)
    if root == "cvta":
        return _mov(ins, np.dtype(np.uint64))
    if last in ("bf16x2", "f16x2"):
        half = DTYPES[last.removesuffix("x2")]
        table = {**_FLOAT, "max": np.fmax, "min": np.fmin, "neg": np.negative, "abs": np.abs}
        return _packed(ins, half, table[root]) if root in table else None
    if last not in DTYPES:
        return None
    dtype = DTYPES[last]
    if root == "mov":
        return _mov(ins, dtype)
    if root == "selp":
        return _select(ins, dtype)
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
    if root in _UNARY:
        return _elementwise(_UNARY[root], ins, dtype)
    table = _INTEGER if dtype.kind in "iub" else _FLOAT
    return _elementwise(table[root], ins, dtype) if root in table else None
