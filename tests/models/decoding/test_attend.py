"""The kernels of attention over the filled slots, by the interpreter, against their reference."""

import jax
import pytest
from attention_operands import assert_attention, attention
from interpreter import interpreted, required

from perparam.models.decoding import hopper_attention, hopper_combine

pytestmark = required


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu():
    with interpreted():
        yield


def check(cases, window=None, narrow=False, rows=8, **shape):
    """Compares the kernels, compiled once, with the reference for several lengths and paddings."""
    run = jax.jit(hopper_attention.attend, static_argnames=("rows", "window", "narrow"))
    for length, left in cases:
        assert_attention(attention(length=length, left=left, **shape), window, narrow, rows, run)


def test_splits_fill_a_gpu_and_have_a_tile_each():
    assert hopper_attention.splits(8, 64 * 8, 132) == 8
    assert hopper_attention.splits(8, 64 * 100, 132) == 33
    assert hopper_attention.splits(1000, 4096, 132) == 1


def test_shapes():
    assert hopper_attention.accepts(16, 8, 128, 1024, narrow=True)
    assert hopper_attention.accepts(14, 2, 64, 1024, narrow=False)
    assert not hopper_attention.accepts(14, 2, 64, 1024, narrow=True)
    assert not hopper_attention.accepts(16, 8, 128, 96, narrow=False)


@pytest.mark.slow
def test_one_slot_full_tiles_partial_tiles_and_padding():
    check([(1, 0), (64, 0), (130, 3), (192, 0)], slots=192)


@pytest.mark.slow
def test_quantised_with_a_window_and_more_tiles_than_stages(monkeypatch):
    monkeypatch.setattr(hopper_attention, "splits", lambda *_: 2)
    monkeypatch.setattr(hopper_combine, "TOGETHER", 1)
    shape = {"batch": 3, "heads": 2, "kv": 1, "slots": 384, "of": "float16"}
    check([(384, 0), (130, 40)], window=100, narrow=True, **shape)
