"""How slabs on a CPU read a kernel's bytes: every code of every type, bit for bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import dtype

from perparam.policies.matmul import cpu

pytestmark = pytest.mark.optimised

decoded = jax.jit(cpu._decoded, static_argnums=1)

NARROW = (
    *("float8_e4m3fn", "float8_e5m2", "int8", "float8_e3m4"),
    *("float8_e4m3b11fnuz", "float8_e4m3fnuz", "float8_e5m2fnuz"),
)


def check(codes: np.ndarray, of: np.dtype) -> np.ndarray:
    """The codes as float32, which ml_dtypes or numpy decode alike; of NaN only that it is."""
    want = codes.view(of).astype(np.float32)
    found = np.asarray(decoded(codes, of))
    assert found.dtype == np.float32
    is_nan = np.isnan(want)
    np.testing.assert_array_equal(np.isnan(found), is_nan)
    np.testing.assert_array_equal(found.view(np.uint32)[~is_nan], want.view(np.uint32)[~is_nan])
    return found


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("rows", [1, 7, 64])  # with and without vector instructions
def test_all_codes_of_a_byte(name, rows):
    check(np.tile(np.arange(256, dtype=np.uint8), (rows, 1)), dtype(name))


def test_e4m3fn_has_two_codes_that_are_not_numbers_and_no_infinity():
    found = check(np.arange(256, dtype=np.uint8), dtype("float8_e4m3fn"))
    assert np.flatnonzero(np.isnan(found)).tolist() == [0x7F, 0xFF]
    assert np.nanmax(found) == 448
    assert found[0x01] == 2.0**-9
    assert not np.isinf(found).any()


def test_e5m2_has_infinities():
    found = check(np.arange(256, dtype=np.uint8), dtype("float8_e5m2"))
    assert (found[0x7C], found[0xFC]) == (np.inf, -np.inf)
    assert np.isnan(found[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]]).all()


def test_zeros_keep_their_sign():
    for name in ("float8_e4m3fn", "float8_e5m2"):
        found = check(np.array([0x00, 0x80], np.uint8), dtype(name))
        assert np.signbit(found).tolist() == [False, True]


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_all_codes_of_16_bits(name):
    check(np.arange(2**16, dtype=np.uint16).reshape(64, -1), dtype(name))


def test_float32_is_what_it_is():
    values = np.random.default_rng(0).normal(size=(8, 32)).astype(np.float32)
    np.testing.assert_array_equal(decoded(values.view(np.uint32), dtype("float32")), values)


def test_every_narrow_type_is_here():
    floats = {name for name in dir(ml_dtypes) if name.startswith("float8")} - {"float8_e8m0fnu", "float8_e4m3"}
    assert set(NARROW) == floats | {"int8"}
    assert all(jnp.dtype(dtype(name)).itemsize == 1 for name in NARROW)
