"""The FP8 linear layer: what its scales, its ragged blocks and its bias do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import bits, reference_dequantize

from perparam import Policy, scaled_matmul
from perparam.models import Linear
from perparam.models.layers import project
from perparam.policies import Narrow

WEIGHT_ONLY = Policy(params={"kernel": "f8_e4m3fn"}, compute="f32", block=(2, 2))
X = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)

SUMMATION = 2.0**-20
"""Sums of five products in float32, in whichever order: six roundings of 2**-24, with room to spare."""


def layer(policy=WEIGHT_ONLY, use_bias=False, scale=None) -> Linear:
    """A layer of three rows of five columns, ragged in blocks of two."""
    linear = Linear(5, 3, use_bias=use_bias, policy=policy, rngs=nnx.Rngs(0))
    if scale is not None:
        linear.scale_inv[...] = jnp.full_like(linear.scale_inv[...], scale)
    return linear


def test_a_scale_of_two_doubles_the_result():
    once, twice = layer(scale=1), layer(scale=2)
    assert bits(twice(X)) == bits(2.0 * once(X))


def test_a_scale_of_one_is_the_identity():
    linear = layer(scale=1)
    expected = X @ np.asarray(linear.kernel[...]).astype(np.float32).T
    np.testing.assert_allclose(
        linear(X), expected, rtol=SUMMATION, atol=SUMMATION * np.abs(linear.kernel[...].astype(jnp.float32)).max()
    )


def test_ragged_blocks_have_scales_of_their_own():
    linear = layer()
    assert linear.kernel.shape == (3, 5)
    assert linear.scale_inv.shape == (2, 3)
    weight = reference_dequantize(linear.kernel[...], linear.scale_inv[...], (2, 2))
    np.testing.assert_allclose(linear(X), X @ weight.T, rtol=SUMMATION, atol=SUMMATION)
    before = linear(X)
    linear.scale_inv[...] = linear.scale_inv[...].at[1, 2].multiply(2.0)
    difference = X[:, 4:] @ weight[2:, 4:].T
    np.testing.assert_allclose((linear(X) - before)[:, 2:], difference, rtol=1e-5, atol=SUMMATION)
    assert (linear(X) == before)[:, :2].all()


@pytest.mark.parametrize("bias_dtype", ["f32", "bf16"])
def test_a_bias_is_added_unscaled(bias_dtype):
    policy = Policy(params={"kernel": "f8_e4m3fn", "bias": bias_dtype}, compute="f32", block=(2, 2))
    linear = layer(policy, use_bias=True, scale=2)
    without = linear(X)
    linear.bias[...] = jnp.asarray([1.0, -2.0, 0.5], linear.bias.dtype)
    assert linear.bias.dtype.name == {"f32": "float32", "bf16": "bfloat16"}[bias_dtype]
    assert bits(linear(X)) == bits(without + jnp.asarray([1.0, -2.0, 0.5]))


@pytest.mark.parametrize("kernel", ["bf16", "f8_e4m3fn"])
def test_a_bias_is_added_before_the_sum_is_rounded(kernel):
    """As in torch: two roundings would have 1.3 times the error of one."""
    policy = Policy(
        {"kernel": kernel, "default": "bf16"}, "bf16" if kernel == "bf16" else {"bias": "bf16"}, block=(2, 2)
    )
    layers = [layer(policy, use_bias=True) for _ in range(2)]
    x = jnp.asarray(X, jnp.bfloat16)
    for linear, bias in zip(layers, ([1.0, -2.0, 0.5], [3.0, 0.25, -1.0]), strict=True):
        linear.bias[...] = jnp.asarray(bias, jnp.bfloat16)
    for linear, together in zip(layers, project(x, *layers), strict=True):
        kernel = linear.kernel[...]
        scales = None if linear.scale_inv is None else linear.scale_inv[...]
        product = scaled_matmul(x, kernel, scales, block=(2, 2), result="f32")
        expected = (product + linear.bias[...].astype(jnp.float32)).astype(jnp.bfloat16)
        assert bits(linear(x)) == bits(together) == bits(expected)
        assert bits(expected) != bits(product.astype(jnp.bfloat16) + linear.bias[...])


def test_without_bias_there_is_none():
    assert layer().bias is None
    assert set(nnx.state(layer())) == {"kernel", "scale_inv"}


def test_a_plain_kernel_has_no_scales():
    linear = layer(Policy(params="f32"))
    assert linear.scale_inv is None
    assert type(linear.kernel) is nnx.Param
    np.testing.assert_allclose(linear(X), X @ linear.kernel[...].T, rtol=SUMMATION, atol=SUMMATION)


@pytest.mark.parametrize("activations", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("kernel", [None, "f8_e4m3fn", "f32"])
def test_it_returns_the_activations_dtype(activations, kernel):
    policy = Policy(params={"kernel": "f8_e4m3fn"}, compute={"kernel": kernel, "default": activations})
    assert layer(policy, use_bias=True)(X).dtype == policy.activations


def test_without_a_policy_it_returns_the_inputs_dtype():
    assert layer(None)(X.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_gradients_reach_x_and_the_bias_and_pass_the_kernel_by():
    linear = layer(use_bias=True)
    gradient = nnx.grad(lambda model: model(X).sum())(linear)
    assert set(gradient) == {"bias"}
    assert gradient["bias"][...].tolist() == [4.0, 4.0, 4.0]
    dx = jax.grad(lambda x: linear(x).sum())(jnp.asarray(X))
    weight = reference_dequantize(linear.kernel[...], linear.scale_inv[...], (2, 2))
    np.testing.assert_allclose(dx, np.broadcast_to(weight.sum(0), X.shape), rtol=SUMMATION, atol=SUMMATION)


def test_a_narrow_pair_is_narrow_variables_that_know_their_block():
    linear = layer()
    assert type(linear.kernel) is type(linear.scale_inv) is Narrow
    assert linear.kernel.block == linear.scale_inv.block == (2, 2)
