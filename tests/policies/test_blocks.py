"""Quantisation block by block: bit for bit what IEEE arithmetic gives, and the invariants that follow from it."""

import chex
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bits, dtype, reference_dequantize, reference_quantize, spread
from hypothesis import given
from hypothesis import strategies as st

from perparam import dequantize, quantize
from perparam.policies import InvalidScale, UnknownDtype, UnsupportedCast

pytestmark = pytest.mark.optimised

NARROW = (
    *("float8_e4m3fn", "float8_e5m2", "float8_e3m4"),
    *("float8_e4m3b11fnuz", "float8_e4m3fnuz", "float8_e5m2fnuz", "int8"),
)
SMALLEST_NORMAL = float(np.finfo(np.float32).smallest_normal)

# Each shape and block compiles once: few of them, of every kind (ragged, exact, a block larger than the array, a row,
# leading axes).
SHAPES = ((3, 5), (16, 16), (2, 7, 9))
BLOCKS = ((4, 4), (1, 8), (128, 128), (3, 2))

blocks = st.sampled_from(BLOCKS)


@st.composite
def matrices(draw, shapes=SHAPES, smallest=-6, largest=6):
    """Normally drawn weights of a normal magnitude: CPUs flush subnormal float32."""
    shape = draw(st.sampled_from(shapes))
    weight = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).normal(size=shape)
    return (weight * 2.0 ** draw(st.integers(smallest, largest))).astype(np.float32)


class TestAgainstNumpy:
    @pytest.mark.slow
    @pytest.mark.parametrize("narrow", NARROW)
    @given(weight=matrices(shapes=SHAPES[::2]), block=st.sampled_from(BLOCKS[:2]))
    def test_every_narrow_type_is_bit_for_bit(self, narrow, weight, block):
        kernel, scale_inv = quantize(weight, narrow, block)
        expected = reference_quantize(weight, narrow, block)
        assert bits(kernel) == bits(expected[0])
        assert bits(scale_inv) == bits(expected[1])

    @given(weight=matrices(), block=blocks, outlier=st.sampled_from([0.0, 1e-3, 1e4, 1e30]))
    def test_any_block_with_any_outlier_is_bit_for_bit(self, weight, block, outlier):
        weight[..., 1, 2] = outlier
        kernel, scale_inv = quantize(weight, "float8_e4m3fn", block)
        expected = reference_quantize(weight, "float8_e4m3fn", block)
        assert bits(kernel) == bits(expected[0])
        assert bits(scale_inv) == bits(expected[1])

    @given(
        weight=hnp.arrays(
            np.float32, (3, 5), elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
        ),
        block=blocks,
    )
    def test_values_that_hypothesis_chooses_are_bit_for_bit(self, weight, block):
        weight[np.abs(weight) < 2.0**-100] = (
            0  # quotients by 448 stay normal: what is flushed is no question of rounding
        )
        kernel, scale_inv = quantize(weight, "float8_e4m3fn", block)
        expected = reference_quantize(weight, "float8_e4m3fn", block)
        # The product of a tiny weight and its block's large scale may be flushed to a zero, of either sign.
        np.testing.assert_array_equal(np.asarray(kernel).astype(np.float32), expected[0].astype(np.float32))
        assert bits(scale_inv) == bits(expected[1])

    @pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16"])
    @given(weight=matrices(shapes=((3, 5), (16, 16)), smallest=0, largest=12), block=st.sampled_from(BLOCKS[:2]))
    def test_rounded_scales_are_bit_for_bit(self, scale_dtype, weight, block):
        kernel, scale_inv = quantize(weight, "float8_e4m3fn", block, scale_dtype=scale_dtype)
        expected = reference_quantize(weight, "float8_e4m3fn", block, scale_dtype)
        assert bits(kernel) == bits(expected[0])
        assert bits(scale_inv) == bits(expected[1])

    @pytest.mark.parametrize("block", [(64, 64), (1, 64), (64, 1), (16, 128)])
    def test_quotients_are_correctly_rounded(self, block):
        """A quotient that is an ulp off shows where it falls between two neighbours of e4m3."""
        random = np.random.default_rng(0)
        weight = np.zeros((64, 64), np.float32)
        corners = weight[:: block[0], :: block[1]]
        corners[:] = 448 * random.uniform(1, 2, corners.shape)
        _, scale_inv = reference_quantize(weight, "float8_e4m3fn", block)
        ties = random.choice(np.arange(17, 32, 2), weight.shape)  # e4m3 has the even numbers from 16 to 32
        weight = np.where(weight == 0, ties * spread(scale_inv, weight.shape, block), weight).astype(np.float32)
        kernel, scale_inv = quantize(weight, "float8_e4m3fn", block)
        expected = reference_quantize(weight, "float8_e4m3fn", block)
        assert bits(scale_inv) == bits(expected[1])
        assert bits(kernel) == bits(expected[0])

    @pytest.mark.parametrize("wide", ["bfloat16", "float16"])
    def test_weights_of_16_bits_are_quantised_in_f32(self, wide):
        weight = np.random.default_rng(0).normal(size=(5, 6)).astype(dtype(wide))
        kernel, scale_inv = quantize(weight, "float8_e4m3fn", (4, 4))
        expected = reference_quantize(weight, "float8_e4m3fn", (4, 4))
        assert bits(kernel) == bits(expected[0])
        assert bits(scale_inv) == bits(expected[1])

    @pytest.mark.parametrize("narrow", ["float8_e4m3fn", "int8"])
    @pytest.mark.parametrize("wide", ["float32", "bfloat16", "float16"])
    def test_dequantising_is_the_product_in_f32_then_a_cast(self, narrow, wide):
        weight = np.random.default_rng(0).normal(size=(7, 9)).astype(np.float32)
        kernel, scale_inv = quantize(weight, narrow, (4, 4))
        expected = reference_dequantize(kernel, scale_inv, (4, 4), np.float32).astype(dtype(wide))
        assert bits(dequantize(kernel, scale_inv, (4, 4), wide)) == bits(expected)

    def test_dequantising_saturates(self):
        wide = dequantize(jnp.full((1, 1), 448, "float8_e4m3fn"), jnp.full((1, 1), 1e4), (1, 1), "f16")
        assert wide.tolist() == [[65504.0]]


