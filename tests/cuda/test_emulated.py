"""The compiled kernels for Hopper in the emulator: results against float64, in random schedules without any fault."""

import jax.numpy as jnp
import numpy as np
import pytest
from emulator.compiled import emulated, run_in_all_schedules
from hopper_operands import assert_products, columns_products, rows_product, wide_rows
from matmuls import FP8

from perparam import quantize
from perparam.policies.matmul import hopper_quantize

pytestmark = [pytest.mark.cuda, pytest.mark.optimised]


@pytest.fixture(autouse=True)
def in_the_emulator(compiler):
    with emulated(run_in_all_schedules):
        yield


class TestRows:
    @pytest.mark.parametrize(
        ("rows", "out", "features", "processors"),
        [(128, 128, 128, 132), (256, 256, 640, 132), (128, 384, 640, 1), (256, 384, 256, 2)],
        ids=["one step", "a tile per block", "three tiles in a block", "several tiles per block"],
    )
    def test_tiles(self, rows, out, features, processors):
        assert_products([rows_product(rows, out, features, processors=processors)])

    def test_the_last_tile_reaches_beyond_the_rows(self):
        assert_products([rows_product(136, 256, 256, processors=1)])

    @pytest.mark.parametrize("result", ["bfloat16", "float16"])
    def test_results_in_16_bits(self, result):
        assert_products([rows_product(128, 256, 256, result, processors=1)], result)

    def test_blocks_of_several_tiles(self):
        assert_products([rows_product(128, 256, 512, block=(256, 256))])


class TestColumns:
    @pytest.mark.parametrize("rows", [8, 16, 32, 64])
    @pytest.mark.parametrize("x", ["bfloat16", "float16", FP8])
    def test_split_columns(self, x, rows):
        assert_products(columns_products(rows, [128], 512, x))

    @pytest.mark.parametrize("rows", [136, 256])
    @pytest.mark.parametrize("x", ["bfloat16", FP8])
    def test_tiles_of_rows(self, x, rows):
        assert_products(columns_products(rows, [128], 128, x))

    @pytest.mark.parametrize("x", ["bfloat16", "float16"])
    def test_e5m2(self, x):
        assert_products(columns_products(8, [128], 256, x, of="float8_e5m2"))

    @pytest.mark.parametrize(("x", "result"), [("bfloat16", "bfloat16"), ("float16", "float16"), (FP8, "bfloat16")])
    def test_several_kernels_in_a_launch(self, x, result):
        assert_products(columns_products(8, [256, 128, 128], 256, x, result), result)

    def test_more_steps_than_stages(self):
        assert_products(columns_products(8, [128 * 31], 128 * 13, FP8))


@pytest.mark.parametrize(("of", "rows"), [("bfloat16", 64), ("float16", 64), ("float32", 64), ("bfloat16", 72)])
def test_quantisation_is_that_of_the_formats(of, rows):
    x = np.array(wide_rows(rows, 256, of))
    x[3] = 0
    x[7, :128] = 0
    values, scales = hopper_quantize.quantize(jnp.asarray(x))
    expected, expected_scales = quantize(jnp.asarray(x, jnp.float32), FP8, (1, 128))
    np.testing.assert_array_equal(np.asarray(scales).T, expected_scales)
    np.testing.assert_array_equal(np.asarray(values).view(np.uint8), np.asarray(expected).view(np.uint8))
