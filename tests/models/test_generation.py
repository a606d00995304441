"""Greedy generation: the tokens of repeated full passes, ends of rows, and one program for all calls of a shape."""

import checkpoints
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import fields, tensors, write
from flax import nnx

import perparam
from perparam import Policy, generate
from perparam.models import generation
from perparam.policies.errors import InvalidTokens

NEW, PAD = 7, 60
IDS = np.array([[3, 14, 15, 9, 26, 5], [60, 60, 9, 7, 1, 2], [50, 51, 52, 53, 54, 60]])
MASK = np.array([[1] * 6, [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])


def load(folder, **changes):
    """One layer: programs are compiled here for half a dozen shapes."""
    config = fields(num_hidden_layers=1, **changes)
    return perparam.load_model(write(folder, config, tensors(config, seed=1)), Policy(compute="f32"))


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with checkpoints.quick_compilation():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def endless(model):
    """The tokens that nothing ends."""
    return np.asarray(generate(model, IDS, MASK, NEW, eos_token_id=()))


def ended(tokens, eos, pad=PAD):
    """The rows of `tokens` with `pad` after the first of `eos`."""
    after = np.cumsum(np.isin(tokens, eos), axis=1) - np.isin(tokens, eos) > 0
    return np.where(after, pad, tokens)


# The tokens.


def test_tokens_are_those_of_full_passes_over_single_rows(model, endless):
    """A row left-padded, one right-padded and one whole, each beside itself alone, without a cache."""
    for ids, mask, found in zip(IDS, MASK, endless, strict=True):
        row = list(ids[mask == 1])
        for token in found:
            padded = np.array([row + [0] * (IDS.shape[1] + NEW - len(row))])  # one shape, one compilation
            logits = checkpoints.logits(model, padded, np.arange(padded.shape[1])[None] < len(row))
            assert token == logits[0, len(row) - 1].argmax()
            row.append(token)


def test_the_result_is_the_new_tokens_alone(endless):
    assert endless.shape == (3, NEW)
    assert endless.dtype == np.int32
    assert ((endless >= 0) & (endless < 61)).all()
    assert len(np.unique(endless)) > NEW  # not one token again and again, which mistakes would pass


def test_what_stands_in_the_padding_changes_nothing(model, endless):
    for outside in (0, -1, 10**6):
        ids = np.where(MASK == 1, IDS, outside)
        np.testing.assert_array_equal(generate(model, ids, MASK, NEW, eos_token_id=()), endless)


def test_without_a_mask_all_tokens_are_real(model, endless):
    np.testing.assert_array_equal(generate(model, IDS, None, NEW, ())[0], endless[0])
    assert not np.array_equal(generate(model, IDS, None, NEW, ())[1], endless[1])


def test_lists_and_jax_arrays_are_taken(model, endless):
    np.testing.assert_array_equal(generate(model, IDS.tolist(), MASK.tolist(), NEW, ()), endless)
    np.testing.assert_array_equal(generate(model, jnp.asarray(IDS), jnp.asarray(MASK == 1), NEW, ()), endless)


# Ends of rows.


@pytest.mark.parametrize("index", [0, 3, NEW - 1])
def test_an_eos_ends_its_row_and_pads_it(model, endless, index):
    eos = int(endless[0, index])
    found = generate(model, IDS, MASK, NEW, eos_token_id=eos)
    np.testing.assert_array_equal(found, ended(endless, eos))
    assert found[0, list(endless[0]).index(eos)] == eos


def test_any_of_several_eos_ends_a_row(model, endless):
    eos = [int(endless[0, 2]), int(endless[1, 4])]
    np.testing.assert_array_equal(generate(model, IDS, MASK, NEW, eos), ended(endless, eos))


def test_the_configs_eos_is_the_default(tmp_path, endless):
    eos = int(endless[0, 1])
    np.testing.assert_array_equal(generate(load(tmp_path, eos_token_id=eos), IDS, MASK, NEW), ended(endless, eos))


def test_without_a_pad_id_the_eos_is_repeated(tmp_path, endless):
    eos = int(endless[0, 1])
    model = load(tmp_path, eos_token_id=[eos], pad_token_id=None)
    np.testing.assert_array_equal(generate(model, IDS, MASK, NEW), ended(endless, eos, pad=eos))


def steps(model, eos):
    """How many tokens were fed after the prompt: slots that the cache then holds."""
    graphdef, state = nnx.split(model)
    cache = model.empty_cache(3, IDS.shape[1] + NEW)
    ids, mask, ends = jnp.asarray(IDS, jnp.int32), jnp.asarray(MASK != 0), jnp.asarray(eos, jnp.int32)
    _, cache = generation._generate(graphdef, state, ids, mask, ends, cache, PAD, NEW)
    return int(cache.length) - IDS.shape[1]


def test_it_stops_when_all_rows_have_ended(model, endless):
    firsts = [int(row[1]) for row in endless]
    last = int(np.isin(endless, firsts).argmax(axis=1).max())
    assert steps(model, firsts) == last
    assert last < NEW - 1
    assert steps(model, []) == NEW - 1  # the last token is chosen and not fed


@pytest.mark.parametrize("count", [0, 1])
def test_few_tokens_are_the_first_ones(model, endless, count):
    found = generate(model, IDS, MASK, count, eos_token_id=())
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, endless[:, :count])


# One program.


def test_calls_of_one_shape_share_a_program(model, endless):
    before = generation._generate._cache_size()
    eos = [int(endless[0, 0])]
    np.testing.assert_array_equal(generate(model, IDS[::-1], MASK[::-1], NEW, eos), ended(endless, eos)[::-1])
    once = generation._generate._cache_size()
    assert once <= before + 1
    generate(model, IDS, MASK, NEW, [5])
    generate(perparam.Qwen3.with_policy(model, Policy(compute="f32")), IDS, MASK, NEW, [6])
    assert generation._generate._cache_size() == once


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
        ([[3, 4], [5, 6]], [[1, 1], [0, 0]], "row 1 has no real token, so there is nothing to continue"),
    ],
    ids=["beyond", "negative", "one row", "empty rows", "no rows", "floats", "booleans", "ragged", "mask", "padding"],
)  # fmt: skip
def test_prompts_that_make_no_sense_are_refused(model, ids, mask, match):
    with pytest.raises(InvalidTokens, match=match):
        generate(model, ids, mask, NEW)


@pytest.mark.parametrize("count", [-1, 2.0, "3"])
def test_a_count_that_is_none_is_refused(model, count):
    with pytest.raises(InvalidTokens, match="max_new_tokens: expected"):
        generate(model, IDS, MASK, count)
