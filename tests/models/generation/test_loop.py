"""`generate` and `decode`: the tokens and log-probabilities of full passes, the ends of rows, parts, refusals."""

import math

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generating import FLOAT32_ERROR, IDS, MASK, NEW, PAD, WARM, ended, load, whole_passes

from perparam import Sampling, generate
from perparam.generation import GenerationConfig
from perparam.models import decode, generate_with_logprobs
from perparam.policies.errors import InvalidSampling, InvalidTokens


def test_tokens_are_those_of_full_passes_over_single_rows(model, endless):
    """A row left-padded, one right-padded and one whole, each beside itself alone, without a cache."""
    for ids, mask, found in zip(IDS, MASK, endless, strict=True):
        row = list(ids[mask == 1])
        for token in found:
            padded = np.array([row + [0] * (IDS.shape[1] + NEW - len(row))])  # one shape, one compilation
            logits = checkpoints.logits(model, padded, np.arange(padded.shape[1])[None] < len(row))
            assert token == logits[0, len(row) - 1].argmax()
            row.append(token)


def test_generate_returns_the_new_tokens_alone(endless):
    assert endless.shape == (3, NEW)
    assert endless.dtype == np.int32
    assert ((endless >= 0) & (endless < 61)).all()
    assert len(np.unique(endless)) > NEW  # not one token again and again, which mistakes would pass


def test_ids_in_the_padding_change_nothing(model, endless):
    for outside in (0, -1, 10**6):
        ids = np.where(MASK == 1, IDS, outside)
        np.testing.assert_array_equal(generate(model, ids, MASK, NEW, eos_token_id=()), endless)


def test_without_a_mask_all_tokens_are_real(model, endless):
    np.testing.assert_array_equal(generate(model, IDS, None, NEW, eos_token_id=())[0], endless[0])
    assert not np.array_equal(generate(model, IDS, None, NEW, eos_token_id=())[1], endless[1])


def test_lists_and_jax_arrays_are_taken(model, endless):
    np.testing.assert_array_equal(generate(model, IDS.tolist(), MASK.tolist(), NEW, eos_token_id=()), endless)
    np.testing.assert_array_equal(
        generate(model, jnp.asarray(IDS), jnp.asarray(MASK == 1), NEW, eos_token_id=()), endless
    )


# Ends of rows.


@pytest.mark.parametrize("index", [0, pytest.param(3, marks=pytest.mark.slow), NEW - 1])
def test_an_eos_ends_its_row_and_pads_it(model, endless, index):
    eos = int(endless[0, index])
    found = generate(model, IDS, MASK, NEW, eos_token_id=eos)
    np.testing.assert_array_equal(found, ended(endless, eos))
    assert found[0, list(endless[0]).index(eos)] == eos


def test_any_of_several_eos_ends_a_row(model, endless):
    eos = [int(endless[0, 2]), int(endless[1, 4]), int(endless[2, 5])]
    np.testing.assert_array_equal(generate(model, IDS, MASK, NEW, eos_token_id=eos), ended(endless, eos))


@pytest.mark.slow
def test_the_configs_eos_is_the_default(tmp_path, endless):
    eos = int(endless[0, 1])
    np.testing.assert_array_equal(generate(load(tmp_path, eos_token_id=eos), IDS, MASK, NEW), ended(endless, eos))


def test_the_configs_eos_is_repeated_where_it_names_no_pad_id(tmp_path, endless):
    eos = int(endless[0, 1])
    model = load(tmp_path, eos_token_id=[eos], pad_token_id=None)
    np.testing.assert_array_equal(generate(model, IDS, MASK, NEW), ended(endless, eos, pad=eos))


def test_decoding_stops_when_all_rows_have_ended(model, endless):
    def drawn(eos):
        """How many tokens were drawn for the longest row."""
        (part,) = decode(model, IDS, MASK, GenerationConfig(NEW, eos_token_id=eos), chunk=NEW)
        return part.tokens.shape[1]

    firsts = [int(row[1]) for row in endless]
    last = int(np.isin(endless, firsts).argmax(axis=1).max())
    assert drawn(firsts) == last + 1 < NEW
    assert drawn(()) == NEW


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_new_tokens_are_the_first_of_more(model, endless, count):
    found = generate(model, IDS, MASK, count, eos_token_id=())
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, endless[:, :count])