class TestInvariants:
    @given(block=blocks, weight=matrices(), shift=st.integers(-20, 20))
    def test_a_power_of_two_moves_only_the_scale(self, block, weight, shift):
        factor = np.float32(2.0**shift)
        kernel, scale_inv = quantize(weight, "f8_e4m3fn", block)
        kernel2, scale_inv2 = quantize(weight * factor, "f8_e4m3fn", block)
        chex.assert_trees_all_equal(kernel, kernel2)
        chex.assert_trees_all_equal(scale_inv * factor, scale_inv2)

    @pytest.mark.parametrize("narrow", ["float8_e4m3fn", "float8_e5m2", "int8"])
    @given(block=st.sampled_from(BLOCKS[:2]), weight=matrices())
    def test_quantising_a_dequantised_array_keeps_the_payload(self, narrow, block, weight):
        kernel, scale_inv = quantize(weight, narrow, block)
        kernel2, scale_inv2 = quantize(dequantize(kernel, scale_inv, block), narrow, block)
        assert bits(kernel) == bits(kernel2)
        # Two roundings, of the product and of the quotient, are half an ulp each.
        np.testing.assert_array_max_ulp(np.asarray(scale_inv), np.asarray(scale_inv2), maxulp=1)

    @given(block=blocks, weight=matrices())
    def test_the_error_is_at_most_half_an_ulp_of_each_element(self, block, weight):
        kernel, scale_inv = quantize(weight, "f8_e4m3fn", block)
        error = np.abs(weight - reference_dequantize(kernel, scale_inv, block))
        bound = np.maximum(np.abs(weight) * 2.0**-4, spread(scale_inv, weight.shape, block) * 2.0**-10)
        # The quotient is rounded to f32 before it is rounded to e4m3: half an f32 ulp on top.
        assert (error <= bound * (1 + 2.0**-20)).all()

    @given(block=st.sampled_from([(4, 2), (128, 128)]), weight=matrices(shapes=((3, 5), (16, 16))))
    def test_transposing_the_pair_transposes_the_weight(self, block, weight):
        kernel, scale_inv = quantize(weight, "f8_e4m3fn", block)
        kernel2, scale_inv2 = quantize(weight.T, "f8_e4m3fn", block[::-1])
        assert bits(kernel.T) == bits(kernel2)
        assert bits(scale_inv.T) == bits(scale_inv2)
        assert bits(dequantize(kernel.T, scale_inv.T, block[::-1])) == bits(dequantize(kernel, scale_inv, block).T)

    def test_leading_axes_are_a_batch(self):
        weight = np.random.default_rng(0).normal(size=(2, 3, 7, 9)).astype(np.float32)
        kernel, scale_inv = quantize(weight, "f8_e4m3fn", (4, 4))
        assert scale_inv.shape == (2, 3, 2, 3)
        each = [quantize(weight[i, j], "f8_e4m3fn", (4, 4)) for i in range(2) for j in range(3)]
        assert bits(kernel) == bits(np.stack([k for k, _ in each]).reshape(weight.shape))
        assert bits(scale_inv) == bits(np.stack([s for _, s in each]).reshape(scale_inv.shape))

    @pytest.mark.parametrize(
        ("shape", "grid"), [((576, 200), (5, 2)), ((1, 1), (1, 1)), ((128, 129), (1, 2)), ((4, 0), (1, 0))]
    )
    def test_the_grid_is_rounded_up(self, shape, grid):
        _, scale_inv = quantize(np.ones(shape, np.float32), "f8_e4m3fn")
        assert scale_inv.shape == grid

    def test_the_largest_of_a_block_becomes_the_largest_of_the_type(self):
        weight = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
        for narrow, limit in (("float8_e4m3fn", 448), ("float8_e5m2", 57344), ("int8", 127)):
            kernel, _ = quantize(weight, narrow, (16, 16))
            assert np.abs(np.asarray(kernel).astype(np.float32)).max() == limit


