"""Activations quantised as they come, on a CPU and as other devices do it in one pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bits, dtype, largest, reference_dequantize, reference_quantize
from matmuls import FP8

from perparam.policies.matmul import quantize_rows

pytestmark = pytest.mark.optimised

QUOTIENT_ERROR = 2.0**-23
"""A float32 quotient an ulp off: XLA on a CPU multiplies with the reciprocal of what is constant along a loop."""


@pytest.fixture
def elsewhere(monkeypatch):
    """What is for no platform in particular runs here."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, default, **_: default(*operands))


def rows(features: int, of: str) -> np.ndarray:
    """Six rows, of which one is zero and two are large or small."""
    x = np.random.default_rng(features).normal(size=(6, features)) * np.array(
        [[1], [0], [2.0**12], [2.0**-12], [1], [1]]
    )
    return x.astype(dtype(of))


@pytest.mark.parametrize("features", [128, 300, 5, 0])
@pytest.mark.parametrize("of", ["bfloat16", "float16", "float32"])
def test_on_a_cpu_it_is_quantize_by_row_and_128_columns(features, of):
    x = rows(features, of)
    for found, want in zip(
        quantize_rows(jnp.asarray(x), dtype(FP8)), reference_quantize(x, FP8, (1, 128)), strict=True
    ):
        assert bits(found) == bits(want)


@pytest.mark.parametrize("narrow", [FP8, "float8_e5m2"])
@pytest.mark.parametrize("features", [128, 300, 5])
@pytest.mark.parametrize("of", ["bfloat16", "float32"])
def test_elsewhere_it_is_that_up_to_the_quotient_s_last_bit(elsewhere, features, of, narrow):
    x = rows(features, of)
    values, scales = quantize_rows(jnp.asarray(x), dtype(narrow))
    want, want_scales = reference_quantize(x, narrow, (1, 128))
    assert (values.dtype, values.shape, scales.dtype) == (want.dtype, want.shape, np.float32)
    np.testing.assert_allclose(scales, want_scales, rtol=QUOTIENT_ERROR, atol=0)
    differ = np.asarray(values).astype(np.float32) != want.astype(np.float32)
    assert differ.mean() < 0.01  # of a tie, an ulp decides


@pytest.mark.parametrize("of", ["bfloat16", "float32"])
def test_elsewhere_extremes_stay_finite(elsewhere, of):
    x = jnp.full((1, 128), jnp.finfo(of).max, of)
    values, scales = quantize_rows(x, dtype(FP8))
    assert (np.asarray(values).astype(np.float32) == largest(dtype(FP8))).all()
    assert np.isfinite(scales).all()
    assert float(quantize_rows(x * 0, dtype(FP8)).scale_inv[0, 0]) == 1
    tiny = quantize_rows(jnp.full((1, 128), 2.0**-126, of), dtype(FP8))
    assert float(tiny.scale_inv[0, 0]) == 2.0**-126


def test_widened_rows_are_values_times_scales():
    quantised = quantize_rows(jnp.asarray(rows(300, "float32")), dtype(FP8))
    want = reference_dequantize(*quantised, (1, 128), np.float32)
    np.testing.assert_array_equal(quantised.dequantize(), want)
