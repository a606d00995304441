"""The kernel that norms, rotates and stores, by the interpreter, against its reference."""

import pytest
from attention_operands import assert_rotation, rotation
from interpreter import interpreted, required

pytestmark = required


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu():
    with interpreted():
        yield


def test_norms_rotates_and_stores():
    assert_rotation(rotation())