class TestExtremes:
    def test_an_all_zero_block_has_scale_one(self):
        weight = np.zeros((4, 8), np.float32)
        weight[0, 0] = 1
        kernel, scale_inv = quantize(weight, "f8_e4m3fn", (4, 4))
        assert scale_inv.tolist() == [[float(np.float32(1) / np.float32(448)), 1.0]]
        assert dequantize(kernel, scale_inv, (4, 4))[:, 4:].tolist() == np.zeros((4, 4)).tolist()

    @pytest.mark.parametrize("exponent", [-126, -124, -119])
    def test_the_scale_of_a_tiny_block_is_at_least_the_smallest_normal(self, exponent):
        weight = np.full((2, 2), 2.0**exponent, np.float32)
        kernel, scale_inv = quantize(weight, "f8_e4m3fn", (2, 2))
        assert scale_inv.tolist() == [[SMALLEST_NORMAL]]
        assert np.asarray(kernel).astype(np.float64).tolist() == np.full((2, 2), 2.0 ** (exponent + 126)).tolist()

    def test_the_largest_weights_are_kept(self):
        largest = np.finfo(np.float32).max
        kernel, scale_inv = quantize(np.array([[largest, -largest]]), "f8_e4m3fn", (1, 2))
        assert np.asarray(kernel).astype(np.float32).tolist() == [[448, -448]]
        assert np.isfinite(np.asarray(dequantize(kernel, scale_inv, (1, 2)))).all()

    @pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16"])
    def test_a_scale_is_rounded_before_the_kernel_is_quantised_with_it(self, scale_dtype):
        # amax / 448 = 1.005 rounds to 1 in bfloat16 (8 bits) and to 1.0049 in float16: the kernel makes up for it.
        weight = np.array([[1.005 * 448, 1.005 * 30]], np.float32)
        kernel, scale_inv = quantize(weight, "f8_e4m3fn", (1, 2), scale_dtype=scale_dtype)
        rounded = np.float32(weight[0, 0] / np.float32(448)).astype(dtype(scale_dtype))
        assert bits(scale_inv) == bits(np.array([[rounded]]))
        assert bits(kernel[0, 1]) == bits((weight[0, 1] / rounded.astype(np.float32)).astype(dtype("float8_e4m3fn")))

    def test_an_f16_scale_saturates(self):
        _, scale_inv = quantize(np.full((1, 1), 1e30, np.float32), "f8_e4m3fn", scale_dtype="f16")
        assert scale_inv.tolist() == [[65504.0]]

    def test_nan_stays_within_its_block(self):
        weight = np.ones((2, 4), np.float32)
        weight[0, 0] = np.nan
        _, scale_inv = quantize(weight, "f8_e4m3fn", (2, 2))
        assert np.isnan(np.asarray(scale_inv)).tolist() == [[True, False]]


