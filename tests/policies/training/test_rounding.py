"""Stochastic rounding: unbiased, exact where it can be, saturating; and arrays quantised again in every format."""

import itertools

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perparam.policies.dtypes import as_dtype, largest
from perparam.policies.errors import InvalidScale, UnsupportedCast
from perparam.policies.formats import as_format
from perparam.policies.scaled_array import dequantize, quantize
from perparam.policies.training.rounding import requantize, stochastic_cast

FLOAT8 = ("f8_e4m3fn", "f8_e5m2", "f8_e3m4", "f8_e4m3b11fnuz", "f8_e4m3fnuz", "f8_e5m2fnuz")
DTYPES = ("bf16", "f16", "int8", *FLOAT8)
DRAWS = 200_000
# The mean of n draws of a step with probability p has the standard error step * sqrt(p (1 - p) / n). Beyond five of
# them lies one mean in 1.7 million; the keys are fixed, so that a test passes always or never.
STANDARD_ERRORS = 5
FORMATS = (
    *({"dtype": dtype, "block": [4, 8]} for dtype in (*FLOAT8, "int8")),
    {"dtype": "f8_e4m3fn", "block": [1, -1], "scale": "bf16"},
    {"dtype": "f8_e4m3fn", "block": [8, 8], "scale": "f8_e8m0fnu"},
    "mxfp8",
)


def numbers(dtype):
    """All finite numbers of a dtype, ascending, in float64."""
    dtype = as_dtype(dtype)
    if dtype == np.int8:
        return np.arange(-127.0, 128.0)
    bits = 8 * dtype.itemsize
    codes = np.arange(2**bits, dtype=f"uint{bits}")
    with np.errstate(invalid="ignore"):  # of NaN
        values = codes.view(dtype).astype(np.float64)
    return np.unique(values[np.isfinite(values)])


