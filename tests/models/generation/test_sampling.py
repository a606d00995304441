"""Drawing tokens: each step beside its definition and transformers, draws beside the distribution they are of."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from checkpoints import GOLDEN

from perparam.models.generation.keys import row_keys
from perparam.models.generation.sampling import GREEDY, History, Sampling, draw, process
from perparam.policies.errors import InvalidSampling

DRAWS = 120_000
UNLIKELY = 1e-4
"""A p-value that a right implementation falls below once in 10,000 tests; seeds are fixed, so that it does not."""

FLOAT32_ERROR = 1e-6
"""Relative: a division, a product and a sum in float32, each within 2**-24, here and in transformers."""

MADE = np.load(GOLDEN / "sampling.npz")
CASES = [json.loads(case) for case in MADE["cases"]]
VOCABULARY = MADE["logits"].shape[1]


@functools.partial(jax.jit, static_argnums=0)
def _processed(kind, numbers, logits, history):
    return process(kind, numbers, logits, history)


def processed(sampling, logits, prompt=None, answer=None):
    """Logits (b, vocabulary) after `sampling`, the tokens so far being `prompt` and `answer`, both (b, time)."""
    logits = np.asarray(logits, np.float32)
    rows, vocabulary = logits.shape
    prompt = np.zeros((rows, 0), np.int32) if prompt is None else np.asarray(prompt, np.int32)
    answer = np.zeros((rows, 0), np.int32) if answer is None else np.asarray(answer, np.int32)
    tokens = np.concatenate([prompt, answer], axis=1)
    history = History(
        tokens,
        np.ones(tokens.shape, bool),
        np.stack([np.isin(np.arange(vocabulary), row) for row in prompt]),
        np.stack([np.bincount(row, minlength=vocabulary) for row in answer]).astype(np.int32),
    )
    return np.asarray(_processed(sampling.kind, sampling.numbers(vocabulary), logits, history))


def random_logits(rows=3, vocabulary=11, seed=0):
    return 2 * np.random.default_rng(seed).normal(size=(rows, vocabulary)).astype(np.float32)


# Each step.


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: " ".join(f"{k}={v}" for k, v in CASES[i].items()))
def test_steps_are_those_of_transformers(index):
    found = processed(Sampling(**CASES[index]), MADE["logits"], MADE["prompt"], MADE["answer"])
    expected = MADE["processed"][index]
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    kept = ~np.isneginf(expected)
    np.testing.assert_allclose(found[kept], expected[kept], rtol=FLOAT32_ERROR, atol=0)


def test_the_golden_cases_filter_something_and_not_everything():
    kept = np.isfinite(MADE["processed"]).sum(axis=-1)
    assert (kept > 0).all()
    assert {1, VOCABULARY} <= set(kept.ravel())
    assert len(np.unique(kept)) > 10


def test_presence_and_frequency_penalties():
    logits, answer = random_logits(), np.array([[1, 1, 1, 4], [0, 2, 3, 3], [10, 10, 10, 10]])
    counts = np.stack([np.bincount(row, minlength=11) for row in answer])
    found = processed(Sampling(presence_penalty=0.7, frequency_penalty=-0.3), logits, answer[:, ::-1], answer)
    np.testing.assert_allclose(found, logits - 0.7 * (counts > 0) + 0.3 * counts, rtol=1e-6, atol=1e-6)


def test_presence_and_frequency_penalties_leave_the_prompt_alone():
    logits = random_logits()
    found = processed(Sampling(presence_penalty=2, frequency_penalty=2), logits, prompt=[[1, 2], [3, 4], [5, 6]])
    np.testing.assert_array_equal(found, logits)


def test_a_bias_is_added():
    logits = random_logits()
    found = processed(Sampling(logit_bias={3: 1.5, 0: -1e30, 10: -2}), logits)
    expected = logits.copy()
    expected[:, 3] += np.float32(1.5)
    expected[:, 10] -= 2
    expected[:, 0] = -1e30
    np.testing.assert_array_equal(found, expected)


def test_penalties_and_bias_come_before_the_temperature_and_the_filters():
    logits, answer = random_logits(), np.array([[1], [2], [3]])
    how = Sampling(temperature=0.5, top_k=2, presence_penalty=100.0, logit_bias={7: 50.0})
    found = processed(how, logits, answer=answer)
    assert (np.isfinite(found).sum(axis=1) == 2).all()
    np.testing.assert_allclose(found[:, 7], (logits[:, 7] + 50) / 0.5, rtol=1e-6)
    assert all(np.isneginf(found[row, token]) for row, (token,) in enumerate(answer))


def test_top_k_keeps_every_token_as_likely_as_the_last_that_it_keeps():
    np.testing.assert_array_equal(
        np.isfinite(processed(Sampling(top_k=2), [[3.0, 1.0, 2.0, 2.0, 0.0]])), [[True, False, True, True, False]]
    )


@pytest.mark.parametrize("how", [Sampling(top_p=0.0), Sampling(top_p=1e-9), Sampling(top_k=1), Sampling(min_p=1.0)])
def test_filters_always_keep_the_likeliest_token(how):
    logits = random_logits(50)
    found = processed(how, logits)
    np.testing.assert_array_equal(np.isfinite(found), logits == logits.max(axis=1, keepdims=True))


def test_filters_ignore_tokens_that_are_already_excluded():
    """A processor has left three tokens: no filter brings another one back, or leaves none."""
    logits = np.full((1, 11), -np.inf, np.float32)
    logits[0, [2, 5, 7]] = 1, 0.5, -3
    for how in (Sampling(top_k=5), Sampling(top_p=0.9999), Sampling(min_p=1e-4), Sampling(top_k=5, top_p=0.9999)):
        found = processed(how, logits)
        np.testing.assert_array_equal(np.isfinite(found), np.isfinite(logits))
        np.testing.assert_array_equal(found, logits)


def test_greedy_decoding_uses_no_temperature_and_no_filter():
    logits = random_logits()
    how = Sampling(temperature=0, top_k=1, top_p=0.1, min_p=0.9)
    np.testing.assert_array_equal(processed(how, logits), logits)
    keys = row_keys(0, 3)
    np.testing.assert_array_equal(draw(how.kind, jnp.asarray(logits), keys), logits.argmax(axis=1))
    np.testing.assert_array_equal(draw(GREEDY.kind, jnp.asarray(logits), keys), logits.argmax(axis=1))


@pytest.mark.parametrize("temperature", [1e-2, 1e-6], ids=str)
def test_a_low_temperature_is_nearly_greedy(temperature):
    logits = random_logits(100)
    how = Sampling(temperature=temperature)
    found = processed(how, logits)
    assert np.isfinite(found).all()
    tokens = draw(how.kind, jnp.asarray(found), row_keys(0, 100))
    gap = np.diff(np.sort(logits, axis=1)[:, -2:])[:, 0]
    clear = gap > 30 * temperature  # another token is drawn once in e**30 times
    assert clear.sum() > 50
    np.testing.assert_array_equal(np.asarray(tokens)[clear], logits.argmax(axis=1)[clear])


# Processors of one's own.


def not_again(history, logits):
    """Forbids the token that came last."""
    places = jnp.where(history.real, jnp.arange(history.real.shape[1]), -1)
    last = jnp.take_along_axis(history.tokens, jnp.argmax(places, axis=1)[:, None], axis=1)
    return jnp.where(jnp.arange(logits.shape[1]) == last, -jnp.inf, logits)


def doubled(history, logits):
    return 2 * logits


def test_processors_are_applied_in_their_order():
    logits, answer = random_logits(), np.array([[1, 4], [3, 2], [10, 0]])
    found = processed(Sampling(processors=(not_again, doubled)), logits, answer=answer)
    expected = 2 * logits
    expected[range(3), answer[:, -1]] = -np.inf
    np.testing.assert_array_equal(found, expected)


def test_processors_see_penalties_and_the_temperature_sees_them():
    def first_is_ten(history, logits):
        return logits.at[:, 0].set(10)

    found = processed(Sampling(temperature=0.5, logit_bias={0: 99.0, 1: 1.0}, processors=[first_is_ten]), [[0.0, 0, 0]])
    np.testing.assert_array_equal(found, [[20, 2, 0]])
    found = processed(Sampling(temperature=0, processors=[first_is_ten]), [[0.0, 0, 0]])
    np.testing.assert_array_equal(found, [[10, 0, 0]])


# Draws.


def shares(logits):
    """The distribution of processed logits (vocabulary,), in float64."""
    weights = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return weights / weights.sum()


def fits(tokens, expected):
    """Asserts that `tokens` are draws of `expected` (vocabulary,), by Pearson's chi-square; what has no share is never
    drawn."""
    counts = np.bincount(np.asarray(tokens).ravel(), minlength=len(expected))
    assert counts[expected == 0].sum() == 0
    counts, expected = counts[expected > 0], expected[expected > 0]
    if len(expected) > 1:
        assert scipy.stats.chisquare(counts, counts.sum() * expected).pvalue > UNLIKELY


LOGITS = np.array([1.3, -0.4, 0.0, 2.1, -2.5, 0.6, 1.2, -1.0, 0.9], np.float32)
P = shares(LOGITS)
RANKED = np.argsort(-P)


def only(tokens, weights=P):
    """The distribution with all but these tokens left out."""
    left = np.where(np.isin(np.arange(len(P)), tokens), weights, 0)
    return left / left.sum()


def closed_forms():
    """Samplings, the answer so far, and the distribution each one is, by definition."""
    nucleus = RANKED[: int(np.searchsorted(np.cumsum(P[RANKED]), 0.8)) + 1]
    penalised = LOGITS.astype(np.float64)
    penalised[3] /= 1.8
    penalised[1] *= 1.8
    spoken = LOGITS - 0.5 * np.isin(np.arange(9), [1, 3]) - 0.25 * np.bincount([3, 3, 1], minlength=9)
    return {
        "plain": (Sampling(), P),
        "cold": (Sampling(temperature=0.4), shares(LOGITS / np.float64(0.4))),
        "hot": (Sampling(temperature=3.0), shares(LOGITS / np.float64(3))),
        "top_k": (Sampling(top_k=4), only(RANKED[:4])),
        "top_p": (Sampling(top_p=0.8), only(nucleus)),
        "min_p": (Sampling(min_p=0.3), only(np.flatnonzero(0.3 * P.max() <= P))),
        "top_k hot": (Sampling(temperature=3.0, top_k=4), only(RANKED[:4], shares(LOGITS / np.float64(3)))),
        "repetition": (Sampling(repetition_penalty=1.8), shares(penalised)),
        "presence and frequency": (Sampling(presence_penalty=0.5, frequency_penalty=0.25), shares(spoken)),
        "bias": (Sampling(logit_bias={4: 3.0, 3: -1.0}), shares(LOGITS + 3.0 * (np.arange(9) == 4) - (RANK3))),
        "processor": (Sampling(processors=(not_again,)), only(np.delete(np.arange(9), 1))),
    }


RANK3 = (np.arange(9) == 3).astype(np.float64)
FORMS = closed_forms()
ANSWER = [[3, 3, 1]]


def drawn(sampling, keys):
    """A token for each key from LOGITS after ANSWER."""
    logits = jnp.asarray(processed(sampling, LOGITS[None], answer=ANSWER))
    return np.asarray(jax.jit(draw, static_argnums=0)(sampling.kind, jnp.broadcast_to(logits, (len(keys), 9)), keys))


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_draws_are_of_the_distribution(name):
    sampling, expected = FORMS[name]
    fits(drawn(sampling, row_keys(3, DRAWS)), expected)


def test_the_check_notices_a_distribution_that_is_a_little_off():
    with pytest.raises(AssertionError):
        fits(drawn(Sampling(temperature=1.03), row_keys(3, DRAWS)), P)


KEYS = {
    "rows of a seed": lambda: row_keys(11, DRAWS),
    "seeds one after the other": lambda: row_keys(np.arange(DRAWS), DRAWS),
    "samples of a seed": lambda: row_keys(11, 2, DRAWS // 2),
    "places in an answer": lambda: jax.vmap(jax.random.fold_in, (None, 0))(
        row_keys(11, 1)[0], jnp.arange(DRAWS, dtype=jnp.int32)
    ),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_are_independent_of_their_neighbours(name):
    """Draws are of the distribution, and pairs of neighbours of the product of two."""
    tokens = drawn(Sampling(), KEYS[name]())
    fits(tokens, P)
    fits(9 * tokens[::2] + tokens[1::2], np.outer(P, P).ravel())


# What is refused.


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("temperature", -0.1, "0 to inf, found -0.1"),
        ("temperature", float("nan"), "found nan"),
        ("temperature", float("inf"), "found inf"),
        ("temperature", "1", "found '1'"),
        ("temperature", None, "found None"),
        ("temperature", True, "found True"),
        ("top_k", -1, "found -1"),
        ("top_k", 2.0, "found 2.0"),
        ("top_k", False, "found False"),
        ("top_p", -0.01, "0 to 1, found -0.01"),
        ("top_p", 1.01, "0 to 1, found 1.01"),
        ("min_p", 1.01, "0 to 1, found 1.01"),
        ("min_p", -1, "found -1"),
        ("repetition_penalty", 0.0, "found 0.0"),
        ("repetition_penalty", -2, "found -2"),
        ("presence_penalty", float("inf"), "found inf"),
        ("frequency_penalty", float("nan"), "found nan"),
    ],
)
def test_values_out_of_range_are_refused(field, value, said):
    with pytest.raises(InvalidSampling, match=rf"^{field}: expected a number from .*{said}\.$"):
        Sampling(**{field: value})


@pytest.mark.parametrize("temperature", [1e-7, 1e-38, 1e-45, 1e-300])
def test_a_temperature_that_would_leave_float32_is_refused(temperature):
    with pytest.raises(InvalidSampling, match=r"temperature: .* is too small\. Use 0 for the most likely token\."):
        Sampling(temperature=temperature)


@pytest.mark.parametrize("bias", [{"a": 1.0}, {1: "x"}, {1: float("nan")}, [3], {1.5: 1.0}, 3], ids=repr)
def test_an_invalid_bias_is_refused(bias):
    with pytest.raises(InvalidSampling, match="logit_bias"):
        Sampling(logit_bias=bias)


@pytest.mark.parametrize("token", [-1, 61, 10**6])
def test_a_bias_outside_the_vocabulary_is_refused(token):
    with pytest.raises(InvalidSampling, match=rf"logit_bias: {token} is outside the vocabulary of 61"):
        Sampling(logit_bias={token: 1.0}).numbers(61)


def test_samplings_are_compared_and_hashed_by_value():
    one, other = (
        Sampling(logit_bias={3: 1, 5: 2.0}, processors=[doubled]),
        Sampling(logit_bias=((3, 1.0), (5, 2.0)), processors=(doubled,)),
    )
    assert one == other
    assert hash(one) == hash(other)
    assert Sampling(top_p=np.float32(0.5), top_k=np.int64(3)).kind == Sampling(top_p=0.9, top_k=3).kind
    assert Sampling(top_k=3).kind != Sampling(top_k=4).kind