class TestVariants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_a_pair_is_the_same_with_and_without_jit(self):
        weight = np.random.default_rng(3).normal(size=(33, 47)).astype(np.float32)
        kernel, scale_inv = self.variant(lambda w: quantize(w, "f8_e4m3fn", (16, 16)))(weight)
        expected = reference_quantize(weight, "float8_e4m3fn", (16, 16))
        assert bits(kernel) == bits(expected[0])
        assert bits(scale_inv) == bits(expected[1])

    @chex.variants(with_jit=True, without_jit=True)
    def test_a_weight_is_the_same_with_and_without_jit(self):
        kernel, scale_inv = reference_quantize(
            np.random.default_rng(3).normal(size=(33, 47)), "float8_e4m3fn", (16, 16)
        )
        weight = self.variant(lambda k, s: dequantize(k, s, (16, 16)))(kernel, scale_inv)
        chex.assert_trees_all_equal(np.asarray(weight), reference_dequantize(kernel, scale_inv, (16, 16), np.float32))

    @chex.variants(with_jit=True, without_jit=True)
    def test_a_vmapped_batch_is_the_batch(self):
        weight = np.random.default_rng(3).normal(size=(3, 8, 8)).astype(np.float32)
        kernel, scale_inv = self.variant(jax.vmap(lambda w: quantize(w, "f8_e4m3fn", (4, 4))))(weight)
        expected = reference_quantize(weight, "float8_e4m3fn", (4, 4))
        assert bits(kernel) == bits(expected[0])
        assert bits(scale_inv) == bits(expected[1])


class TestErrors:
    @pytest.mark.parametrize("shape", [(), (4,)])
    def test_fewer_than_two_dimensions_have_no_blocks(self, shape):
        with pytest.raises(
            InvalidScale, match=r"blocks need two or more dimensions, found the shape .*Use a wide dtype"
        ):
            quantize(np.ones(shape, np.float32), "f8_e4m3fn")

    @pytest.mark.parametrize("found", ["int32", "int8", "bool", "float8_e4m3fn"])
    def test_what_is_no_wide_float_cannot_be_quantised(self, found):
        with pytest.raises(UnsupportedCast, match=f"an array of {found} cannot be quantised. Pass f32, bf16 or"):
            quantize(np.ones((2, 2), dtype(found)), "f8_e4m3fn")

    @pytest.mark.parametrize("wide", ["f32", "bf16", "i32"])
    def test_only_narrow_types_have_scales(self, wide):
        with pytest.raises(UnsupportedCast, match=f"{wide} is not a narrow dtype. Write f8_e4m3fn"):
            quantize(np.ones((2, 2), np.float32), wide)

    def test_scales_are_wide(self):
        with pytest.raises(UnsupportedCast, match=r"scales are f32, bf16, f16, f8_e8m0fnu or f8_e4m3fn, not f8_e5m2"):
            quantize(np.ones((2, 2), np.float32), "f8_e4m3fn", scale_dtype="f8_e5m2")

    def test_an_unknown_type_is_answered_with_the_nearest(self):
        with pytest.raises(UnknownDtype, match="nearest name is 'f8_e4m3fn'"):
            quantize(np.ones((2, 2), np.float32), "f8_e4m3f")

    @pytest.mark.parametrize("grid", [(2, 2), (3,), (1, 3), (1, 2, 3)])
    def test_a_grid_that_does_not_fit_is_an_error_with_every_shape(self, grid):
        with pytest.raises(InvalidScale) as caught:
            dequantize(jnp.ones((5, 9), "float8_e4m3fn"), jnp.ones(grid), (4, 4))
        assert (
            f"scales of shape {grid} do not fit a kernel of shape (5, 9) in blocks of (4, 4), expected (2, 3)"
            in str(caught.value)
        )
