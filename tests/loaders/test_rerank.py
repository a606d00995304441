"""`rerank`: the scores of transformers, and what it refuses."""

import functools
import json

import numpy as np
import pytest
from checkpoints import GOLDEN, relative_error

import perparam
from perparam import rerank
from perparam.policies.errors import InvalidText, InvalidTokens, UnsupportedTask

FOLDER = GOLDEN / "tasks" / "reranker_fp8"
ERROR = 1e-5
"""As tests/loaders/test_golden.py derives it."""

SCORES = np.load(FOLDER / "expected.npz")["scores"]
TEXTS, INSTRUCTION, QUERY, LENGTH = json.loads((FOLDER / "texts.json").read_text()).values()


@functools.cache
def loaded():
    return perparam.load_model(FOLDER, perparam.Policy(compute="f32")), perparam.load_tokenizer(FOLDER)


def test_scores_are_those_of_transformers():
    found = rerank(*loaded(), QUERY, TEXTS, max_length=LENGTH)
    assert found.dtype == np.float32
    assert relative_error(found, SCORES) <= ERROR
    assert rerank(*loaded(), QUERY, []).shape == (0,)
    assert rerank.__kwdefaults__["instruction"] == INSTRUCTION


def test_another_instruction_changes_the_scores():
    found = rerank(*loaded(), QUERY, TEXTS, instruction="Find what is hot", max_length=LENGTH)
    assert relative_error(found, SCORES) > 100 * ERROR


def test_what_is_no_text_is_refused():
    with pytest.raises(InvalidText, match="query: expected one text, found int"):
        rerank(*loaded(), 1, TEXTS)
    with pytest.raises(InvalidText, match=r"instruction: expected one text, found list\. Pass a string for all texts"):
        rerank(*loaded(), QUERY, TEXTS, instruction=["a", "b"])
    with pytest.raises(InvalidText, match=r"around a document has [0-9]+ tokens with the query, .* within 9"):
        rerank(*loaded(), QUERY, TEXTS, max_length=9)
    with pytest.raises(InvalidText, match=r"with the query, which leaves no room for a document within 300\. Shorten"):
        rerank(*loaded(), "q " * 300, TEXTS, max_length=300)
    with pytest.raises(UnsupportedTask, match=r"rerank: expected a model and its tokenizer, found str and Tokenizer\."):
        rerank(str(FOLDER), loaded()[1], QUERY, TEXTS)


def test_a_tokenizer_without_the_tokens_of_the_answers_is_refused():
    tokenizer = perparam.load_tokenizer(GOLDEN / "chat")
    with pytest.raises(InvalidTokens, match=r"'yes' and 'no' are tokens\. Use a model such as Qwen/Qwen3-Reranker"):
        rerank(loaded()[0], tokenizer, QUERY, TEXTS)
