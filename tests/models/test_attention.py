"""`attend` against explicit loops in numpy, whole and in chunks, and masks that come from positions."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import relative_error

from perparam.models import attention
from perparam.models.kv_cache import EMPTY, LayerCache, token_positions

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
    return attention.attend(jnp.asarray(q), LayerCache.of(jnp.asarray(k), jnp.asarray(v), q.dtype), *rest)[0]


def both(q, k, v, *rest):
    """What `attend` gives, and its weights."""
    mixed, weights = attention.attend(jnp.asarray(q), LayerCache.of(jnp.asarray(k), jnp.asarray(v), q.dtype), *rest)
    return mixed, weights()


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


def reference_weights(q, k, queries, slots, window):
    """(b, heads, t, s) in float64, 0 where a query sees nothing of a slot."""
    q, k = q.astype(np.float64), np.repeat(k.astype(np.float64), q.shape[2] // k.shape[2], axis=2)
    distance = queries[:, None, :, None] - slots[:, None, None, :]
    seen = (distance >= 0) & (distance < (window or 2**31))
    scores = np.where(seen, np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[3]), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


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


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("window", [None, 3])
def test_weights_are_what_values_are_mixed_by(dtype, window):
    q, k, v = inputs(dtype)
    mixed, weights = both(q, k, v, QUERIES, SLOTS, window)
    assert weights.shape == (B, HEADS, T, S)
    assert weights.dtype == mixed.dtype == dtype
    error = FLOAT32_ERROR if dtype == np.float32 else BF16_ERROR
    expected = reference_weights(q, k, QUERIES, SLOTS, window)
    assert relative_error(weights, expected) <= error
    assert (np.asarray(weights)[expected == 0] == 0).all()
    by_hand = np.einsum("bhts,bshd->bthd", expected, np.repeat(v.astype(np.float64), HEADS // KV, axis=2))
    assert relative_error(mixed, by_hand.reshape(B, T, -1)) <= error


# In chunks.

LONG = 45  # queries: no multiple of a chunk


def long_inputs(dtype=np.float32):
    """A row left-padded, one padded in its middle, and their positions."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(2, LONG, heads, D)).astype(dtype) for heads in (HEADS, KV, KV))
    mask = np.ones((2, LONG), bool)
    mask[0, :7] = mask[1, 20:25] = False
    queries, slots = map(np.asarray, token_positions(mask, np.zeros(2, np.int32)))
    return q, k, v, queries, slots, mask


def scores_of(queries):
    """Bytes of the scores of so many queries of `long_inputs`."""
    return 4 * 2 * HEADS * LONG * queries


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("window", [None, 5, 30])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_chunks_give_what_the_whole_gives(monkeypatch, dtype, window, size):
    q, k, v, queries, slots, mask = long_inputs(dtype)
    whole, weights = both(q, k, v, queries, slots, window)
    monkeypatch.setattr(attention, "SCORES", scores_of(size))
    found, found_weights = both(q, k, v, queries, slots, window)
    assert found.shape == whole.shape
    assert found.dtype == whole.dtype
    # The same sums for each query, though XLA may take them in another order.
    error = FLOAT32_ERROR if dtype == np.float32 else BF16_ERROR
    assert relative_error(found, whole, mask) <= error
    np.testing.assert_array_equal(found_weights, weights)
    expected = np.einsum(
        "bhts,bshd->bthd",
        reference_weights(q, k, queries, slots, window),
        np.repeat(v.astype(np.float64), HEADS // KV, axis=2),
    )
    assert relative_error(found, expected.reshape(2, LONG, -1), mask) <= error
    assert np.isfinite(np.asarray(found, np.float32)).all()


@pytest.mark.parametrize("kept_in", [jnp.float8_e4m3fn, jnp.int8])
def test_chunks_of_a_narrow_cache_give_what_the_whole_gives(monkeypatch, kept_in):
    q, k, v, queries, slots, mask = long_inputs()
    kept = LayerCache.of(jnp.asarray(k), jnp.asarray(v), np.dtype(kept_in))
    whole, _ = attention.attend(jnp.asarray(q), kept, queries, slots, 5)
    monkeypatch.setattr(attention, "SCORES", scores_of(16))
    found, _ = attention.attend(jnp.asarray(q), kept, queries, slots, 5)
    assert relative_error(found, whole, mask) <= FLOAT32_ERROR


@pytest.mark.slow
def test_chunks_have_the_derivatives_of_the_whole(monkeypatch):
    q, k, v, queries, slots, mask = long_inputs()
    towards = np.random.default_rng(2).normal(size=(2, LONG, HEADS * D)).astype(np.float32) * mask[:, :, None]

    def both_modes():
        def loss(q, k, v):
            return jnp.sum(attend(q, k, v, queries, slots, 30) * towards)

        return *jax.grad(loss, (0, 1, 2))(q, k, v), jax.jvp(loss, (q, k, v), (v[:, :, :1] + q * 0, v, k))[1]

    whole = both_modes()
    monkeypatch.setattr(attention, "SCORES", scores_of(16))
    for found, expected in zip(both_modes(), whole, strict=True):
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * float(np.abs(expected).max()))


