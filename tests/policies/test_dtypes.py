"""Names of dtypes, and casts that keep finite values finite."""

import itertools

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perparam.policies import PerparamError, UnknownDtype, as_dtype, dtype_name, saturating_cast

pytestmark = pytest.mark.optimised

NARROW_FLOATS = (
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e3m4",
    "float8_e4m3b11fnuz",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
)
WIDE_FLOATS = ("float16", "bfloat16", "float32")
FLOATS = (*WIDE_FLOATS, *NARROW_FLOATS)

E4M3FN = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)


def finite_values(name: str) -> np.ndarray:
    """Every finite value of a type of 8 or 16 bits; of float32 one for every choice of its upper 16 bits."""
    dtype = as_dtype(name)
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[dtype.itemsize]
    bits = np.arange(256 if dtype.itemsize == 1 else 65536).astype(unsigned)
    values = (bits << 16 if dtype.itemsize == 4 else bits).view(dtype)
    with np.errstate(invalid="ignore"):
        return values[np.isfinite(values.astype(np.float64))]


class TestNames:
    @pytest.mark.parametrize(
        "alias",
        [
            *("f8_e4m3fn", "float8_e4m3fn", "F8_E4M3FN", "F8_E4M3", "torch.float8_e4m3fn"),
            *(jnp.float8_e4m3fn, ml_dtypes.float8_e4m3fn, E4M3FN),
        ],
    )
    def test_every_name_of_e4m3fn_is_one_dtype(self, alias):
        assert as_dtype(alias) == E4M3FN
        assert type(as_dtype(alias)) is type(E4M3FN)
        assert hash(as_dtype(alias)) == hash(E4M3FN)

    @pytest.mark.parametrize(
        "alias", ["bf16", "bfloat16", "BF16", "torch.bfloat16", jnp.bfloat16, ml_dtypes.bfloat16, BF16]
    )
    def test_every_name_of_bf16_is_one_dtype(self, alias):
        assert as_dtype(alias) == BF16
        assert hash(as_dtype(alias)) == hash(BF16)

    @pytest.mark.parametrize(
        "alias", ["f32", "float32", "F32", "fp32", "single", "full", "torch.float", jnp.float32, np.dtype("f4")]
    )
    def test_every_name_of_f32_is_one_dtype(self, alias):
        assert as_dtype(alias) == np.dtype("float32")

    @pytest.mark.parametrize("alias", ["f16", "fp16", "half", "torch.half", "torch.float16"])
    def test_every_name_of_f16_is_one_dtype(self, alias):
        assert as_dtype(alias) == np.dtype("float16")

    @pytest.mark.parametrize(("alias", "name"), [("I8", "int8"), ("F8_E5M2", "float8_e5m2"), ("BOOL", "bool")])
    def test_safetensors_names_are_known(self, alias, name):
        assert as_dtype(alias) == np.dtype(getattr(ml_dtypes, name, name))

    def test_byte_order_is_no_part_of_a_dtype(self):
        assert as_dtype(np.dtype(">f4")) == np.dtype("=f4")

    @pytest.mark.parametrize("name", [*FLOATS, "int8", "int32", "bool", "float4_e2m1fn"])
    def test_the_short_name_reads_back(self, name):
        assert as_dtype(dtype_name(as_dtype(name))) == as_dtype(name)

    @pytest.mark.parametrize(
        ("misspelt", "nearest"),
        [("float23", "float32"), ("bfloat", "bfloat16"), ("f8_e4m3n", "f8_e4m3fn"), ("float8_e5m", "float8_e5m2")],
    )
    def test_an_unknown_name_is_answered_with_the_nearest(self, misspelt, nearest):
        with pytest.raises(UnknownDtype, match=f"unknown dtype '{misspelt}'.*nearest name is '{nearest}'"):
            as_dtype(misspelt)

    @pytest.mark.parametrize("name", ["kernel", "nf4", "nvfp4"])
    def test_a_name_like_no_other_is_answered_with_examples(self, name):
        with pytest.raises(UnknownDtype, match=rf"unknown dtype '{name}'. Write a name such as 'bf16', 'f32'"):
            as_dtype(name)

    @pytest.mark.parametrize("ambiguous", ["f8", "f8_e4m3", "float8_e4m3", "torch.float8_e4m3", "fp8", "float8"])
    def test_an_ambiguous_name_is_refused_and_the_choice_shown(self, ambiguous):
        with pytest.raises(UnknownDtype, match=f"'{ambiguous}' is ambiguous. Write f8_e4m3fn"):
            as_dtype(ambiguous)

    @pytest.mark.parametrize("thing", [float, int, 3, object(), ["f32"], None])
    def test_what_is_no_dtype_is_refused(self, thing):
        with pytest.raises(UnknownDtype, match=r"is not a dtype. Write a name such as 'bf16'"):
            as_dtype(thing)

    def test_the_error_is_perparams_and_a_value_error(self):
        with pytest.raises(PerparamError) as caught:
            as_dtype("nonsense")
        assert isinstance(caught.value, ValueError)


