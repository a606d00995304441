"""The kernels for Hopper, by the interpreter: tiles, grids, splits and result dtypes against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bits, dtype
from hopper_operands import (
    assert_products,
    columns_products,
    grouped_operands,
    grouped_products,
    kernel_of,
    rows_product,
    wide_rows,
    widened_product,
)
from interpreter import assert_no_races, interpreted, required
from matmuls import FP8, assert_product, widened

from perparam import quantize
from perparam.policies.matmul import (
    grouped_trials,
    hopper_columns,
    hopper_grouped_kernel,
    hopper_quantize,
    hopper_rows,
    hopper_widened,
)
from perparam.policies.matmul.hopper_grouped_tiles import RowTiles
from perparam.policies.scales import amax_rule

pytestmark = required

QUOTIENT_ERROR = 2.0**-23
"""A float32 quotient an ulp off: XLA on a CPU multiplies with the reciprocal of what is constant along a loop."""

PROCESSORS = 132
"""Streaming multiprocessors of H100 and H200."""


def slow(*values):
    """Parameters that are left out of the quick run."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture(scope="module")
def launches():
    with interpreted() as launches:
        yield launches


@pytest.fixture(autouse=True)
def without_races(launches):
    yield
    assert_no_races(launches)


class TestRows:
    """Tiles of 128 rows of x by 128 of the kernel; at least two of them, since JAX 0.10 crashes on a CPU with one."""

    def check(self, rows, out, features, result="float32", **settings):
        assert_products([rows_product(rows, out, features, result, **settings)], result)

    @pytest.mark.parametrize("processors", [132, *slow(1, 4)])
    def test_tiles_are_shared_out_among_however_many_processors(self, processors):
        self.check(200, 384, 128, processors=processors)

    # The last tile of rows, and one of its warpgroups, has no row at all or only some.
    @pytest.mark.slow
    @pytest.mark.parametrize("rows", [136, 192, 248])
    def test_rows_that_are_no_multiple_of_a_tile(self, rows):
        self.check(rows, 128, 256)

    # Two blocks share the tiles of the kernel, of which one has tiles of rows beyond the last one.
    @pytest.mark.slow
    @pytest.mark.parametrize(("rows", "processors"), [(264, 2), (384, 5)])
    def test_an_odd_number_of_tiles_of_rows(self, rows, processors):
        assert hopper_rows.cluster_size((3, 2), processors) == 2
        self.check(rows, 256, 256, processors=processors)

    @pytest.mark.slow
    def test_the_snake_is_narrower_for_kernels_that_it_does_not_divide(self):
        self.check(256, (hopper_rows.SNAKE + 4) * 128, 128, processors=2)

    @pytest.mark.parametrize("steps", [hopper_rows.STAGES + 2, *slow(1, hopper_rows.STAGES)])
    def test_fewer_and_more_steps_than_stages(self, steps):
        self.check(128, 256, steps * 128, processors=1)

    @pytest.mark.parametrize("result", ["bfloat16", *slow("float16")])
    def test_results_in_16_bits(self, result):
        self.check(128, 256, 256, result)

    @pytest.mark.slow
    @pytest.mark.parametrize("block", [(256, 256), *slow((256, 128), (128, 256), (512, 512))])
    def test_blocks_of_several_tiles(self, block):
        self.check(128, 512, 512, block=block)


REST = [(1, True), (132, False), (8, False), (8, True)]
"""Splits of columns that are left out: whether they are split, and what x is, meet nowhere but in the launch."""


