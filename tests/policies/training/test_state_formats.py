"""8-bit optimizer state: codes, scales, rounding, and what no block may do."""

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from perparam.policies.training.state_formats import STATE_FORMATS, as_state_format, encode_state

DYNAMIC, E4M3, INT8 = (STATE_FORMATS[name] for name in ("dynamic8", "f8_e4m3fn", "int8"))


def drawn(seed, shape, spread=3.0):
    """Values whose magnitudes differ by several powers of ten, as those of moments do."""
    normal, exponent = jax.random.normal(jax.random.key(seed), (2, *shape))
    return normal * jnp.exp(exponent * spread)


def tree_code(signed):
    """The dynamic tree code, written from its definition in the paper by its bits rather than by powers and ranges.

    A code of 7 or 8 bits, without the sign, has z zeros, a one, and f bits that say which of 2**f intervals of
    [0.1, 1] the fraction is in.  All zeros is 0; the code whose only one is the last bit is 1.
    """
    bits, values = 7 if signed else 8, [0.0, 1.0]
    for code in range(2**bits):
        text = f"{code:0{bits}b}"
        zeros = len(text) - len(text.lstrip("0"))
        fraction_bits = bits - 1 - zeros
        if zeros > 6:
            continue
        number = int(text[zeros + 1 :] or "0", 2)
        low, high = (0.1 + 0.9 * edge / 2**fraction_bits for edge in (number, number + 1))
        magnitude = (low + high) / 2 * 10.0**-zeros
        values += [magnitude, -magnitude] if signed else [magnitude]
    return np.unique(np.array(values, np.float64))


def scales_of(values):
    flat = np.abs(np.asarray(values, np.float32)).ravel()
    return np.array([flat[i : i + 256].max() for i in range(0, flat.size, 256)], np.float32)


@pytest.mark.parametrize("unsigned", [False, True])
def test_dynamic_codes_are_the_nearest_of_the_published_table(unsigned):
    table = tree_code(not unsigned)
    assert len(table) == 256
    values = np.asarray(drawn(0, (40, 100)))
    values = np.abs(values) if unsigned else values
    state = encode_state(jnp.asarray(values), DYNAMIC, unsigned=unsigned)
    scales = np.repeat(scales_of(values), 256)[: values.size]
    quotients = (values.ravel() / scales).astype(np.float64)
    nearest = np.abs(quotients[:, None] - table).argmin(axis=1)
    nearest = np.where(unsigned & (quotients > 0), np.maximum(nearest, 1), nearest)
    # A quotient within an ulp of float32 of a tie may have either neighbour: none of these values is one.
    np.testing.assert_array_equal(np.asarray(state.codes).ravel(), nearest)
    np.testing.assert_array_equal(state.decode().ravel(), table.astype(np.float32)[nearest] * scales)


@pytest.mark.parametrize("format", STATE_FORMATS.values(), ids=str)
def test_rows_of_whole_blocks_have_the_codes_of_the_flattened_array(format):
    values = drawn(5, (2, 3, 512))
    state, flat = (encode_state(x, format) for x in (values, values.ravel()))
    np.testing.assert_array_equal(state.scales, flat.scales)
    np.testing.assert_array_equal(state.codes.ravel(), flat.codes)
    np.testing.assert_array_equal(state.decode().ravel(), flat.decode())


def test_float8_codes_are_saturated_quotients():
    values = np.asarray(drawn(1, (3, 300)))
    state = encode_state(jnp.asarray(values), E4M3)
    scales = scales_of(values) / np.float32(448)
    np.testing.assert_array_equal(state.scales, scales)
    quotients = values.ravel() / np.repeat(scales, 256)[: values.size]
    np.testing.assert_array_equal(
        np.asarray(state.codes).ravel().view(np.uint8), quotients.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    )


