"""Rotary embeddings: angles against the formula, products that see only distances, and YaRN's two ends."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from perparam.models import Qwen3Config, Yarn, rope

PLAIN = Qwen3Config(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
    head_dim=64, rope_theta=5000.0,
)  # fmt: skip
YARN = Yarn(factor=8.0, original_length=256, attention_factor=1.3)
STRETCHED = dataclasses.replace(PLAIN, rope_scaling=YARN)

FLOAT32 = 2**-22
"""A few roundings to 24 bits."""


def frequencies(config):
    return rope.frequencies(config.head_dim, config.rope_theta, config.rope_scaling)


def cos_sin(positions, config, dtype):
    return rope.cos_sin(positions, config.head_dim, config.rope_theta, config.rope_scaling, np.dtype(dtype))


POSITIONS = jnp.array([[0, 1, 2, 7, 100, 1000]], jnp.int32)


def rotated(x, positions, config=PLAIN):
    cos, sin = cos_sin(positions, config, np.float32)
    return np.asarray(rope.rotate(x, cos, sin), np.float64)


def test_frequencies_fall_geometrically_from_one():
    exact = 5000.0 ** -(np.arange(32) / 32)
    np.testing.assert_allclose(frequencies(PLAIN), exact, rtol=FLOAT32)


def test_angles_are_positions_times_frequencies():
    cos, sin = cos_sin(POSITIONS, PLAIN, np.float32)
    angles = np.asarray(POSITIONS, np.float64)[..., None, None] * frequencies(PLAIN).astype(np.float64)
    assert cos.shape == sin.shape == (1, 6, 1, 32)
    # An angle near 1000 is rounded to 24 bits: 1000 * 2**-24.
    np.testing.assert_allclose(cos, np.cos(angles), atol=1000 * 2**-23)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1000 * 2**-23)


def test_the_first_half_is_rotated_into_the_second():
    x = np.random.default_rng(0).normal(size=(1, 6, 2, 64)).astype(np.float32)
    angles = np.asarray(POSITIONS, np.float64)[..., None, None] * frequencies(PLAIN)
    pairs = (x[..., :32] + 1j * x[..., 32:]) * np.exp(1j * angles)
    exact = np.concatenate([pairs.real, pairs.imag], -1)
    np.testing.assert_allclose(rotated(x, POSITIONS), exact, atol=1000 * 2**-22)


def test_position_zero_is_left_as_it_is():
    x = np.random.default_rng(0).normal(size=(1, 1, 2, 64)).astype(np.float32)
    np.testing.assert_array_equal(rotated(x, jnp.zeros((1, 1), jnp.int32)), x)


def test_products_see_only_distances():
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(1, 1, 1, 64)).astype(np.float32) for _ in range(2))

    def product(i, j):
        at = [jnp.full((1, 1), position, jnp.int32) for position in (i, j)]
        return (rotated(q, at[0]) * rotated(k, at[1])).sum()

    assert product(9, 2) == pytest.approx(product(507, 500), abs=64 * 507 * 2**-23)
    assert product(9, 2) != pytest.approx(product(2, 9), abs=1e-2)


def test_bfloat16_rotations_round_cos_sin_and_products():
    cos, sin = cos_sin(POSITIONS, PLAIN, jnp.bfloat16)
    assert cos.dtype == sin.dtype == jnp.bfloat16
    assert rope.rotate(jnp.ones((1, 6, 1, 64), jnp.bfloat16), cos, sin).dtype == jnp.bfloat16


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones():
    ratio = frequencies(STRETCHED) / frequencies(PLAIN)
    turns = YARN.original_length * frequencies(PLAIN) / (2 * math.pi)
    np.testing.assert_allclose(ratio[turns > 2 * YARN.beta_fast], 1.0, rtol=FLOAT32)
    np.testing.assert_allclose(ratio[turns < YARN.beta_slow / 2], 1 / YARN.factor, rtol=FLOAT32)
    assert np.all(np.diff(ratio) <= FLOAT32)
    assert ((ratio > 0.2) & (ratio < 0.9)).any()


def test_yarns_attention_factor_multiplies_cos_and_sin():
    still = dataclasses.replace(STRETCHED, rope_scaling=dataclasses.replace(YARN, attention_factor=1.0))
    for with_factor, without in zip(
        cos_sin(POSITIONS, STRETCHED, np.float32),
        cos_sin(POSITIONS, still, np.float32),
        strict=True,
    ):
        np.testing.assert_allclose(with_factor, np.float32(1.3) * np.asarray(without), rtol=FLOAT32)


def test_a_ramp_without_rounding_lies_between_the_rounded_bounds():
    exact = dataclasses.replace(STRETCHED, rope_scaling=dataclasses.replace(YARN, truncate=False))
    assert not np.array_equal(frequencies(exact), frequencies(STRETCHED))


def test_linear_scaling_is_a_position_divided_by_the_factor():
    linear = dataclasses.replace(PLAIN, rope_scaling=rope.LinearScaling(4.0))
    np.testing.assert_array_equal(frequencies(linear) * 4, frequencies(PLAIN))
    for scaled, plain in zip(
        cos_sin(POSITIONS * 4, linear, np.float32), cos_sin(POSITIONS, PLAIN, np.float32), strict=True
    ):
        np.testing.assert_array_equal(scaled, plain)
