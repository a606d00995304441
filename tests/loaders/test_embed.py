"""`embed`: the embeddings of transformers, whatever the batch; and what it refuses."""

import functools
import json

import numpy as np
import pytest
from checkpoints import GOLDEN, relative_error
from hypothesis import given
from hypothesis import strategies as st

import perparam
from perparam import embed
from perparam.loaders.batches import in_batches
from perparam.policies.errors import InvalidText, InvalidTokens, UnsupportedTask

FOLDER = GOLDEN / "tasks" / "embedding_fp8"
ERROR = 1e-5
"""As tests/loaders/test_golden.py derives it."""

EXPECTED = dict(np.load(FOLDER / "expected.npz"))
TEXTS, INSTRUCTION, _, LENGTH = json.loads((FOLDER / "texts.json").read_text()).values()


@functools.cache
def loaded(folder=FOLDER):
    return perparam.load_model(folder, perparam.Policy(compute="f32")), perparam.load_tokenizer(folder)


def test_embeddings_are_those_of_transformers():
    found = embed(*loaded(), TEXTS, max_length=LENGTH)
    assert found.dtype == np.float32
    assert relative_error(found, EXPECTED["documents"]) <= ERROR


def test_a_text_has_the_same_embedding_in_any_batch():
    short = [2, 4, 1, 2]
    found = embed(*loaded(), [TEXTS[i] for i in short], batch_tokens=32)  # two batches of two texts
    assert relative_error(found, EXPECTED["documents"][short]) <= ERROR


def test_an_instruction_comes_before_each_text():
    found = embed(*loaded(), TEXTS, instruction=INSTRUCTION, max_length=LENGTH)
    assert relative_error(found, EXPECTED["queries"]) <= ERROR


def test_fewer_dimensions_are_the_first_ones_with_a_norm_of_one():
    found = embed(*loaded(), TEXTS, dimensions=16, max_length=LENGTH)
    assert relative_error(found, EXPECTED["documents_of_16"]) <= ERROR


def test_no_texts_have_no_embeddings():
    assert embed(*loaded(), []).shape == (0, 48)
    assert embed(*loaded(), iter(()), dimensions=3).shape == (0, 3)


def test_a_text_is_cut_off_before_the_token_that_the_tokenizer_adds():
    _, tokenizer = loaded()
    ids, end = tokenizer.encode(TEXTS[3]), tokenizer.token_id("<|endoftext|>")
    assert ids[-1] == end
    assert tokenizer.encode(TEXTS[3], max_length=5) == [*ids[:4], end]
    assert tokenizer.encode(TEXTS[3], max_length=5, add_special_tokens=False) == ids[:5]
    assert tokenizer.encode(TEXTS[3], max_length=len(ids)) == tokenizer.encode(TEXTS[3], max_length=999) == ids
    llama = perparam.load_tokenizer(GOLDEN / "llama" / "llama2")
    assert llama.encode("hello there", max_length=3) == llama.encode("hello there")[:3]


@pytest.mark.parametrize(
    ("texts", "options", "error", "text"),
    [
        (None, {}, InvalidText, "texts: expected texts, found NoneType"),
        (["a", b"b"], {}, InvalidText, "texts: expected texts, found bytes. Pass a list of strings"),
        (["a"], {"instruction": ["b"]}, InvalidText, "instruction: expected one text, found list"),
        (["a"], {"dimensions": 49}, InvalidTokens, "dimensions: expected an integer from 1 to 48, found 49"),
        (["a"], {"dimensions": 0}, InvalidTokens, "dimensions: expected an integer of 1 or more, found 0"),
        (["a"], {"max_length": 0}, InvalidTokens, "max_length"),
        (["a"], {"batch_tokens": 0.5}, InvalidTokens, "batch_tokens"),
    ],
)
def test_what_is_no_text_and_no_number_is_refused(texts, options, error, text):
    with pytest.raises(error, match=text):
        embed(*loaded(), texts, **options)


def test_folders_in_place_of_a_model_and_a_tokenizer_are_refused():
    model, tokenizer = loaded()
    for pair in (("folder", tokenizer), (model, "folder"), (model, None)):
        with pytest.raises(UnsupportedTask, match=r"Pass load_model\(path\) and load_tokenizer\(path\)"):
            embed(*pair, TEXTS)


def test_an_empty_text_needs_a_token_that_the_tokenizer_adds():
    with pytest.raises(InvalidText, match="text 1 is empty, and the tokenizer adds no token to it"):
        embed(*loaded(GOLDEN / "tasks" / "reranker_fp8"), ["a", ""])


def test_a_tokenizer_of_a_larger_model_is_refused():
    with pytest.raises(InvalidTokens, match=r"outside the vocabulary of 61\. Use the tokenizer that belongs"):
        embed(perparam.load_model(GOLDEN / "tasks" / "qwen2_model"), loaded()[1], ["the city"])


@given(lengths=st.lists(st.integers(1, 500), max_size=60), batch_tokens=st.integers(1, 2000))
def test_batches_have_each_row_once_within_the_bound_and_few_shapes(lengths, batch_tokens):
    batches = list(in_batches(lengths, batch_tokens))
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(lengths)))
    for batch in batches:
        height, width = batch.shape
        assert len(batch.rows) <= height < 2 * len(batch.rows)
        assert max(lengths[row] for row in batch.rows) <= width
        assert height == 1 or height * width <= batch_tokens
    widths = {batch.shape[1] for batch in batches}
    assert len({batch.shape for batch in batches}) <= len(widths) + 1  # the last batch may have fewer rows