# What answers say of themselves.


def test_an_answer_says_where_each_row_ended(model, endless):
    eos = int(endless[0, 2])
    answer = generate_with_logprobs(model, IDS, MASK, GenerationConfig(NEW, eos_token_id=eos, logprobs=None))
    np.testing.assert_array_equal(answer.tokens, ended(endless, eos))
    ends = np.isin(endless, eos)
    lengths = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, NEW)
    np.testing.assert_array_equal(answer.lengths, lengths)
    np.testing.assert_array_equal(answer.ended, ends.any(axis=1))
    assert answer.ended[0]
    assert answer.logprobs.shape == answer.tokens.shape  # None in the settings means 0


def test_an_answer_that_ends_with_its_last_token_has_ended(model, endless):
    eos = int(endless[0, -1])
    assert eos not in endless[0, :-1]
    answer = generate_with_logprobs(model, IDS, MASK, GenerationConfig(NEW, eos_token_id=eos, logprobs=None))
    assert (answer.lengths[0], answer.ended[0]) == (NEW, True)


# Log-probabilities.


def log_shares(logits):
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(Sampling(temperature=0), id="greedy"),
        pytest.param(Sampling(temperature=2.5, top_p=0.9), marks=pytest.mark.slow, id="hot"),
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


# In parts.


