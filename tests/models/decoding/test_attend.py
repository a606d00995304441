"""The kernels of attention over the filled slots, by the interpreter, against their reference."""

import pytest
from attention_operands import assert_attention, attention
from interpreter import interpreted, required

pytestmark = required


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu():
    with interpreted():
        yield


def test_filled_slots():
    assert_attention(attention())
