"""Penalties and processors: they see the tokens of the prompt and of the answer, and no padding."""

import jax.numpy as jnp
import numpy as np
import pytest
from generating import IDS, MASK, NEW

from perparam import Sampling, generate
from perparam.generation import prefill


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
def test_penalties_ignore_the_padding_of_the_prompt(model, endless):
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