def test_a_chunk_in_bfloat16_passes_a_gradient(monkeypatch):
    """Parts are put in place as bits, which have no slope."""
    q, k, v, queries, slots, _ = long_inputs(ml_dtypes.bfloat16)
    monkeypatch.setattr(attention, "SCORES", scores_of(16))
    gradients = jax.grad(lambda *qkv: attend(*qkv, queries, slots, None).sum().astype(jnp.float32), (0, 1, 2))(q, k, v)
    assert all(float(jnp.abs(gradient.astype(jnp.float32)).max()) > 0.01 for gradient in gradients)


@pytest.mark.parametrize("kept_in", [jnp.float8_e4m3fn, jnp.int8])
def test_chunks_over_a_narrow_cache_pass_a_gradient(monkeypatch, kept_in):
    q, k, v, queries, slots, _ = long_inputs()
    kept = LayerCache.of(jnp.asarray(k), jnp.asarray(v), np.dtype(kept_in))

    def gradient():
        return jax.grad(lambda q: attention.attend(q, kept, queries, slots, None)[0].sum())(jnp.asarray(q))

    whole = gradient()
    monkeypatch.setattr(attention, "SCORES", scores_of(16))
    np.testing.assert_allclose(gradient(), whole, atol=1e-5 * float(jnp.abs(whole).max()))


@pytest.mark.parametrize("size", [16, 32])
def test_no_more_scores_are_held_than_allowed(monkeypatch, size):
    """The largest array of the program beside its arguments: scores of one chunk."""
    q, k, v, queries, slots, _ = long_inputs()
    monkeypatch.setattr(attention, "SCORES", scores_of(size))
    text = str(jax.make_jaxpr(lambda q: attend(q, k, v, queries, slots, None))(jnp.asarray(q)))
    assert f"f32[2,{KV},{HEADS // KV},{size},{LONG}]" in text
    assert f"f32[2,{KV},{HEADS // KV},{LONG},{LONG}]" not in text


@pytest.mark.parametrize(("queries", "row"), [(1, 2**40), (5, 2**40), (1, 2**26 + 1), (20, 2**23), (4096, 2**16)])
def test_a_chunk_is_never_longer_than_what_there_is(queries, row):
    """A single query, as in decoding, is looked at as one whatever the cache."""
    assert 1 <= attention._chunk(queries, row) <= queries


def test_a_chunk_is_as_long_as_its_scores_allow():
    assert attention._chunk(100, attention.SCORES // 100) == 100
    for row in (2**10, 3 * 2**15, 2**20):
        assert attention.SCORES // 2 < attention._chunk(10**6, row) * row <= attention.SCORES


def test_positions_count_real_tokens():
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 0, 1]], bool)
    queries, slots = token_positions(mask, np.array([0, 10, 0], np.int32))
    np.testing.assert_array_equal(np.asarray(queries)[mask], [0, 1, 2, 10, 11, 12, 0, 1, 2])
    np.testing.assert_array_equal(np.asarray(slots)[mask], np.asarray(queries)[mask])
    assert (np.asarray(slots)[~mask] == EMPTY).all()
    assert (np.asarray(queries) >= 0).all()
    assert queries.dtype == slots.dtype == np.int32
