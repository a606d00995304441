"""Rotary position embeddings with YaRN, in transformers' half-split layout and rounding."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from .config import Qwen3Config, Yarn


def frequencies(config: Qwen3Config) -> np.ndarray:
    """The inverse frequencies, radians per position, `(head_dim / 2,)` float32."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    powers = np.float32(config.rope_theta) ** exponents
    plain = np.float32(1.0) / powers
    if config.yarn is None:
        return plain
    kept = 1 - _ramp(config.yarn, config.head_dim, config.rope_theta)
    return np.float32(1.0) / (np.float32(config.yarn.factor) * powers) * (1 - kept) + plain * kept


def _ramp(yarn: Yarn, head_dim: int, theta: float) -> np.ndarray:
    """How far each frequency is interpolated: 0 for fast ones, 1 for slow ones, linear between."""

    def dimension(rotations: float) -> float:
        """The dimension that turns `rotations` times over the trained length."""
        return head_dim * math.log(yarn.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as transformers avoids the division by zero
    return np.clip((np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)


def cos_sin(positions: jax.Array, config: Qwen3Config, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every angle, `(b, t, 1, head_dim / 2)` in `dtype`, computed in float32.

    positions  (b, t) int32
    """
    angles = positions[..., None, None].astype(jnp.float32) * frequencies(config)
    factor = jnp.float32(config.yarn.attention_factor if config.yarn else 1.0)
    return (jnp.cos(angles) * factor).astype(dtype), (jnp.sin(angles) * factor).astype(dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x (b, t, heads, head_dim) with its halves rotated into each other, in x's dtype."""
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
