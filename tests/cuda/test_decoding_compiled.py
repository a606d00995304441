"""The kernels of a decoding step compiled for the attention of real models: alignment, swizzle, copies, ptxas' log."""

import re

import jax
import jax.numpy as jnp
import pytest
from emulator import host
from emulator.compiled import compile_kernels
from helpers import dtype

from perparam.models.decoding import hopper_attention, hopper_rotate
from perparam.models.kv_cache import LayerCache

pytestmark = [pytest.mark.cuda, pytest.mark.optimised]

REGISTERS = 255
"""Of each thread: two blocks of 128 threads share the 65536 of a multiprocessor."""

MEMORY = (228 * 1024) // 2 - 1024
"""Bytes of shared memory of a block, so that two of them fit on a multiprocessor."""

STEPS = 3000

SHAPES = {
    "Qwen3-0.6B": (1, 16, 8, 128, 1024),
    "Qwen3-8B": (1, 32, 8, 128, 4096),
    "Qwen3-32B, 8 sequences": (8, 64, 8, 128, 1024),
    "Qwen2.5-0.5B": (1, 14, 2, 64, 256),
}
"""Sequences, query heads, key heads, columns of a head, slots."""


def lower(function, arguments, donated=()):
    import compile_h200  # which changes the environment

    return jax.jit(function, donate_argnums=donated).lower(*compile_h200.abstract(arguments))


def shaped(shape, of="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype(of))


def cache_of(batch, kv, d, slots):
    return LayerCache(shaped((batch, kv, d, slots)), shaped((batch, kv, slots, d)), None, None, dtype("bfloat16"))


def assert_sound(kernel):
    """Asserts what ptxas' log has to say."""
    (registers,) = map(int, re.findall(r"Used (\d+) registers", kernel.text))
    assert registers <= REGISTERS
    assert not re.findall(r"ptxas.*(?:[Ww]arning|Performance Loss|\(C75\d\d\)).*", kernel.text)
    assert set(re.findall(r"(\d+) bytes spill", kernel.text)) == {"0"}, "registers are spilled"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("normed", [True, False])
def test_rotation_is_one_launch_that_copies_no_cache(shape, normed):
    batch, heads, kv, d, slots = shape

    def step(cache, sums, scales, cos, sin, start):
        return hopper_rotate.rotate_and_store(sums, scales, cos, sin, cache, start, eps=1e-6)

    sums, scale = shaped((4, 8, (heads + 2 * kv) * d), "float32"), shaped((d,))
    side, start = shaped((batch, d // 2)), jax.ShapeDtypeStruct((), jnp.int32)
    arguments = cache_of(batch, kv, d, slots), sums, (scale, scale) if normed else None, side, side, start
    lowered = lower(step, arguments, donated=0)
    (kernel,) = compile_kernels(lowered)
    assert_sound(kernel)
    compiled = lowered.compile()
    program = compiled.as_text()
    assert "copy" not in re.findall(r"\s([a-z-]+)\(", program)
    assert "fusion" not in re.findall(r"\s([a-z-]+)\(", program)
    assert compiled.memory_analysis().alias_size_in_bytes == 2 * 2 * batch * kv * d * slots


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("narrow", [True, False])
def test_attention_is_two_launches(shape, narrow):
    batch, heads, kv, d, slots = shape
    if not hopper_attention.accepts(heads, kv, d, slots, narrow=narrow):
        assert (heads, d, narrow) == (14, 64, True)
        return

    def step(q, cache, queries, positions, length):
        return hopper_attention.attend(q, cache, queries, positions, length, rows=8, window=None, narrow=narrow)

    vector, number = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    positions = jax.ShapeDtypeStruct((batch, slots), jnp.int32)
    lowered = lower(step, (shaped((batch, heads, d)), cache_of(batch, kv, d, slots), vector, positions, number))
    first, second = compile_kernels(lowered)
    assert not {"copy", "fusion"} & set(re.findall(r"\s([a-z-]+)\(", lowered.compile().as_text()))
    assert_sound(first)
    assert_sound(second)
    assert host.launch(first.text, range(1 << 30, (1 << 30) + 8 * 2**20, 2**20)).shared <= MEMORY
    arrays = first.zeros()
    arrays[5][:] = jnp.asarray([slots], jnp.int32).view(jnp.uint8)
    (record,) = first.run(arrays, clusters=1, steps=STEPS)
    assert record.loads
    assert record.products
    for address, _ in record.loads + record.stores:
        assert address % 128 == 0
    tiles = {(tensor.box, tensor.swizzle) for _, tensor in record.loads if tensor.swizzle == 128}
    assert tiles, "keys and values are swizzled by 128 bytes"
    assert {mode for _, modes in record.products for mode in modes} == {1}
    assert {re.search(r"f32\.(\w+\.\w+)$", opcode)[1] for opcode, _ in record.products} == {"bf16.bf16"}