@pytest.mark.parametrize(
    "sampling",
    [pytest.param(Sampling(temperature=0), marks=pytest.mark.slow), WARM],
    ids=["greedy", "drawn"],
)
def test_parts_are_together_what_generate_returns(model, sampling):
    whole = generate_with_logprobs(
        model, IDS, MASK, GenerationConfig(NEW, eos_token_id=(), sampling=sampling, key=2, logprobs=0)
    )
    for chunk in (1, 2, NEW - 1, NEW, 100):
        parts = list(
            decode(
                model,
                IDS,
                MASK,
                GenerationConfig(NEW, eos_token_id=(), sampling=sampling, key=2, logprobs=0),
                chunk=chunk,
            )
        )
        sizes = (
            [NEW] if chunk >= NEW else [1, *[chunk] * ((NEW - 1) // chunk), *[(NEW - 1) % chunk] * (NEW % chunk != 1)]
        )
        assert [part.tokens.shape[1] for part in parts] == [size for size in sizes if size]
        np.testing.assert_array_equal(np.concatenate([part.tokens for part in parts], axis=1), whole.tokens)
        np.testing.assert_array_equal(np.concatenate([part.logprobs for part in parts], axis=1), whole.logprobs)
        np.testing.assert_array_equal(sum(part.lengths for part in parts), whole.lengths)
        np.testing.assert_array_equal(parts[-1].ended, whole.ended)


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_parts_say_where_rows_end(model, endless, chunk):
    firsts = [int(row[1]) for row in endless]
    ends = np.isin(endless, firsts)
    last = int(ends.argmax(axis=1).max())
    parts = list(decode(model, IDS, MASK, GenerationConfig(NEW, eos_token_id=firsts), chunk=chunk))
    tokens = np.concatenate([part.tokens for part in parts], axis=1)
    np.testing.assert_array_equal(tokens, ended(endless, firsts)[:, : last + 1])
    np.testing.assert_array_equal(sum(part.lengths for part in parts), ends.argmax(axis=1) + 1)
    given = 0
    for part in parts:
        given += part.tokens.shape[1]
        np.testing.assert_array_equal(part.ended, ends[:, :given].any(axis=1))


def test_rows_can_be_ended_from_outside(model, endless):
    parts = decode(model, IDS, MASK, GenerationConfig(NEW, eos_token_id=()), chunk=2)
    np.testing.assert_array_equal(next(parts).tokens, endless[:, :1])
    part = parts.send(np.array([False, True, False]))
    np.testing.assert_array_equal(part.tokens[[0, 2]], endless[[0, 2], 1:3])
    np.testing.assert_array_equal(part.tokens[1], [PAD, PAD])
    np.testing.assert_array_equal(part.lengths, [2, 0, 2])
    np.testing.assert_array_equal(part.ended, [False, True, False])
    np.testing.assert_array_equal(next(parts).tokens[[0, 2]], endless[[0, 2], 3:5])
    with pytest.raises(StopIteration):
        parts.send([True, False, True])


def test_decoding_no_tokens_yields_no_parts(model):
    assert list(decode(model, IDS, MASK, GenerationConfig(0))) == []


# What is refused.


@pytest.mark.parametrize(
    ("ids", "mask", "match"),
    [
        ([[3, 61]], None, r"input_ids\[0, 1\] is 61, outside the vocabulary of 61\. Use the tokenizer"),
        ([[3, 4], [5, -1]], None, r"input_ids\[1, 1\] is -1, outside the vocabulary of 61"),
        ([3, 4], None, r"expected integers of shape \(batch, length\), found int64 \(2,\)"),
        ([[]], None, r"expected integers of shape \(batch, length\), found \w+ \(1, 0\)"),
        (np.zeros((0, 3), int), None, r"found int32 \(0, 3\)"),
        ([[3.0, 4.0]], None, "found float64"),
        ([[True, False]], None, "found bool"),
        ([[3, 4], [5]], None, "input_ids"),
        ([[3, 4]], [[1]], r"attention_mask: expected the shape of input_ids, \(1, 2\), found \(1, 1\)"),
        ([[3, 4]], [["a", "b"]], "attention_mask: expected booleans or integers, nonzero for real tokens, found str32"),
        ([[3, 4]], [[1, None]], "attention_mask: expected booleans or integers, nonzero for real tokens, found object"),
        ([[3, 4]], [[1.0, math.nan]], "attention_mask: expected 1 for real tokens and 0 for others, found nan"),
        ([[3, 4]], [[0.0, -1e9]], r"attention_mask: expected 1 .* found -1000000000\.0\. Pass booleans or integers"),
        ([[3, 4]], jax.random.split(jax.random.key(0)), "attention_mask: expected an array of numbers"),
        ([[3, 4], [5, 6]], [[1, 1], [0, 0]], "row 1 has no real token, so there is nothing to continue"),
    ],
    ids=["beyond", "negative", "one row", "empty rows", "no rows", "floats", "booleans", "ragged", "mask",
         "mask of text", "mask of objects", "mask with NaN", "mask to be added", "mask of keys", "padding"],
)  # fmt: skip
def test_prompts_that_make_no_sense_are_refused(model, ids, mask, match):
    with pytest.raises(InvalidTokens, match=match):
        generate(model, ids, mask, NEW)


@pytest.mark.parametrize("count", [-1, 2.0, "3"])
def test_an_invalid_count_of_new_tokens_is_refused(model, count):
    with pytest.raises(InvalidTokens, match="max_new_tokens: expected"):
        generate(model, IDS, MASK, count)


@pytest.mark.parametrize("value", [0, -1, 1.0, "2", None], ids=repr)
def test_numbers_of_answers_and_chunks_that_are_not_positive_are_refused(model, value):
    with pytest.raises(InvalidTokens, match="num_return_sequences: expected an integer of 1 or more, found"):
        GenerationConfig(NEW, num_return_sequences=value)
    with pytest.raises(InvalidTokens, match="chunk: expected an integer of 1 or more, found"):
        decode(model, IDS, MASK, chunk=value)


@pytest.mark.parametrize("value", [-1, 62, 1.0, "2"], ids=repr)
def test_an_invalid_count_of_top_log_probabilities_is_refused(model, value):
    with pytest.raises(InvalidTokens, match="logprobs: expected"):
        generate_with_logprobs(model, IDS, MASK, GenerationConfig(NEW, logprobs=value))


@pytest.mark.parametrize("eos", [-1, 2.5, "a", [[1]], 2**31], ids=repr)
def test_an_invalid_eos_token_id_is_refused(model, eos):
    with pytest.raises(InvalidTokens, match="eos_token_id: expected a token id or several, found"):
        decode(model, IDS, MASK, GenerationConfig(NEW, eos_token_id=eos))


def test_a_bias_outside_the_vocabulary_is_refused(model):
    with pytest.raises(InvalidSampling, match="logit_bias: 61 is outside the vocabulary of 61"):
        generate(model, IDS, MASK, NEW, sampling=Sampling(logit_bias={61: 1.0}))
