"""A small model, and the tokens that it answers the three prompts with."""

import numpy as np
import pytest
from generating import IDS, MASK, NEW, load

from perparam import generate


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def endless(model):
    """The tokens that nothing ends."""
    return np.asarray(generate(model, IDS, MASK, NEW, eos_token_id=()))
