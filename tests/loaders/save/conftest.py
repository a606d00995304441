"""A checkpoint in FP8, one in bf16, and a model of the first."""

import pytest
from checkpoints import fields, tensors, write

from perparam import load_model


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    return write(tmp_path_factory.mktemp("fp8") / "checkpoint", fields(), tensors(fields()))


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    config = fields(quantization_config=None, tie_word_embeddings=True, rope_scaling=None)
    return write(tmp_path_factory.mktemp("bf16") / "checkpoint", config, tensors(config))


@pytest.fixture(scope="module")
def model(fp8):
    return load_model(fp8)
