"""Drawn tokens: a row's seed alone decides on them, and penalties and processors see prompt and answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import relative_error
from generating import FLOAT32_ERROR, IDS, MASK, NEW, WARM, whole_passes

from perparam import Sampling, generate
from perparam.generation import prefill
from perparam.models.generation import programs
from perparam.models.generation.keys import row_keys

# Seeds.

SEEDS = [5, 6, 5, 2**31 + 1, 0, 99, 7, 8]
EIGHT = np.random.default_rng(0).integers(0, 59, (8, 12))
EIGHT_MASK = np.array([[0] * (row % 4) + [1] * (12 - row % 4 - row // 4) + [0] * (row // 4) for row in range(8)])


def noise(seed, count, vocabulary=61):
    """The Gumbel noise that a row of that seed is drawn with, (count, vocabulary)."""
    (key,) = row_keys([seed], 1)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count, dtype=jnp.int32))
    return np.asarray(jax.vmap(lambda key: jax.random.gumbel(key, (vocabulary,)))(keys))


@pytest.mark.slow
def test_a_row_is_answered_by_its_seed_whatever_the_batch(model):
    """Alone, without its padding, and beside what full passes and the row's own noise say; where two tokens are nearly
    as good, rounding could decide, but here they never are."""
    together = np.asarray(generate(model, EIGHT, EIGHT_MASK, NEW, eos_token_id=(), sampling=WARM, key=SEEDS))
    logits = whole_passes(model, together, EIGHT, EIGHT_MASK)
    for row, seed in enumerate(SEEDS):
        noisy = logits[row] / 1.3 + noise(seed, NEW)
        best = np.sort(noisy, axis=-1)[:, ::-1]
        assert (best[:, 0] - best[:, 1] > 2 * FLOAT32_ERROR * np.abs(logits[row]).max()).all()
        np.testing.assert_array_equal(together[row], noisy.argmax(axis=-1))
        real = EIGHT_MASK[row] == 1
        alone = generate(model, EIGHT[row : row + 1, real], None, NEW, eos_token_id=(), sampling=WARM, key=[seed])
        np.testing.assert_array_equal(alone[0], together[row])


@pytest.mark.slow
def test_the_logits_of_a_row_are_those_of_the_row_alone(model):
    together = prefill(model, EIGHT, EIGHT_MASK, max_new_tokens=NEW).logits
    for row in range(8):
        real = EIGHT_MASK[row] == 1
        alone = prefill(model, EIGHT[row : row + 1, real], max_new_tokens=NEW).logits
        assert relative_error(together[row], alone[0]) <= FLOAT32_ERROR


@pytest.mark.slow
def test_equal_rows_of_one_seed_differ_and_calls_do_not(model):
    same = np.repeat(EIGHT[:1], 8, axis=0)
    tokens = np.asarray(generate(model, same, None, NEW, eos_token_id=(), sampling=WARM, key=3))
    assert len(np.unique(tokens, axis=0)) == 8
    np.testing.assert_array_equal(generate(model, same, None, NEW, eos_token_id=(), sampling=WARM, key=3), tokens)
    other = np.asarray(generate(model, same, None, NEW, eos_token_id=(), sampling=WARM, key=4))
    assert (other != tokens).any(axis=1).all()
    seeded = np.asarray(generate(model, same, None, NEW, eos_token_id=(), sampling=WARM, key=[3] * 8))
    assert len(np.unique(seeded, axis=0)) == 1


@pytest.mark.slow
def test_several_answers_are_those_of_repeated_prompts(model, endless):
    greedy = generate(model, IDS, MASK, NEW, eos_token_id=(), num_return_sequences=2)
    np.testing.assert_array_equal(greedy, np.repeat(endless, 2, axis=0))
    tokens = np.asarray(
        generate(model, IDS, MASK, NEW, eos_token_id=(), sampling=WARM, key=[1, 2, 3], num_return_sequences=2)
    )
    assert tokens.shape == (6, NEW)
    assert len(np.unique(tokens, axis=0)) == 6
    single = generate(model, IDS, MASK, NEW, eos_token_id=(), sampling=WARM, key=[1, 2, 3])
    np.testing.assert_array_equal(tokens[::2], single)
    one = generate(model, IDS[1:2], MASK[1:2], NEW, eos_token_id=(), sampling=WARM, key=[2], num_return_sequences=2)
    np.testing.assert_array_equal(tokens[2:4], one)


def test_several_answers_share_one_prefill(model, monkeypatch):
    seen, real = [], programs.prefill

    def counted(graphdef, state, ids, *rest):
        seen.append(ids.shape)
        return real(graphdef, state, ids, *rest)

    monkeypatch.setattr(programs, "prefill", counted)
    generate(model, IDS, MASK, NEW, eos_token_id=(), num_return_sequences=2)
    assert seen == [(3, 16)]


# What penalties and processors see.


def only_then(history, logits):
    """Counts on from the last token: 7, 8, 9, …"""
    last = jnp.sum(history.real, axis=1, dtype=jnp.int32) - 1
    order = jnp.cumsum(history.real, axis=1, dtype=jnp.int32) - 1
    newest = jnp.sum(jnp.where(history.real & (order == last[:, None]), history.tokens, 0), axis=1)
    return jnp.where(jnp.arange(logits.shape[1]) == (newest[:, None] + 1) % 61, logits, -jnp.inf)


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_a_processor_sees_the_tokens_of_prompt_and_answer(model, temperature):
    how = Sampling(temperature=temperature, processors=(only_then,))
    found = generate(model, IDS, MASK, NEW, eos_token_id=(), sampling=how)
    last = np.array([5, 2, 54])[:, None]
    np.testing.assert_array_equal(found, (last + 1 + np.arange(NEW)) % 61)


def test_penalties_see_prompt_and_answer(model):
    """No token comes twice, and none of the prompt, where repeating one is made impossible."""
    how = Sampling(temperature=0, frequency_penalty=1e4)
    found = np.asarray(generate(model, IDS, MASK, NEW, eos_token_id=(), sampling=how))
    assert all(len(set(row)) == NEW for row in found)
    positive = Sampling(temperature=0, repetition_penalty=1e6, logit_bias=())
    found = np.asarray(generate(model, IDS, MASK, NEW, eos_token_id=(), sampling=positive))
    for row, ids, mask in zip(found, IDS, MASK, strict=True):
        assert len(set(row)) == NEW
        assert not set(row) & set(ids[mask == 1])


@pytest.mark.slow
def test_penalties_ignore_the_padding_of_the_prompt(model):
    """Penalties leave the ids that stand in padding, and 0, which takes their place, alone."""
    how = Sampling(temperature=0, repetition_penalty=1.5)
    found = generate(model, IDS, MASK, NEW, eos_token_id=(), sampling=how)
    for row in range(3):
        alone = generate(model, IDS[row : row + 1, MASK[row] == 1], None, NEW, eos_token_id=(), sampling=how)
        np.testing.assert_array_equal(found[row : row + 1], alone)


@pytest.mark.slow
def test_penalties_see_all_of_an_extended_prefix(model):
    how = Sampling(temperature=0, repetition_penalty=3.0)
    expected = generate(model, IDS, MASK, NEW, eos_token_id=(), sampling=how)
    extended = prefill(
        model, IDS[:, 4:], MASK[:, 4:], prefix=prefill(model, IDS[:, :4], MASK[:, :4], max_new_tokens=64)
    )
    np.testing.assert_array_equal(generate(model, extended, None, NEW, eos_token_id=(), sampling=how), expected)
