"""The compiled kernels for Hopper in the emulator: results against float64, in random schedules without any fault."""

import jax.numpy as jnp
import numpy as np
import pytest
from emulator.compiled import emulated, run_in_all_schedules
from helpers import dtype
from hopper_operands import (
    assert_products,
    columns_products,
    grouped_products,
    rows_product,
    wide_rows,
    widened_product,
)
from matmuls import FP8

from perparam import quantize
from perparam.policies.matmul import grouped_trials, hopper_columns, hopper_costs, hopper_quantize, hopper_rows

pytestmark = [pytest.mark.cuda, pytest.mark.optimised]


@pytest.fixture(autouse=True)
def in_the_emulator(compiler):
    with emulated(run_in_all_schedules):
        yield


class TestRows:
    @pytest.mark.parametrize(
        ("rows", "out", "features", "processors"),
        [(128, 128, 128, 132), (128, 384, 640, 1), (256, 256, 256, 1)],
        ids=["one step", "three tiles in a block", "two tiles of rows"],
    )
    def test_tiles(self, rows, out, features, processors):
        assert_products([rows_product(rows, out, features, processors=processors)])

    @pytest.mark.parametrize(
        ("rows", "out", "features", "processors"),
        [(256, 128, 128, 132), (256, 256, 640, 132), (256, 384, 640, 2), (384, 256, 640, 2), (392, 384, 384, 5)],
        ids=["one step", "a tile per block", "three tiles in a block", "an odd number of tiles", "odd processors"],
    )
    def test_clusters(self, rows, out, features, processors):
        tiles = -(-rows // hopper_rows.TILE), out // hopper_rows.TILE
        assert hopper_rows.cluster_size(tiles, processors) == 2
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

    @pytest.mark.parametrize(("rows", "processors"), [(128, 3), (136, 6)])
    def test_splits_of_several_steps(self, rows, processors):
        assert hopper_costs.splits(-(-rows // 128), 6, 128, processors) == 3
        assert_products(columns_products(rows, [128], 128 * 6, FP8, processors=processors))

    @pytest.mark.parametrize("x", ["bfloat16", "float16"])
    def test_e5m2(self, x):
        assert_products(columns_products(8, [128], 256, x, of="float8_e5m2"))

    @pytest.mark.parametrize("of", [FP8, "float8_e5m2"])
    @pytest.mark.parametrize("x", ["bfloat16", "float16"])
    def test_every_code_is_widened_exactly(self, x, of):
        kernel = np.arange(128 * 128, dtype=np.uint8).reshape(128, 128).view(dtype(of))
        finite = np.isfinite(kernel.astype(np.float32))
        assert_is_kernel(np.where(finite, kernel, 0).astype(dtype(of)), x)

    @pytest.mark.parametrize("x", ["bfloat16", "float16"])
    def test_nan_stays_nan(self, x):
        kernel = np.ones((128, 128), np.uint8)
        kernel[5, 7], kernel[70, 66] = 0x7F, 0xFF
        assert_is_kernel(kernel.view(dtype(FP8)), x)

    @pytest.mark.parametrize(("x", "result"), [("bfloat16", "bfloat16"), ("float16", "float16"), (FP8, "bfloat16")])
    def test_several_kernels_in_a_launch(self, x, result):
        assert_products(columns_products(8, [256, 128, 128], 256, x, result), result)

    def test_several_kernels_in_a_launch_with_tiles_of_rows(self):
        assert_products(columns_products(136, [256, 128], 256, FP8, processors=4))

    def test_more_steps_than_stages(self):
        assert_products(columns_products(8, [128 * 31], 128 * 13, FP8))


class TestWidened:
    @pytest.mark.parametrize(
        ("rows", "out", "features", "processors"),
        [(256, 256, 640, 1), (256, 512, 640, 2), (384, 512, 256, 5)],
        ids=["one block", "one pair", "two pairs"],
    )
    def test_tiles(self, rows, out, features, processors):
        assert_products([widened_product(rows, out, features, processors=processors)])

    @pytest.mark.parametrize("processors", [1, 2])
    def test_the_last_tile_reaches_beyond_the_rows(self, processors):
        assert_products([widened_product(136, 256, 256, processors=processors)])

    @pytest.mark.parametrize(("x", "of"), [("bfloat16", FP8), ("float16", "float8_e5m2")])
    def test_results_in_16_bits_and_blocks_of_several_tiles(self, x, of):
        assert_products([widened_product(136, 256, 256, x, x, of, (256, 256), 1)], x)


class TestGrouped:
    @pytest.mark.parametrize(
        ("height", "x"), [(8, FP8), (16, "bfloat16"), (32, FP8), (64, "bfloat16"), (128, "bfloat16"), (128, FP8)]
    )
    def test_tiles_of_every_height(self, height, x):
        assert_products(grouped_products(grouped_trials.sizes_of(height), [128], 256, x, processors=3))

    @pytest.mark.parametrize("x", ["bfloat16", FP8])
    def test_several_kernels_in_a_launch(self, x):
        products = grouped_products((1, 0, 9, 2), [128, 256], 256, x, "bfloat16", processors=5)
        assert_products(products, "bfloat16")

    def test_more_steps_than_stages(self):
        assert_products(grouped_products((1, 0, 2), [128], 128 * 14, processors=2))

    def test_e5m2_float16_and_blocks_of_several_tiles(self):
        products = grouped_products((3, 0, 2), [256], 256, "float16", "float16", "float8_e5m2", (256, 256), 2)
        assert_products(products, "float16")


def assert_is_kernel(kernel, x: str) -> None:
    """Asserts that the product of an identity with a kernel of (128, 128) is the kernel, and NaN in rows with NaN."""
    identity, scale = jnp.eye(128, dtype=dtype(x)), jnp.ones((1, 1), jnp.float32)
    settings = {"blocks": (kernel.shape,), "result": dtype("float32"), "processors": 132}
    (y,) = hopper_columns.products(identity, None, (jnp.asarray(kernel),), (scale,), **settings)
    expected = kernel.astype(np.float32)
    with_nan = np.isnan(expected).any(axis=1, keepdims=True)
    np.testing.assert_array_equal(np.asarray(y).T, np.where(with_nan, np.nan, expected))


@pytest.mark.parametrize(("of", "rows"), [("bfloat16", 64), ("float16", 64), ("float32", 64), ("bfloat16", 72)])
def test_quantisation_is_that_of_the_formats(of, rows):
    x = np.array(wide_rows(rows, 256, of))
    x[3] = 0
    x[7, :128] = 0
    values, scales = hopper_quantize.quantize(jnp.asarray(x))
    expected, expected_scales = quantize(jnp.asarray(x, jnp.float32), FP8, (1, 128))
    np.testing.assert_array_equal(np.asarray(scales).T, expected_scales)
    np.testing.assert_array_equal(np.asarray(values).view(np.uint8), np.asarray(expected).view(np.uint8))
