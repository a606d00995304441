"""The compiled kernels of a decoding step in the emulator, in random schedules without any fault."""

import pytest
from attention_operands import assert_attention, assert_rotation, attention, rotation
from emulator.compiled import emulated, run_in_all_schedules

from perparam.models.decoding import hopper_attention, hopper_combine

pytestmark = [pytest.mark.cuda, pytest.mark.optimised]


@pytest.fixture(autouse=True)
def in_the_emulator(compiler):
    with emulated(run_in_all_schedules):
        yield


class TestRotation:
    @pytest.mark.parametrize("of", ["bfloat16", "float16"])
    @pytest.mark.parametrize("normed", [True, False])
    def test_norms_rotates_and_stores(self, of, normed):
        assert_rotation(rotation(heads=8, kv=4, d=128, of=of, normed=normed))

    @pytest.mark.parametrize("parts", [1, 3])
    def test_sums_of_parts(self, parts):
        assert_rotation(rotation(batch=3, parts=parts))

    @pytest.mark.parametrize(("heads", "kv", "d"), [(6, 2, 64), (6, 2, 128), (16, 8, 64)])
    def test_heads_of_a_warpgroup_are_of_one_kind(self, heads, kv, d):
        assert_rotation(rotation(heads=heads, kv=kv, d=d))

    @pytest.mark.parametrize("start", [0, 15, 16])
    def test_slots_beyond_the_cache_are_clipped_as_xla_does(self, start):
        assert_rotation(rotation(start=start))


class TestAttention:
    @pytest.mark.parametrize("length", [1, 64, 130, 192])
    @pytest.mark.parametrize("d", [64, 128])
    def test_filled_slots(self, length, d):
        assert_attention(attention(length=length, d=d))

    @pytest.mark.parametrize("of", ["bfloat16", "float16"])
    @pytest.mark.parametrize("d", [64, 128])
    def test_quantised(self, of, d):
        assert_attention(attention(batch=3, d=d, of=of), narrow=True)

    def test_many_rows(self):
        assert_attention(attention(batch=9, length=20, slots=64), narrow=True, rows=32)

    @pytest.mark.parametrize("left", [1, 70, 129])
    def test_padding_at_the_left(self, left):
        assert_attention(attention(batch=3, left=left))

    @pytest.mark.parametrize("window", [1, 40, 100])
    def test_windows(self, window):
        assert_attention(attention(batch=2, left=5), window=window)

    @pytest.mark.parametrize(("heads", "kv"), [(2, 2), (16, 2), (6, 2)])
    def test_query_heads_of_a_key_head(self, heads, kv):
        assert_attention(attention(heads=heads, kv=kv))

    @pytest.mark.parametrize("length", [64, 300, 320])
    def test_more_tiles_than_stages_and_more_parts_than_are_read_together(self, monkeypatch, length):
        monkeypatch.setattr(hopper_combine, "TOGETHER", 2)
        for parts in (1, 2, 5):
            monkeypatch.setattr(hopper_attention, "splits", lambda *_, parts=parts: parts)
            assert_attention(attention(slots=320, length=length, d=128))
