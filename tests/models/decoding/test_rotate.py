"""The kernel that norms, rotates and stores, by the interpreter, against its reference."""

import jax
import jax.numpy as jnp
import pytest
from attention_operands import assert_rotation, rotation
from interpreter import interpreted, required

from perparam.models.decoding import hopper_rotate

pytestmark = required


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu():
    with interpreted():
        yield


def check(starts, **shape):
    """Compares the kernel, compiled once, with the reference for several slots."""
    run = jax.jit(hopper_rotate.rotate_and_store, static_argnames="eps")
    *operands, _ = rotation(**shape)
    for start in starts:
        assert_rotation((*operands, jnp.int32(start)), run)


def test_heads_are_taken_two_or_four_at_a_time():
    assert hopper_rotate.accepts(16, 8, 128)
    assert hopper_rotate.accepts(14, 2, 64)
    assert not hopper_rotate.accepts(15, 5, 64)
    assert not hopper_rotate.accepts(16, 8, 96)


@pytest.mark.slow
def test_with_norms_in_the_first_and_last_slot_and_clipped_to_it():
    check([0, 15, 16])


@pytest.mark.slow
def test_without_norms_for_several_sequences_and_two_heads_at_a_time():
    check([7], batch=3, heads=6, kv=2, parts=1, of="float16", normed=False)
