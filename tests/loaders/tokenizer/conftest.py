"""Fixtures of the tokenizer tests."""

import pytest
from small_tokenizer import write_tokenizer


@pytest.fixture
def folder(tmp_path):
    """A folder with a small tokenizer in the layout of Qwen3."""
    write_tokenizer(tmp_path)
    return tmp_path