class TestColumns:
    """The kernels by tiles of x, their columns split among blocks of the grid."""

    def check(self, rows, outs, features, x="bfloat16", result="float32", **settings):
        products = columns_products(rows, outs, features, x, result, **settings)
        assert len(products) == len(outs)
        assert_products(products, result)

    @pytest.mark.parametrize("rows", [16, 200, *slow(8, 64, 128, 256)])
    def test_one_and_several_tiles_of_rows(self, rows):
        self.check(rows, [128], 256)

    # Rows beyond the last one must not reach the partial sums of the next split.
    @pytest.mark.slow
    @pytest.mark.parametrize(("rows", "narrow"), [(136, False), (200, True)])
    def test_rows_that_are_no_multiple_of_a_tile(self, monkeypatch, rows, narrow):
        monkeypatch.setattr(hopper_columns, "splits", lambda *_: 2)
        self.check(rows, [128], 256, FP8 if narrow else "bfloat16")

    @pytest.mark.parametrize("rows", [256, *slow(8, 64, 128)])
    def test_w8a8(self, rows):
        self.check(rows, [256], 256, FP8)

    # A bfloat16 result of e4m3 is what test_columns_whole_and_split has.
    @pytest.mark.parametrize("of", ["float8_e5m2", *slow(FP8)])
    @pytest.mark.parametrize("x", ["float16", *slow("bfloat16")])
    def test_w8a16_has_the_dtype_of_x(self, x, of):
        self.check(8, [128], 256, x, x, of=of)

    @pytest.mark.slow
    @pytest.mark.parametrize("outs", [(384, 128, 128), *slow((128, 256))])
    @pytest.mark.parametrize("narrow", [True, *slow(False)])
    def test_several_kernels_in_one_launch(self, outs, narrow):
        self.check(8, outs, 128, FP8 if narrow else "bfloat16")

    @pytest.mark.parametrize(
        ("processors", "narrow"),
        [(132, True), *(pytest.param(*both, marks=pytest.mark.slow) for both in ((1, False), *REST))],
    )
    def test_columns_whole_and_split(self, processors, narrow):
        assert hopper_columns.splits(2, 4, 8, processors) == {1: 1, 8: 4, 132: 4}[processors]
        self.check(8, [256], 512, FP8 if narrow else "bfloat16", "bfloat16", processors=processors)

    @pytest.mark.slow
    def test_several_kernels_and_tiles_of_rows_split_into_several_steps(self, monkeypatch):
        monkeypatch.setattr(hopper_columns, "splits", lambda *_: 2)
        self.check(200, [128, 128], 512, FP8, "bfloat16")

    @pytest.mark.slow
    def test_more_steps_than_stages(self, monkeypatch):
        monkeypatch.setattr(hopper_columns, "splits", lambda *_: 1)
        self.check(8, [128], 14 * 128)

    @pytest.mark.slow
    @pytest.mark.parametrize("block", [(256, 256), *slow((256, 128), (128, 256), (512, 512))])
    def test_blocks_of_several_tiles(self, block):
        self.check(8, [256], 512, block=block)

    @pytest.mark.slow
    def test_kernels_with_different_blocks(self):
        x = wide_rows(8, 256, "bfloat16")
        pairs = [kernel_of(256, 256, (256, 256)), kernel_of(128, 256, (128, 128))]
        kernels, scales, blocks = zip(*pairs, strict=True)
        results = hopper_columns.products(
            x, None, kernels, scales, blocks=blocks, result=dtype("float32"), processors=PROCESSORS
        )
        for y, pair in zip(results, pairs, strict=True):
            assert_product(y, np.asarray(x).astype(np.float64), widened(*pair))


@pytest.mark.slow
class TestWidened:
    """Tiles of x that pairs of blocks share; the pairs, of which each block has one tile of the kernel."""

    def test_tiles_are_shared_out_among_pairs_and_the_last_reaches_beyond_the_rows(self):
        assert_products([widened_product(264, 512, 128, processors=4)])

    def test_more_steps_than_stages_and_several_tiles_per_pair(self):
        steps = max(hopper_widened.STAGES.values()) + 1
        assert_products([widened_product(256, 256, steps * 128, result="bfloat16", processors=2)], "bfloat16")

    def test_float16_e5m2_and_blocks_of_several_tiles(self):
        product = widened_product(136, 512, 256, "float16", "float16", "float8_e5m2", (256, 256), processors=5)
        assert_products([product], "float16")