def neighbours(dtype, x):
    """The neighbours of x in a dtype, below and above."""
    values = numbers(dtype)
    above = np.searchsorted(values, x)
    return values[above - 1], values[above]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mean_of_many_draws_is_the_number(dtype):
    values = numbers(dtype)
    tiny, normal = values[values > 0][:2], values[np.searchsorted(values, 3.0)]
    points = [0.3 * tiny[0], tiny[0] + 0.9 * (tiny[1] - tiny[0]), 0.01 + normal, -0.77 * normal, 0.999 * values[-1]]
    points = np.array(points, np.float32)
    assert not np.isin(points.astype(np.float64), values).any()
    drawn = stochastic_cast(jnp.broadcast_to(points, (DRAWS, len(points))), dtype, jax.random.key(0))
    assert drawn.dtype == as_dtype(dtype)
    drawn = np.asarray(drawn).astype(np.float64)
    for i, x in enumerate(points.astype(np.float64)):
        below, above = neighbours(dtype, x)
        assert set(np.unique(drawn[:, i])) <= {below, above}
        chance = (x - below) / (above - below)
        error = abs(drawn[:, i].mean() - x)
        assert error <= STANDARD_ERRORS * (above - below) * np.sqrt(chance * (1 - chance) / DRAWS), (x, error)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_the_dtype_are_kept(dtype):
    values = numbers(dtype).astype(np.float32)
    for seed in range(2):
        drawn = stochastic_cast(values, dtype, jax.random.key(seed))
        chex.assert_trees_all_equal(np.asarray(drawn), values.astype(as_dtype(dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_beyond_the_largest_are_clipped_and_nan_stays(dtype):
    most = largest(as_dtype(dtype))
    x = np.array([most * 1.001, -3e38, 3.4e38, np.nan, np.inf], np.float32)
    drawn = np.asarray(stochastic_cast(x, dtype, jax.random.key(1)))
    if dtype == "int8":
        assert drawn[:3].tolist() == [127, -127, 127]
        return
    assert drawn[:3].astype(np.float64).tolist() == ([most, -most, most] if dtype != "bf16" else drawn[:3].tolist())
    assert np.isnan(drawn[3].astype(np.float32))
    assert np.array_equal(drawn[4:], x[4:].astype(as_dtype(dtype)), equal_nan=True)


def test_the_largest_numbers_of_bfloat16_are_never_rounded_to_infinity():
    drawn = stochastic_cast(jnp.full(1000, np.finfo(np.float32).max), "bf16", jax.random.key(0))
    assert set(np.asarray(drawn).astype(np.float64).tolist()) == {float(ml_dtypes.finfo("bfloat16").max)}


def test_float32_is_kept_and_zero_keeps_its_sign():
    x = jnp.array([1.1, -0.0, 0.0])
    chex.assert_trees_all_equal(stochastic_cast(x, "f32", jax.random.key(0)), x)
    drawn = stochastic_cast(x, "f8_e4m3fn", jax.random.key(0)).astype(jnp.float32)
    assert np.signbit(np.asarray(drawn)).tolist() == [False, True, False]


def test_a_key_determines_the_result():
    x = jax.random.normal(jax.random.key(3), (64, 64))
    one, same, other = (np.asarray(stochastic_cast(x, "int8", jax.random.key(seed))) for seed in (0, 0, 1))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("x", "dtype", "message"),
    [
        (np.ones(2, np.int32), "bf16", "an array of int32 cannot be rounded to bf16. Pass f32"),
        (np.ones(2, np.float32), "int4", "stochastic rounding to i4 is not supported. Write f32, bf16"),
    ],
)
def test_other_dtypes_are_refused(x, dtype, message):
    with pytest.raises(UnsupportedCast, match=message):
        stochastic_cast(x, dtype, jax.random.key(0))


@settings(max_examples=5)
@given(
    format=st.sampled_from(FORMATS),
    shape=st.sampled_from([(7, 70), (2, 3, 9, 33)]),
    seed=st.integers(0, 3),
)
def test_every_format_is_rounded_to_neighbours_with_the_scales_of_its_rule(format, shape, seed):
    weight = jax.random.normal(jax.random.key(seed), shape)
    nearest, drawn = requantize(weight, format), requantize(weight, format, key=jax.random.key(seed))
    chex.assert_trees_all_equal(nearest, quantize(weight, format))
    assert drawn.format == nearest.format == as_format(format).completed()
    chex.assert_trees_all_equal(drawn.scale_inv, nearest.scale_inv)
    ones = dequantize(jnp.ones(shape, drawn.dtype), drawn.scale_inv, drawn.format.block)
    quotient = np.asarray(weight, np.float64) / np.asarray(ones, np.float64)
    values = numbers(drawn.dtype)
    # The quotient of float32 numbers may be off by an ulp, and be the next number of the dtype then.
    low = values[np.maximum(np.searchsorted(values, quotient * (1 - np.sign(quotient) * 2.0**-22), "right") - 1, 0)]
    high = values[np.minimum(np.searchsorted(values, quotient * (1 + np.sign(quotient) * 2.0**-22)), len(values) - 1)]
    found = np.asarray(drawn.values).astype(np.float64)
    assert ((found >= low) & (found <= high)).all()


def test_the_mean_of_many_quantisations_is_the_weight():
    weight = jax.random.normal(jax.random.key(1), (4, 8))
    keys = jax.random.split(jax.random.key(2), 4000)
    for format in ({"dtype": "f8_e4m3fn", "block": [2, 4]}, {"dtype": "int8", "block": [4, 4]}):
        drawn = jax.vmap(lambda key, format=format: requantize(weight, format, key=key).dequantize())(keys)
        scales = dequantize(
            jnp.ones((4, 8), as_dtype(format["dtype"])), quantize(weight, format).scale_inv, format["block"]
        )
        # At most half a step of standard deviation, of which the largest, at 448, is 32 scales, and of int8 one.
        step = 32 if format["dtype"] == "f8_e4m3fn" else 1
        bound = STANDARD_ERRORS * 0.5 * step * np.asarray(scales) / np.sqrt(len(keys))
        assert (abs(np.asarray(drawn, np.float64).mean(0) - np.asarray(weight)) <= bound).all()


@pytest.mark.parametrize("key", [None, jax.random.key(0)], ids=["nearest", "stochastic"])
def test_given_scales_are_kept_and_values_beyond_the_largest_are_clipped(key):
    weight = jnp.array([[1.0, -1000.0], [2.0, 0.25]])
    scale_inv = jnp.array([[0.5], [0.25]], jnp.bfloat16)
    format = {"dtype": "f8_e4m3fn", "block": [1, 2], "scale": "bf16"}
    scaled = requantize(weight, format, key=key, scale_inv=scale_inv)
    chex.assert_trees_all_equal(scaled.scale_inv, scale_inv)
    assert scaled.values.astype(jnp.float32).tolist() == [[2.0, -448.0], [8.0, 1.0]]


@pytest.mark.parametrize("key", [None, jax.random.key(0)], ids=["nearest", "stochastic"])
def test_scales_that_do_not_fit_are_refused(key):
    weight, format = jnp.ones((2, 4)), {"dtype": "int8", "block": [1, 2]}
    with pytest.raises(InvalidScale, match=r"scales of shape \(2, 1\) do not fit a kernel of shape \(2, 4\)"):
        requantize(weight, format, key=key, scale_inv=jnp.ones((2, 1)))
    with pytest.raises(UnsupportedCast, match="scale_inv: found bf16, expected f32, the dtype of scales of the format"):
        requantize(weight, format, key=key, scale_inv=jnp.ones((2, 2), jnp.bfloat16))
    with pytest.raises(UnsupportedCast, match="bf16 is not a narrow dtype"):
        requantize(weight, "bf16", key=key)


def test_nan_in_a_block_is_nan_in_its_weights():
    weight = jnp.ones((2, 4)).at[0, 0].set(jnp.nan)
    for format, key in itertools.product(("f8_e4m3fn", "int8"), (None, jax.random.key(0))):
        found = requantize(weight, {"dtype": format, "block": [1, 4]}, key=key).dequantize()
        assert np.isnan(found[0]).any()
        assert np.array_equal(found[1], np.ones(4, np.float32))
