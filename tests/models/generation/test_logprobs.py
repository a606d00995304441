"""`generate_with_logprobs`: the log-probabilities of full passes, before sampling changes the logits."""

import numpy as np
import pytest
from generating import FLOAT32_ERROR, IDS, MASK, NEW, whole_passes

from perparam import Sampling
from perparam.generation import GenerationConfig
from perparam.models import generate_with_logprobs


def log_shares(logits):
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(Sampling(temperature=0), marks=pytest.mark.slow, id="greedy"),
        pytest.param(Sampling(temperature=2.5, top_p=0.9), id="hot"),
        pytest.param(Sampling(repetition_penalty=1.5, logit_bias={3: 5}), marks=pytest.mark.slow, id="penalties"),
    ],
)
def test_log_probabilities_are_those_of_full_passes_before_any_processing(model, sampling):
    answer = generate_with_logprobs(
        model, IDS, MASK, GenerationConfig(NEW, eos_token_id=(), sampling=sampling, key=4, logprobs=3)
    )
    expected = log_shares(whole_passes(model, answer.tokens))
    of_tokens = np.take_along_axis(expected, answer.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(answer.logprobs, of_tokens, rtol=0, atol=FLOAT32_ERROR * 10)
    assert answer.top_tokens.shape == answer.top_logprobs.shape == (3, NEW, 3)
    best = np.sort(expected, axis=-1)[..., ::-1][..., :3]
    np.testing.assert_allclose(answer.top_logprobs, best, rtol=0, atol=FLOAT32_ERROR * 10)
    assert (np.diff(best) < -FLOAT32_ERROR * 20).all()  # so that the order of tokens is certain
    np.testing.assert_array_equal(answer.top_tokens, np.argsort(-expected, axis=-1)[..., :3])
    assert answer.logprobs.dtype == answer.top_logprobs.dtype == np.float32
    assert answer.top_tokens.dtype == np.int32


@pytest.mark.slow
def test_logprobs_0_gives_the_log_probabilities_of_the_tokens_alone(model, endless):
    answer = generate_with_logprobs(model, IDS, MASK, GenerationConfig(NEW, eos_token_id=(), logprobs=0))
    np.testing.assert_array_equal(answer.tokens, endless)
    assert answer.logprobs.shape == (3, NEW)
    assert answer.top_tokens.shape == (3, NEW, 0)


def test_log_probabilities_are_zero_after_the_end_of_a_row(model, endless):
    answer = generate_with_logprobs(
        model, IDS, MASK, GenerationConfig(NEW, eos_token_id=[int(endless[0, 1])] * 3, logprobs=0)
    )
    after = np.arange(NEW) >= answer.lengths[:, None]
    assert after[0].sum() == NEW - 2
    assert not after.all(axis=0).any()  # another row goes on
    assert (answer.logprobs[after] == 0).all()
    assert (answer.logprobs[~after] < 0).all()


@pytest.mark.parametrize("logprobs", [0, 2])
def test_log_probabilities_of_no_tokens_are_empty(model, logprobs):
    answer = generate_with_logprobs(model, IDS, MASK, GenerationConfig(0, num_return_sequences=2, logprobs=logprobs))
    assert answer.tokens.shape == (6, 0)
    assert answer.logprobs.shape == (6, 0)
    assert answer.top_tokens.shape == answer.top_logprobs.shape == (6, 0, logprobs)
    np.testing.assert_array_equal(answer.lengths, [0] * 6)
    assert not answer.ended.any()
