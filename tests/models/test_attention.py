"""`attend` against explicit loops in numpy, and masks that come from positions."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import relative_error

from perparam.models import attention
from perparam.models.attention import EMPTY, as_cached, token_positions

FLOAT32_ERROR = 1e-6
"""Sums of 8 products, a softmax over 9 scores and a sum of 9 products, each term rounded to 2**-24."""

BF16_ERROR = 2**-7
"""Weights and the result are rounded, each by up to 2**-8 relative: their sum."""

B, T, S, HEADS, KV, D = 2, 5, 9, 6, 2, 8


def inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (B, T, HEADS, D), (B, S, KV, D), (B, S, KV, D)
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


QUERIES = np.array([[4, 5, 6, 7, 8], [2, 3, 4, 5, 6]], np.int32)
SLOTS = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8], [EMPTY, EMPTY, 0, 1, 2, 3, 4, 5, 6]], np.int32)


def attend(q, k, v, *rest):
    """`attention.attend` of keys and values (b, s, kv, d), as projections give them."""
    return attention.attend(jnp.asarray(q), *as_cached(jnp.asarray(k), jnp.asarray(v)), *rest)


def reference(q, k, v, queries, slots, window):
    """One query, one head at a time, with kv heads repeated for the query heads that share them."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = np.repeat(k, HEADS // KV, axis=2), np.repeat(v, HEADS // KV, axis=2)
    mixed = np.zeros(q.shape)
    for b, t, h in np.ndindex(B, T, HEADS):
        seen = [
            s
            for s in range(S)
            if slots[b, s] <= queries[b, t] and (window is None or queries[b, t] - slots[b, s] < window)
        ]
        scores = np.array([q[b, t, h] @ k[b, s, h] for s in seen]) / np.sqrt(D)
        weights = np.exp(scores - scores.max())
        mixed[b, t, h] = sum(w * v[b, s, h] for w, s in zip(weights / weights.sum(), seen, strict=True))
    return mixed.reshape(B, T, HEADS * D)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_it_is_attention_with_repeated_heads(window):
    q, k, v = inputs()
    found = attend(q, k, v, QUERIES, SLOTS, window)
    assert relative_error(found, reference(q, k, v, QUERIES, SLOTS, window)) <= FLOAT32_ERROR


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("window", [None, 3])
def test_a_single_query_as_in_decoding(dtype, window):
    q, k, v = inputs(dtype)
    found = attend(q[:, -1:], k, v, QUERIES[:, -1:], SLOTS, window)
    expected = reference(q, k, v, QUERIES, SLOTS, window)[:, -1:]
    assert found.shape == (B, 1, HEADS * D)
    assert relative_error(found, expected) <= (FLOAT32_ERROR if dtype == np.float32 else BF16_ERROR)


def test_a_window_as_long_as_the_row_is_no_window():
    q, k, v = inputs()
    whole = attend(q, k, v, QUERIES, SLOTS, None)
    np.testing.assert_array_equal(attend(q, k, v, QUERIES, SLOTS, S), whole)
    assert not np.array_equal(attend(q, k, v, QUERIES, SLOTS, 3), whole)


def test_bfloat16_is_summed_in_float32():
    q, k, v = inputs(ml_dtypes.bfloat16)
    found = attend(q, k, v, QUERIES, SLOTS, None)
    assert found.dtype == jnp.bfloat16
    assert relative_error(found, reference(q, k, v, QUERIES, SLOTS, None)) <= BF16_ERROR


def test_what_stands_in_empty_slots_changes_nothing():
    q, k, v = inputs()
    found = attend(q, k, v, QUERIES, SLOTS, None)
    k[1, :2], v[1, :2] = 1e4, 1e4
    np.testing.assert_array_equal(attend(q, k, v, QUERIES, SLOTS, None), found)


def test_a_later_key_changes_no_earlier_query():
    q, k, v = inputs()
    found = np.asarray(attend(q, k, v, QUERIES, SLOTS, None))
    k[:, -1] += 1
    changed = np.asarray(attend(q, k, v, QUERIES, SLOTS, None))
    np.testing.assert_array_equal(changed[:, :-1], found[:, :-1])
    assert not np.array_equal(changed[:, -1], found[:, -1])


def test_a_query_that_sees_nothing_is_finite():
    q, k, v = inputs()
    assert np.isfinite(attend(q, k, v, QUERIES, np.full_like(SLOTS, EMPTY), None)).all()


def test_positions_count_real_tokens():
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 0, 1]], bool)
    queries, slots = token_positions(mask, np.array([0, 10, 0], np.int32))
    np.testing.assert_array_equal(np.asarray(queries)[mask], [0, 1, 2, 10, 11, 12, 0, 1, 2])
    np.testing.assert_array_equal(np.asarray(slots)[mask], np.asarray(queries)[mask])
    assert (np.asarray(slots)[~mask] == EMPTY).all()
    assert (np.asarray(queries) >= 0).all()
    assert queries.dtype == slots.dtype == np.int32
