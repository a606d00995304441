"""The trials of rotation and attention: the reference passes in place of a kernel, and each planted mistake fails."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_operands import clean
from helpers import dtype

from perparam.models.decoding import attention_trials, hopper_attention, hopper_rotate, reference
from perparam.models.kv_cache import EMPTY, LayerCache

BF16 = dtype("bfloat16")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(attention_trials, "SLOTS", 96)
    monkeypatch.setattr(attention_trials, "LENGTHS", (1, 70, 96))


def rotate(sums, scales, cos, sin, cache, start, *, eps):
    return reference.rotate_and_store(sums, scales, cos, sin, cache, start, eps=eps)


def _cached(change):
    """A wrong kernel, which stores something else."""

    def wrong(sums, scales, cos, sin, cache, start, *, eps):
        q, new = rotate(sums, scales, cos, sin, cache, start, eps=eps)
        keys, values = change(new.keys, new.values, start)
        return q, LayerCache(keys, values, None, None, cache.dtype)

    return wrong


WRONG_ROTATION = {
    "the other direction": lambda sums, scales, cos, sin, *rest, eps: rotate(sums, scales, cos, -sin, *rest, eps=eps),
    "scales exchanged": lambda sums, scales, *rest, eps: rotate(sums, scales[::-1], *rest, eps=eps),
    "not normed": lambda sums, scales, *rest, eps: rotate(sums, None, *rest, eps=eps),
    "a part left out": lambda sums, *rest, eps: rotate(sums[:1], *rest, eps=eps),
    "the next slot": lambda *operands, eps: rotate(*operands[:-1], operands[-1] + 1, eps=eps),
    "another slot overwritten": _cached(lambda keys, values, start: (keys.at[..., 3].set(1), values)),
    "no value": _cached(lambda keys, values, start: (keys, values.at[:, :, start].set(0))),
    "key heads exchanged": _cached(
        lambda keys, values, start: (keys.at[:, :, :, start].set(keys[:, ::-1, :, start]), values)
    ),
    "NaN": lambda *operands, eps: jax.tree.map(lambda x: x.at[0, 0].set(jnp.nan), rotate(*operands, eps=eps)),
}


def attend(q, cache, queries, slots, length, *, rows, window, narrow):
    settings = {"rows": rows, "window": window, "narrow": narrow}
    return reference.attend(q, clean(cache), queries, slots, length, **settings)


def _result(change):
    """A wrong kernel with another result."""
    return lambda *operands, **settings: change(*attend(*operands, **settings))


def _with(**settings):
    return lambda *operands, **old: attend(*operands, **(old | settings))


WRONG_ATTENTION = {
    "unfilled slots count": lambda q, cache, *rest, **settings: reference.attend(q, cache, *rest, **settings),
    "no window": _with(window=None),
    "empty slots are seen": lambda q, cache, queries, slots, length, **settings: attend(
        q, cache, queries, jnp.where(slots == EMPTY, 0, slots), length, **settings
    ),
    "the last slot is not seen": lambda q, cache, queries, *rest, **settings: attend(
        q, cache, jnp.maximum(queries - 1, 0), *rest, **settings
    ),
    "scores scaled wrongly": lambda q, *rest, **settings: attend(q * 2, *rest, **settings),
    "another key head": lambda q, cache, *rest, **settings: attend(
        q, LayerCache(cache.keys[:, ::-1], cache.values, None, None, cache.dtype), *rest, **settings
    ),
    "a head lost": _result(lambda y, scales: (y.at[:, :128].set(0), scales)),
    "padding is not zero": _result(lambda y, scales: (y.at[-1, 3].set(1), scales)),
    "NaN": _result(lambda y, scales: (y.at[0, 3].set(jnp.nan), scales)),
}

WRONG_QUANTISATION = {
    "scales twice as large": _result(lambda y, scales: (y, scales * 2)),
    "scales of other rows": _result(lambda y, scales: (y, scales[:, ::-1])),
    "scales without padding": _result(lambda y, scales: (y, scales[:, :8])),
    "not quantised": _with(narrow=False),
    "zeros": _result(lambda y, scales: (jnp.zeros_like(y), scales)),
}


class TestRotation:
    @pytest.mark.slow
    @pytest.mark.parametrize("normed", [True, False])
    def test_the_reference_passes(self, monkeypatch, normed):
        monkeypatch.setattr(hopper_rotate, "rotate_and_store", rotate)
        assert attention_trials.of_rotation(BF16, normed).compare() is None

    @pytest.mark.thorough
    @pytest.mark.parametrize("mistake", WRONG_ROTATION)
    def test_a_mistake_fails(self, monkeypatch, mistake):
        monkeypatch.setattr(hopper_rotate, "rotate_and_store", WRONG_ROTATION[mistake])
        assert attention_trials.of_rotation(BF16, True).compare()


class TestAttention:
    @pytest.mark.slow
    @pytest.mark.parametrize("narrow", [True, False])
    def test_the_reference_passes(self, monkeypatch, narrow):
        monkeypatch.setattr(hopper_attention, "attend", attend)
        assert attention_trials.of_attention(BF16, narrow).compare() is None

    @pytest.mark.thorough
    @pytest.mark.parametrize("mistake", WRONG_ATTENTION)
    def test_a_mistake_fails(self, monkeypatch, mistake):
        monkeypatch.setattr(hopper_attention, "attend", WRONG_ATTENTION[mistake])
        assert attention_trials.of_attention(BF16, False).compare()

    @pytest.mark.thorough
    @pytest.mark.parametrize("mistake", WRONG_QUANTISATION)
    def test_a_mistake_of_quantisation_fails(self, monkeypatch, mistake):
        monkeypatch.setattr(hopper_attention, "attend", WRONG_QUANTISATION[mistake])
        assert attention_trials.of_attention(BF16, True).compare()


def test_kinds_are_told_apart():
    kinds = {
        attention_trials.of_attention(of, narrow) for of in (BF16, np.dtype("float16")) for narrow in (True, False)
    }
    assert len(kinds | {attention_trials.of_rotation(BF16, normed) for normed in (True, False)}) == 6
