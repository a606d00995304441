"""Kernels compiled for the shapes of the Qwen3 models: alignment, swizzle, matrix instructions, and ptxas' log.

The addresses and tensor maps are those that the beginning of a thread block uses in the emulator.
"""

import itertools
import re

import jax
import pytest
from emulator.compiled import compile_kernels
from shapes import SHAPES, linears

pytestmark = [pytest.mark.cuda, pytest.mark.optimised]

STEPS = 3000
"""Of the emulator's scheduler: enough to fill all slots of a pipeline and to use the first of them again."""

MODES = {"W8A16": "bf16.bf16", "W8A8": "e4m3.e4m3"}
"""Operands of the matrix instructions."""

REGISTERS = 168
"""Of each thread, the most that ptxas has for 384 threads of a block."""

IGNORED = "(C7504)" if jax.__version_info__ >= (0, 12) else None
"""Since JAX 0.12, all kernels are compiled as parts of a larger program, in which ptxas ignores setmaxnreg: then no
warpgroup has more than `REGISTERS`, and the kernels have to do without spills all the same."""

LAYER = linears("8B")
TOGETHER = [
    tuple(LAYER[name] for name in names) for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
]
CASES = [
    *itertools.product([(LAYER["q_proj"],)], [1, 16, 64, 128, 1000, 4096], MODES),
    *(((LAYER["k_proj"],), rows, "W8A8") for rows in [72, 200, 512]),
    *itertools.product(TOGETHER, [1, 64, 128, 200], MODES),
    *(((shape,), 8, "W8A16") for shape in SHAPES),
    *(((shape,), 4096, "W8A8") for shape in SHAPES),
    (((128 * 19, 1024),), 4096, "W8A8"),  # tiles that have no common divisor with the snake
    (((256 * 19, 1024),), 4096, "W8A16"),  # pairs of tiles that have no common divisor with the snake
]
"""Kernels `(out, in)`, rows of x, and the mode."""


def label(case) -> str:
    kernels, rows, mode = case
    return f"{rows} rows, {mode}, " + ", ".join("{}x{}".format(*shape) for shape in kernels)


def shares_tiles(out: int, features: int, rows: int, mode: str) -> bool:
    """Whether thread blocks of a cluster share operands: those that widen a kernel only if all multiprocessors work."""
    tiles = -(-rows // 128) * out // 128
    return rows > 128 and (mode == "W8A8" or (out % 256 == 0 and tiles >= 132))


@pytest.mark.parametrize("case", CASES, ids=label)
def test_compiled_kernels(case):
    import compile_h200  # which changes the environment

    kernels = compile_kernels(compile_h200.lower_product(*case, compile_h200.HOPPER))
    assert kernels
    products = set()
    for kernel in kernels:
        (registers,) = map(int, re.findall(r"Used (\d+) registers", kernel.text))
        assert registers <= REGISTERS
        complaints = re.findall(r"ptxas.*(?:[Ww]arning|Performance Loss|\(C75\d\d\)).*", kernel.text)
        assert not [text for text in complaints if not IGNORED or IGNORED not in text]
        assert set(re.findall(r"(\d+) bytes spill", kernel.text)) == {"0"}, "registers are spilled"
        for record in kernel.run(kernel.zeros(), clusters=1, steps=STEPS):
            for address, tensor in record.loads + record.stores:
                assert address % 128 == 0
                # Scales are a row without swizzle; tiles have rows of 128 bytes, or of 64 where half a tile is widened.
                half = case[2] == "W8A16" and tensor.itemsize == 1 and case[1] > 64
                assert tensor.swizzle == (16 if len(tensor.box) == 2 else 64 if half else 128)
            assert record.loads
            assert {mode for _, modes in record.products for mode in modes} <= {1}, "operands are swizzled by 128 bytes"
            products |= {re.search(r"f32\.(\w+\.\w+)$", opcode)[1] for opcode, _ in record.products}
    assert products == {MODES[case[2]]}
    shared = any(shares_tiles(*shape, *case[1:]) for shape in case[0])
    assert any("multicast" in kernel.text for kernel in kernels) == shared