class TestGrouped:
    """Tiles of rows of several groups, each by the kernel of its group."""

    RAGGED = (1, 0, 13, 2, 0, 8)

    @pytest.mark.slow
    @pytest.mark.parametrize("x", [FP8, "bfloat16"])
    def test_tiles_of_several_groups(self, x):
        assert_products(grouped_products(self.RAGGED, [256], 256, x, processors=3))

    @pytest.mark.slow
    @pytest.mark.parametrize("x", ["bfloat16", *slow(FP8)])
    def test_several_kernels_in_one_launch(self, x):
        assert_products(grouped_products(self.RAGGED, [128, 256], 128, x, "bfloat16", processors=5), "bfloat16")

    @pytest.mark.slow
    @pytest.mark.thorough
    @pytest.mark.parametrize("x", ["bfloat16", FP8])
    @pytest.mark.parametrize("height", [16, 32, 64, 128])
    def test_tiles_of_every_height(self, x, height):
        assert_products(grouped_products(grouped_trials.sizes_of(height), [128], 256, x, processors=4))

    @pytest.mark.slow
    def test_more_steps_than_stages(self):
        assert_products(grouped_products((1, 0, 2), [128], 128 * 14, processors=2))

    @pytest.mark.slow
    def test_e5m2_float16_and_blocks_of_several_tiles(self):
        products = grouped_products((3, 0, 2), [256], 256, "float16", "float16", "float8_e5m2", (256, 256), 2)
        assert_products(products, "float16")

    @pytest.mark.slow
    def test_no_group_has_rows(self):
        _, x, x_scales, kernels, scales, blocks, _ = grouped_operands((0, 0, 8), [128], 128)
        tiles = RowTiles.of(8, jnp.zeros(3, jnp.int32))
        options = {"blocks": blocks, "result": dtype("float32"), "processors": 3}
        y = hopper_grouped_kernel.products(x, x_scales, tiles, kernels, scales, **options)
        assert np.isnan(y).all()  # nothing is written


class TestQuantize:
    """Activations to e4m3, against `quantize` in blocks of (1, 128)."""

    @pytest.mark.parametrize("of", ["bfloat16", "float32", *slow("float16")])
    def test_is_quantize_up_to_the_quotient_s_last_bit(self, of):
        x = wide_rows(136, 256, of).at[3].set(0).at[70, :128].set(0)
        values, scales = hopper_quantize.quantize(x)
        want, want_scales = quantize(x, FP8, (1, 128))
        np.testing.assert_allclose(scales.T, want_scales, rtol=QUOTIENT_ERROR, atol=0)
        assert (np.asarray(scales.T)[3] == 1).all()
        assert np.asarray(scales.T)[70, 0] == 1
        # Where the scales differ by an ulp, or the quotients do, a value may fall to the other side of a tie.
        found, want = np.asarray(values), np.asarray(want)
        off = found.astype(np.float32) != want.astype(np.float32)
        below, above = (quantize_by(x, want_scales, 1 + sign * 4 * QUOTIENT_ERROR) for sign in (-1, 1))
        assert off.mean() < 0.01
        assert ((found == below) | (found == above))[off].all()

    @pytest.mark.slow
    def test_rows_that_are_no_multiple_of_a_block(self):
        x = wide_rows(136, 256, "bfloat16")
        values, scales = hopper_quantize.quantize(x)
        want, want_scales = hopper_quantize.quantize(jnp.pad(x, ((0, 56), (0, 0))))
        assert list(bits(values)) == list(bits(want[:136]))
        assert list(bits(scales)) == list(bits(want_scales[:, :136]))

    def test_extremes_keep_their_scale(self):
        sizes = jnp.asarray(2.0 ** np.arange(-64, 64), jnp.float32)[:, None]
        x = jnp.ones((128, 128), jnp.float32) * sizes
        values, scales = hopper_quantize.quantize(x)
        assert (np.asarray(values).astype(np.float32) == 448).all()
        np.testing.assert_allclose(scales[0], sizes[:, 0] / 448, rtol=QUOTIENT_ERROR, atol=0)

    def test_scales_are_those_of_the_rule_bit_for_bit(self):
        random = np.random.default_rng(0)
        amax = random.uniform(1, 2, 100_000) * 2.0 ** random.integers(-126, 128, 100_000)
        edges = [0, 1e-40, 2.0**-126, 448 * 2.0**-126, 3.4e38, np.finfo(np.float32).max, np.inf, np.nan]
        amax = jnp.asarray([*amax, *edges], jnp.float32)
        want = amax_rule(amax, dtype(FP8), dtype("float32"), True)
        for scales_of in (hopper_quantize.scales_of, jax.jit(hopper_quantize.scales_of)):
            np.testing.assert_array_equal(scales_of(amax), want)

    def test_two_runs_are_equal_bit_for_bit(self):
        x = wide_rows(64, 256, "bfloat16")
        first, second = (map(bits, hopper_quantize.quantize(x)) for _ in range(2))
        assert list(first) == list(second)


def quantize_by(x, scales, factor: float) -> np.ndarray:
    """x over its scales times a factor, in e4m3."""
    quotients = np.asarray(x).astype(np.float64) / np.repeat(np.asarray(scales).astype(np.float64), 128, 1)
    return np.clip(quotients * factor, -448, 448).astype(np.float32).astype(dtype(FP8))
