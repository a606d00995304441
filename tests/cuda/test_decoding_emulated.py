"""The compiled kernels of a decoding step in the emulator, in random schedules without any fault."""

import pytest
from attention_operands import assert_attention, assert_rotation, attention, rotation
from emulator.compiled import emulated, run_in_all_schedules

pytestmark = [pytest.mark.cuda, pytest.mark.optimised]


@pytest.fixture(autouse=True)
def in_the_emulator(compiler):
    with emulated(run_in_all_schedules):
        yield


class TestRotation:
    def test_norms_rotates_and_stores(self):
        assert_rotation(rotation(heads=8, kv=4, d=128))


class TestAttention:
    def test_filled_slots(self):
        assert_attention(attention(d=128))
