"""The text of the tiny model: its chapters, its parts and its tokens, from which it comes back."""

import doctest
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

import perparam
from perparam.examples import tiny_text

PRINTED = """\
Ge1:1 In the beginning God created the heaven and the earth.
Ge1:2 And the earth was without form, and void.

Ge2:1 Thus the heavens and the earth were finished.
1Co1:1 Paul, called to be an apostle.
"""


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_text.trained_tokenizer(tiny_text.chapters(PRINTED) * 20, 300)


def test_chapters_have_no_references_and_are_divided_by_empty_lines():
    genesis, second, paul = tiny_text.chapters(PRINTED).split("\n\n")
    assert genesis.splitlines()[1] == "And the earth was without form, and void."
    assert second == "Thus the heavens and the earth were finished."
    assert paul == "Paul, called to be an apostle.\n"


@given(st.lists(st.text("ab \n"), min_size=1, max_size=30).map("\n\n".join))
def test_the_parts_are_contiguous_and_complete(text):
    parts = tiny_text.parts(text, held_out=0.3, validation=0.2)
    assert "".join(parts) == text
    for before in (parts.train, parts.train + parts.validation):
        assert before == text or before.endswith("\n\n")


def test_the_held_out_part_is_the_last_4_percent():
    text = "".join(f"{i:06}ab\n\n" for i in range(1000))
    train, validation, held_out = tiny_text.parts(text)
    assert (len(train), len(validation), len(held_out)) == (9500, 100, 400)


@given(text=st.text(max_size=40) | st.text("ab\n", max_size=20))
def test_every_text_has_tokens_and_comes_back(tokenizer, text):
    if tiny_text.SPECIAL[0] in text:
        return
    ids = tiny_text.encoded(tokenizer, text)
    assert ids.dtype == np.int32
    back = tokenizer.decode(ids.tolist(), skip_special_tokens=False).replace(tiny_text.SPECIAL[0], "\n")
    assert back == text


def test_chapters_end_with_the_token_that_ends_a_text(tokenizer):
    ids = tiny_text.encoded(tokenizer, tiny_text.chapters(PRINTED))
    assert (ids == tiny_text.END).sum() == 2


def test_the_tokenizer_is_one_that_perparam_loads_and_the_chat_continues_text(tokenizer, tmp_path):
    tiny_text.write_tokenizer(tokenizer, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    loaded = perparam.load_tokenizer(tmp_path)
    assert loaded.apply_chat_template([{"role": "user", "content": "In the"}]) == "In the"
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert list(loaded.encode("In the beginning")) == saved.encode("In the beginning").ids


def test_the_examples_of_the_docstrings_hold():
    assert doctest.testmod(tiny_text).failed == 0
