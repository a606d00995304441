"""The key-value cache: tokens fed in pieces give the logits of one pass over all of them."""

import functools

import checkpoints
import jax
import numpy as np
import pytest
from checkpoints import fields, relative_error, tensors, write
from flax import nnx

import perparam
from perparam import Policy
from perparam.models.kv_cache import EMPTY
from perparam.policies.errors import InvalidTokens

FLOAT32_ERROR = 1e-5
"""As in test_qwen3: the same sums in another order."""

IDS = np.array([[3, 14, 15, 9, 26, 5, 35, 8], [60, 60, 9, 7, 1, 2, 3, 4], [50, 51, 52, 60, 53, 54, 55, 56]], np.int32)
MASK = np.array([[1] * 8, [0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1, 1, 1]], bool)
SLOTS = 11  # more than are filled


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One layer attends to everything, the other to three tokens."""
    config = fields(use_sliding_window=True, sliding_window=3, max_window_layers=1)
    folder = write(tmp_path_factory.mktemp("small"), config, tensors(config))
    return perparam.load_model(folder, Policy(compute="f32"))


@functools.partial(jax.jit, static_argnums=0)
def step(graphdef, state, ids, mask, cache):
    model = nnx.merge(graphdef, state)
    hidden, cache = model.hidden(ids, mask, cache)
    return model.logits(hidden), cache


def feed(model, pieces):
    """Logits of the tokens fed in pieces of these lengths, and the cache after them."""
    cache, logits, start = model.empty_cache(3, SLOTS), [], 0
    for length in pieces:
        piece = slice(start, start + length)
        found, cache = step(*nnx.split(model), IDS[:, piece], MASK[:, piece], cache)
        logits.append(np.asarray(found))
        start += length
    return np.concatenate(logits, axis=1), cache


@pytest.fixture(scope="module")
def whole(model):
    return checkpoints.logits(model, IDS, MASK)


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [(8,), (5, 1, 1, 1)], ids=str)
def test_pieces_give_the_logits_of_the_whole(model, whole, pieces):
    logits, _ = feed(model, pieces)
    assert relative_error(logits, whole, MASK) <= FLOAT32_ERROR


def test_the_cache_counts_slots_and_real_tokens(model):
    _, cache = feed(model, (5, 1, 1, 1))
    assert int(cache.length) == 8
    np.testing.assert_array_equal(cache.tokens, [8, 6, 7])
    np.testing.assert_array_equal(np.asarray(cache.positions)[:, :8] != EMPTY, MASK)
    assert (np.asarray(cache.positions)[:, 8:] == EMPTY).all()
    np.testing.assert_array_equal(np.asarray(cache.positions)[1, 2:8], range(6))


def test_a_cache_holds_kv_heads_in_the_activations_dtype(model):
    cache = model.empty_cache(3, SLOTS)
    assert len(cache.keys) == len(cache.values) == 2
    assert {(array.shape, array.dtype) for array in cache.keys} == {((3, 2, 18, SLOTS), np.dtype("f4"))}
    assert {(array.shape, array.dtype) for array in cache.values} == {((3, 2, SLOTS, 18), np.dtype("f4"))}
    assert model.with_policy(None).empty_cache(3, SLOTS).keys[0].dtype == checkpoints.BF16


def test_a_cache_that_is_not_narrow_has_no_scales(model):
    cache = model.empty_cache(3, SLOTS)
    assert cache.key_scales == cache.value_scales == (None, None)
    assert [kept.dtype for kept in (cache.layer(1).keys, cache.layer(1).values)] == [np.float32] * 2


@pytest.mark.slow
def test_without_a_cache_the_one_returned_holds_the_calls_tokens(model):
    _, found = model.hidden(IDS, MASK)
    _, fed = feed(model, (8,))
    assert int(found.length) == 8
    np.testing.assert_array_equal(found.tokens, fed.tokens)
    np.testing.assert_array_equal(found.positions, np.asarray(fed.positions)[:, :8])
    for i in range(2):
        keys = np.asarray(fed.keys[i])[..., :8]
        assert relative_error(found.keys[i], keys) <= FLOAT32_ERROR
    with pytest.raises(InvalidTokens, match="the cache has room for 8 tokens and holds 8, found 1 more"):
        model.hidden(IDS[:, :1], MASK[:, :1], found)


def test_tokens_that_do_not_fit_are_refused(model):
    cache = model.empty_cache(3, 7)
    with pytest.raises(InvalidTokens, match="the cache has room for 7 tokens and holds 0, found 8 more"):
        model.hidden(IDS, MASK, cache)
    _, cache = step(*nnx.split(model), IDS[:, :5], MASK[:, :5], model.empty_cache(3, SLOTS))
    with pytest.raises(InvalidTokens, match="the cache has room for 11 tokens and holds 5, found 8 more"):
        model.hidden(IDS, MASK, cache)


def test_a_mistake_in_positions_would_be_noticed(model, whole):
    """Were the padded row's positions to count its padding, its logits would differ."""
    logits = checkpoints.logits(model, IDS, np.ones_like(MASK))
    assert relative_error(logits[1:], whole[1:], MASK[1:]) > 1e-2
