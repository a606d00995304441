"""Rotary position embeddings and their scaling rules, in transformers' half-split layout and rounding."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np


class RopeScaling(Protocol):
    """A rule that stretches rotary embeddings to longer contexts than a model was trained with."""

    @property
    def attention_factor(self) -> float:
        """The number that cos and sin are multiplied by."""
        ...

    def frequencies(self, powers: np.ndarray, theta: float) -> np.ndarray:
        """Inverse frequencies, radians per position, float32.

        powers  (head_dim / 2,) float32, the unscaled wavelengths over 2π: `theta ** (2 i / head_dim)`
        """
        ...


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN's settings (Peng et al. 2023, https://arxiv.org/abs/2309.00071), as transformers reads them.

    factor            by how much the context is stretched
    original_length   positions the model was trained with
    attention_factor  multiplies cos and sin; `0.1 ln(factor) + 1` where the config names none
    beta_fast         rotations over the trained length above which a frequency stays unscaled
    beta_slow         rotations below which it is divided by `factor`
    truncate          whether the bounds of the ramp between the two are rounded outwards to whole dimensions
    """

    factor: float
    original_length: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def frequencies(self, powers: np.ndarray, theta: float) -> np.ndarray:
        """Inverse frequencies, divided by `factor` where they are slow; see `RopeScaling`."""
        unscaled = 1 - self._ramp(2 * len(powers), theta)
        scaled = np.float32(1.0) / (np.float32(self.factor) * powers)
        return scaled * (1 - unscaled) + np.float32(1.0) / powers * unscaled

    def _ramp(self, head_dim: int, theta: float) -> np.ndarray:
        """The share of each frequency that is scaled: 0 for fast ones, 1 for slow ones, linear between."""

        def dimension(rotations: float) -> float:
            """The dimension that turns `rotations` times over the trained length."""
            return head_dim * math.log(self.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001  # transformers avoids the division by zero in the same way
        return np.clip((np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Every frequency divided by `factor` (Chen et al. 2023, https://arxiv.org/abs/2306.15595)."""

    factor: float
    attention_factor: float = dataclasses.field(default=1.0, init=False)

    def frequencies(self, powers: np.ndarray, theta: float) -> np.ndarray:
        """Inverse frequencies; see `RopeScaling`."""
        return np.float32(1.0) / powers / np.float32(self.factor)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's settings, as transformers reads them.

    factor            divisor of frequencies whose wavelength is above `original_length / low_freq_factor`
    low_freq_factor   see `factor`
    high_freq_factor  wavelengths below `original_length / high_freq_factor` stay unscaled; between, a linear mixture
    original_length   positions the model was trained with
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int
    attention_factor: float = dataclasses.field(default=1.0, init=False)

    def frequencies(self, powers: np.ndarray, theta: float) -> np.ndarray:
        """Inverse frequencies, divided by `factor` where they are slow; see `RopeScaling`."""
        low, high, factor = map(np.float32, (self.low_freq_factor, self.high_freq_factor, self.factor))
        unscaled = np.float32(1.0) / powers
        rotations = np.float32(self.original_length) * unscaled / np.float32(2 * math.pi)
        share = np.clip((rotations - low) / (high - low), 0, 1)
        return (1 - share) * unscaled / factor + share * unscaled


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Inverse frequencies of the rotations, radians per position, `(head_dim / 2,)` float32."""
    powers = np.float32(theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    return np.float32(1.0) / powers if scaling is None else scaling.frequencies(powers, theta)


def cos_sin(
    positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None, dtype: np.dtype
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every rotation angle, each `(b, t, 1, head_dim / 2)` in `dtype`, computed in float32.

    positions  (b, t) int32
    """
    angles = positions[..., None, None].astype(jnp.float32) * frequencies(head_dim, theta, scaling)
    factor = jnp.float32(1.0 if scaling is None else scaling.attention_factor)
    return (jnp.cos(angles) * factor).astype(dtype), (jnp.sin(angles) * factor).astype(dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x (b, t, heads, head_dim) with its two halves rotated by the angles, in x's dtype."""
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
