"""The slot `backward`: both operands of the products in gradients are narrow, as an independent computation has it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from perparam import Policy, ScaledArray, quantize, scaled_matmul
from perparam.models import Linear
from perparam.policies import InvalidPolicy, UnknownDtype, UnmatchedRule, UnsupportedCast
from perparam.policies.matmul import grouped_matmul, matmul_override
from perparam.training import grad

ROWS, IN, OUT = 5, 260, 140
"""Ragged: 260 and 140 are two blocks of 128 columns and a part, and one and a part."""

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
FLOAT32_STEP = 2.0**-24


def rounded(array, dtype):
    """An array in float64, each row of which was quantised in blocks of 128 columns."""
    largest = np.float32(ml_dtypes.finfo(dtype).max)
    result = np.empty(array.shape)
    for first in range(0, array.shape[1], 128):
        block = np.asarray(array[:, first : first + 128], np.float32)
        scales = abs(block).max(axis=1, keepdims=True) / largest
        values = np.clip(block / np.where(scales == 0, 1, scales), -largest, largest).astype(dtype)
        result[:, first : first + 128] = values.astype(np.float64) * scales
    return result


def operands():
    x, gradient, weight = (
        np.asarray(jax.random.normal(jax.random.key(i), shape))
        for i, shape in enumerate([(ROWS, IN), (ROWS, OUT), (OUT, IN)])
    )
    return x * np.exp(x[:, :1]), gradient * np.exp(2 * gradient[:1]), weight


def gradients(x, gradient, kernel, trained, **settings):
    """The gradients of x and of the trained array."""

    def loss(x, trained):
        return (scaled_matmul(x, kernel(trained), **settings) * gradient).sum()

    return map(np.asarray, jax.jit(jax.grad(loss, (0, 1)))(x, trained))


def assert_sums(found, left, right):
    """Float32 sums of dequantised values, each of which is rounded once."""
    bound = (left.shape[1] + 4) * FLOAT32_STEP * (abs(left) @ abs(right))
    assert (abs(found - left @ right) <= bound).all()


@pytest.mark.parametrize("compute", [pytest.param(None, marks=pytest.mark.slow), "f8_e4m3fn"])
@pytest.mark.parametrize(
    ("backward", "of_gradient"), [("f8_e5m2", E5M2), pytest.param("f8_e4m3fn", E4M3, marks=pytest.mark.slow)]
)
def test_products_in_gradients_are_those_of_rounded_operands(backward, of_gradient, compute):
    x, gradient, weight = operands()
    scaled = quantize(weight, "f8_e4m3fn", (128, 128))
    dx, dw = gradients(
        x,
        gradient,
        lambda proxy: ScaledArray(scaled.values, scaled.scale_inv, scaled.format, proxy),
        jnp.zeros((OUT, IN)),
        compute=compute,
        backward=backward,
    )
    assert_sums(dx, rounded(gradient, of_gradient), np.asarray(scaled.dequantize(), np.float64))
    assert_sums(dw, rounded(gradient.T, of_gradient), rounded(x.T, E4M3).T)


def test_a_wide_kernel_is_quantised_for_them():
    x, gradient, weight = operands()
    dx, dw = gradients(x, gradient, lambda weight: weight, jnp.asarray(weight), backward="f8_e5m2")
    assert_sums(dx, rounded(gradient, E5M2), np.asarray(quantize(weight, "f8_e4m3fn").dequantize(), np.float64))
    assert_sums(dw, rounded(gradient.T, E5M2), rounded(x.T, E4M3).T)


@pytest.mark.slow
def test_they_differ_from_those_without_it_as_the_rounding_does():
    x, gradient, weight = operands()
    found = gradients(x, gradient, lambda weight: weight, jnp.asarray(weight), backward="f8_e5m2")
    for narrow, exact in zip(found, (gradient @ weight, gradient.T @ x), strict=True):
        # e5m2 has steps of 2**-2, and so errors of at most 2**-3: rms 2**-3 / sqrt(3) / sqrt(7/3), and that of e4m3.
        assert 0.01 < np.linalg.norm(narrow - exact) / np.linalg.norm(exact) < 0.08


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["int8", "mxfp8"])
@pytest.mark.parametrize("backward", ["f8_e5m2", "mxfp8"])
def test_kernels_of_other_formats_keep_their_values(kernel, backward):
    x, gradient, weight = operands()
    scaled = quantize(weight, kernel)
    dx, dw = gradients(
        x, gradient, lambda proxy: ScaledArray(*scaled, scaled.format, proxy), jnp.zeros((OUT, IN)), backward=backward
    )
    exact = gradient @ np.asarray(scaled.dequantize())
    # mxfp8 clips values by up to 1/8 besides.
    assert np.linalg.norm(dx - exact) / np.linalg.norm(exact) < 0.08
    assert np.linalg.norm(dw - gradient.T @ x) / np.linalg.norm(gradient.T @ x) < 0.09


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["slabs", "oracle", "widen, then dot"])
def test_each_implementation_computes_them(implementation):
    x, gradient, weight = operands()
    scaled = quantize(weight, "f8_e4m3fn")
    with matmul_override(implementation):
        dx, dw = gradients(
            x,
            gradient,
            lambda proxy: ScaledArray(*scaled, scaled.format, proxy),
            jnp.zeros((OUT, IN)),
            backward="f8_e5m2",
        )
    assert_sums(dx, rounded(gradient, E5M2), np.asarray(scaled.dequantize(), np.float64))
    assert_sums(dw, rounded(gradient.T, E5M2), rounded(x.T, E4M3).T)


@pytest.mark.slow
def test_groups_of_rows_have_them():
    x, gradient, weight = operands()
    scaled, sizes = quantize(np.stack([weight, 2 * weight]), "f8_e4m3fn"), jnp.array([2, 3])

    def loss(x, proxy):
        kernel = ScaledArray(*scaled, scaled.format, proxy)
        return (grouped_matmul(x, kernel, sizes, backward="f8_e4m3fn") * gradient).sum()

    dx, dw = map(np.asarray, jax.jit(jax.grad(loss, (0, 1)))(x, jnp.zeros((2, OUT, IN))))
    weights = np.asarray(scaled.dequantize(), np.float64)
    for group, rows in enumerate((slice(0, 2), slice(2, 5))):
        assert_sums(dx[rows], rounded(gradient[rows], E4M3), weights[group])
        assert_sums(dw[group], rounded(gradient[rows].T, E4M3), rounded(x[rows].T, E4M3).T)


class TestTheSlot:
    def test_a_layer_reads_it(self):
        x, gradient, _ = operands()
        policy = {"params": {"kernel": "f8_e4m3fn"}, "backward": {"kernel": "f8_e5m2"}}
        layer = Linear(IN, OUT, policy=policy, rngs=nnx.Rngs(0))
        found = grad(lambda layer: (layer(x) * gradient).sum())(layer)["kernel"][...]
        assert_sums(np.asarray(found), rounded(gradient.T, E5M2), rounded(x.T, E4M3).T)

    def test_without_it_gradients_are_as_before(self):
        layer = Linear(IN, OUT, policy={"params": {"kernel": "f8_e4m3fn"}}, rngs=nnx.Rngs(0))
        assert layer.backward is None

    def test_it_is_written_and_read(self):
        policy = Policy("f32", backward={"**/kernel": "f8_e5m2", "lm_head/kernel?": None})
        assert Policy.loads(policy.dumps()) == policy
        assert "backward:" in policy.dumps()

    @pytest.mark.parametrize(
        ("rules", "error", "message"),
        [
            ("f8_e5m2", UnknownDtype, "backward: f8_e5m2 needs scales, which only parameters of two or more"),
            ({"kernel": "int8"}, UnknownDtype, "backward: kernel: int8 is not a float8 type. Write null"),
            ({"kernel": "bf16"}, UnknownDtype, "backward: kernel: bf16 is not a float8 type. Write null"),
            ({"scale_inv": "f8_e5m2"}, InvalidPolicy, "backward: scale_inv: scales have no products of their own"),
            (
                {"kernel": {"dtype": "f8_e5m2", "block": [1, 64]}},
                InvalidPolicy,
                "backward: kernel: the blocks of gradients are rows of 128 columns",
            ),
        ],
    )
    def test_other_formats_are_errors(self, rules, error, message):
        with pytest.raises(error, match=message):
            Policy(backward=rules)

    def test_a_rule_without_effect_is_an_error(self):
        with pytest.raises(UnmatchedRule, match=r"'kernal' \(backward\) matches none of"):
            Policy(backward={"kernal": "f8_e5m2"}).explain({"kernel": jnp.ones((2, 2))})


def test_other_formats_of_a_product_are_errors():
    for backward in ("int8", "bf16", {"dtype": "f8_e5m2", "block": [1, 64]}):
        with pytest.raises(UnsupportedCast, match="backward is None, a float8 type or a named format, found"):
            scaled_matmul(jnp.ones((1, 2)), jnp.ones((3, 2)), backward=backward)