@pytest.mark.parametrize("format", STATE_FORMATS.values(), ids=str)
class TestEveryFormat:
    @hypothesis.given(shape=st.lists(st.integers(1, 600), min_size=1, max_size=4).map(tuple))
    def test_arrays_have_the_shapes_that_the_format_says(self, format, shape):
        state = jax.eval_shape(lambda x: encode_state(x, format), jax.ShapeDtypeStruct(shape, "bfloat16"))
        (codes, dtype), (scales, f32) = format.parts(shape)
        assert (state.codes.shape, state.codes.dtype, state.scales.shape, state.scales.dtype) == (
            codes, dtype, scales, f32
        )  # fmt: skip
        assert state.scales.size == -(-np.prod(shape) // 256)

    @hypothesis.given(seed=st.integers(0, 99), shift=st.integers(-20, 20))
    def test_a_power_of_two_moves_only_the_scales(self, format, seed, shift):
        values = drawn(seed, (2, 5, 77), spread=1.0)
        state, moved = encode_state(values, format), encode_state(values * 2.0**shift, format)
        np.testing.assert_array_equal(np.asarray(state.codes).view(np.uint8), np.asarray(moved.codes).view(np.uint8))
        np.testing.assert_array_equal(state.scales * 2.0**shift, moved.scales)

    def test_zeros_stay_zero(self, format):
        assert not encode_state(jnp.zeros((2, 5, 77)), format).decode().any()

    @pytest.mark.parametrize("bad", [jnp.nan, -jnp.inf])
    def test_what_is_not_finite_is_seen_in_its_block_and_nowhere_else(self, format, bad):
        decoded = encode_state(jnp.ones(768).at[300].set(bad), format).decode()
        assert np.isnan(decoded[256:512]).all()
        np.testing.assert_allclose(np.delete(decoded, np.s_[256:512]), 1.0, rtol=1e-6)

    def test_sixteen_bits_are_read_exactly(self, format):
        values = drawn(3, (2, 5, 77)).astype(jnp.bfloat16)
        wide = encode_state(values.astype(jnp.float32), format)
        np.testing.assert_array_equal(encode_state(values, format).decode(), wide.decode())


@pytest.mark.parametrize("format", [DYNAMIC, E4M3], ids=str)
def test_a_positive_second_moment_never_becomes_zero(format):
    values = jnp.ones(256).at[1].set(1e-20).at[2].set(0)
    decoded = encode_state(values, format, unsigned=True).decode()
    assert 0 < decoded[1] < 1e-5
    assert decoded[2] == 0
    assert encode_state(values, format).decode()[1] == 0


# Half of the widest gap between neighbours, relative to a value, in the decade below the largest value of a block:
# 64 intervals of the signed code and 128 of the unsigned one divide [0.1, 1], so that a value differs by half of
# 0.9 / 64 or 0.9 / 128 from its code, at 0.1 relatively; e4m3 has 3 bits after the first.
RELATIVE_ERROR = {
    ("dynamic8", False): 0.45 / 64 / 0.1,
    ("dynamic8", True): 0.45 / 128 / 0.1,
    ("f8_e4m3fn", False): 2**-4,
}


@pytest.mark.parametrize(("name", "unsigned"), RELATIVE_ERROR)
def test_values_of_the_largest_decade_have_a_bounded_relative_error(name, unsigned):
    values = jax.random.uniform(jax.random.key(0), (5000,), minval=0.101, maxval=1.0).at[::256].set(1.0)
    error = jnp.abs(encode_state(values, STATE_FORMATS[name], unsigned=unsigned).decode() - values) / values
    assert float(error.max()) <= RELATIVE_ERROR[name, unsigned]


def test_names_and_dtypes_are_read():
    assert as_state_format("F8_E4M3") is as_state_format(jnp.float8_e4m3fn) is E4M3
    assert as_state_format(DYNAMIC) is as_state_format("dynamic8") is DYNAMIC
    assert as_state_format(jnp.int8) is INT8
    assert as_state_format("bf16").values == jnp.bfloat16