class TestFloat64:
    @pytest.mark.parametrize("alias", ["f64", "float64", "F64", "double", np.float64, np.dtype("float64"), jnp.float64])
    def test_is_an_error_without_x64(self, alias):
        with pytest.raises(UnknownDtype, match=r"float64 needs jax_enable_x64.*Enable it, or write f32"):
            as_dtype(alias)

    def test_is_a_dtype_with_x64(self):
        with jax.enable_x64(True):
            assert as_dtype("f64") == np.dtype("float64")

    def test_is_cast_to_f32_saturating(self):
        with jax.enable_x64(True):
            cast = saturating_cast(jnp.asarray([1e300, -1e300, 0.5]), "float32")
            assert cast.dtype == np.float32
            largest = float(np.finfo(np.float32).max)
            assert cast.tolist() == [largest, -largest, 0.5]


def saturated(values: np.ndarray, target: np.dtype) -> np.ndarray:
    """What a saturating cast gives, by numpy and ml_dtypes: clip in float64, where every bound is exact, then round."""
    largest = float(ml_dtypes.finfo(target).max)
    with np.errstate(over="ignore"):
        return np.clip(values.astype(np.float64), -largest, largest).astype(target)


class TestSaturatingCast:
    @pytest.mark.parametrize("found", FLOATS)
    def test_no_finite_value_becomes_nan_or_infinite(self, found):
        values, broken = finite_values(found), {}
        every = jax.jit(lambda x: {target: saturating_cast(x, target) for target in FLOATS})
        for target, cast in every(values).items():
            finite = np.isfinite(np.asarray(cast).astype(np.float64))
            if not finite.all():
                broken[target] = values[~finite][0]
        assert not broken

    @given(
        values=hnp.arrays(np.float32, 64, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
        target=st.sampled_from([name for name in FLOATS if name != "float32"]),
    )
    def test_no_finite_f32_becomes_nan_or_infinite(self, values, target):
        cast = np.asarray(saturating_cast(jnp.asarray(values), target))
        assert cast.dtype == as_dtype(target)
        assert np.isfinite(cast.astype(np.float64)).all()

    @pytest.mark.parametrize("found", WIDE_FLOATS)
    @pytest.mark.parametrize("target", ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16"])
    def test_it_rounds_to_nearest_and_clips(self, found, target):
        values = finite_values(found)
        # XLA's CPU backend may flush what is subnormal in float32: these alone may differ.
        values = values[np.abs(values.astype(np.float64)) >= 2.0**-126]
        got = np.asarray(saturating_cast(jnp.asarray(values), target)).astype(np.float64)
        np.testing.assert_array_equal(got, saturated(values, as_dtype(target)).astype(np.float64))

    @pytest.mark.parametrize(("found", "target"), list(itertools.product(WIDE_FLOATS, FLOATS)))
    def test_nan_stays_nan(self, found, target):
        cast = saturating_cast(jnp.asarray([np.nan, 1.0], found), target)
        assert np.isnan(np.asarray(cast).astype(np.float32)).tolist() == [True, False]

    @pytest.mark.parametrize("target", ["float16", "bfloat16", "float8_e5m2"])
    def test_infinity_stays_infinite_where_the_type_has_it(self, target):
        cast = saturating_cast(jnp.asarray([np.inf, -np.inf], np.float32), target)
        assert np.asarray(cast).astype(np.float32).tolist() == [np.inf, -np.inf]

    def test_to_int8_rounds_half_to_even_and_clips(self):
        cast = saturating_cast(jnp.asarray([0.5, 1.5, -2.5, 126.7, 1e9, -1e9], np.float32), "int8")
        assert cast.tolist() == [0, 2, -2, 127, 127, -127]

    def test_the_same_dtype_is_the_same_array(self):
        x = jnp.ones(3, jnp.bfloat16)
        assert saturating_cast(x, "bfloat16") is x
