"""The mixture of experts of Qwen3-30B-A3B compiled for an H200: its kernels, what it copies, and what a token reads."""

import re

import jax
import numpy as np
import pytest
from emulator.compiled import compile_kernels, emulated
from hopper_operands import assert_products, grouped_products
from matmuls import FP8

pytestmark = [pytest.mark.cuda, pytest.mark.optimised]

STEPS = 3000
"""Of the emulator's scheduler: enough to fill all slots of a pipeline and to use the first of them again."""

MODES = {"W8A16": "bf16.bf16", "W8A8": "e4m3.e4m3"}
"""Operands of the matrix instructions."""

REGISTERS = 168
"""Of each thread, the most that ptxas has for 384 threads of a block."""

IGNORED = "(C7504)" if jax.__version_info__ >= (0, 12) else None
"""As for other kernels: see `test_compiled.py`."""


@pytest.mark.parametrize("x", ["bfloat16", FP8])
def test_a_token_reads_the_kernels_of_its_experts_once_and_no_others(x):
    sizes, outs, features = (0, 1, 0, 0, 1, 1, 0, 1, 0, 0), (256, 128), 384
    read = []

    def run(kernel, arrays):
        for record in kernel.run(arrays):
            for (_, tensor), box in zip(record.loads, record.boxes, strict=True):
                # Tiles are boxes of 8 rows that are swizzled together.
                if len(tensor.sizes) == 4 and tensor.sizes[0] * 8 in [len(sizes) * out for out in outs]:
                    read.append((tensor.sizes[0] * 8, box[0] * 8, box[1]))

    with emulated(run):
        assert_products(grouped_products(sizes, outs, features, x, processors=7))
    assert sorted(read) == sorted(
        (len(sizes) * out, group * out + row, step)
        for out in outs
        for group in np.flatnonzero(sizes)
        for row in range(0, out, 128)
        for step in range(features // 128)
    )


@pytest.mark.parametrize(("tokens", "mode"), [(1, "W8A16"), (1, "W8A8"), (64, "W8A8"), (4096, "W8A16")])
def test_the_experts_are_two_launches_that_copy_no_kernels(tokens, mode):
    import compile_h200  # which changes the environment

    lowered, shapes = compile_h200.lower_experts(tokens, mode, compile_h200.HOPPER)
    kernels = compile_kernels(lowered)
    compiled, _, _ = compile_h200.build(lowered)
    program = compiled.as_text()
    assert compile_h200.wide_kernels(program, shapes) == compile_h200.copied_kernels(program, shapes) == []
    assert " while(" not in program
    # The activations of a token's experts, and the results in tiles, up to 6 rows of them for each: XLA's `ragged_dot`
    # makes 16 GiB of 32768 rows.  For one token it is less than a kernel.
    assert compiled.memory_analysis().temp_size_in_bytes <= 2**20 + 7 * (8 * tokens) * 2048 * 2
    products = [kernel for kernel in kernels if "wgmma" in kernel.text]
    assert len(products) == 2
    assert len(kernels) == 4 if (mode, tokens) == ("W8A8", 64) else 2  # where activations are quantised by a kernel
    for kernel in products:
        (registers,) = map(int, re.findall(r"Used (\d+) registers", kernel.text))
        assert registers <= REGISTERS
        complaints = re.findall(r"ptxas.*(?:[Ww]arning|Performance Loss|\(C75\d\d\)).*", kernel.text)
        assert not [text for text in complaints if not IGNORED or IGNORED not in text]
        assert set(re.findall(r"(\d+) bytes spill", kernel.text)) == {"0"}, "registers are spilled"
        assert set(re.findall(r"wgmma\.mma_async\S*\.f32\.(\w+\.\w+)", kernel.text)) == {MODES[mode]}
        arrays = kernel.zeros()
        assert not [one for one in kernel.run(arrays, clusters=2) if one.loads or one.stores]  # no group has rows
        arrays[1 if mode == "W8A16" else 2].view(np.int32)[:] = 3  # the tiles of the first group, and of all
        for record in kernel.run(arrays, clusters=1, steps=STEPS):
            assert record.loads
            for address, tensor in record.loads + record.stores:
                assert address % 128 == 0
                half = mode == "W8A16" and tensor.itemsize == 1 and tokens == 4096  # of a tile is widened at a time
                assert tensor.swizzle == (16 if len(tensor.box) == 2 else 64 if half else 128)
