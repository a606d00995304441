"""Activations quantised as they come: one scale a row and 128 columns, as `activation_scheme: dynamic` means."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from .. import dtypes
from ..blocks import expand, quantize

ACTIVATION_BLOCK = 128
"""Columns of a row of activations that share a scale."""


def quantize_rows(x: jax.Array, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    """`(values, scales)` of x: `quantize` in blocks of (1, 128).

    x       (rows, in)  f32, bf16 or f16
    values  (rows, in)  dtype, a float8 type
    scales  (rows, ceil(in/128))  float32
    """

    def exactly(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return quantize(x, dtype, (1, ACTIVATION_BLOCK))

    def in_one_pass(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The same without `quantize`'s barriers, which are there for CPUs: one reduction and what follows it."""
        columns = x.shape[1]
        wide = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -columns % ACTIVATION_BLOCK)))
        blocks = wide.reshape(x.shape[0], wide.shape[1] // ACTIVATION_BLOCK, ACTIVATION_BLOCK)
        amax = jnp.max(jnp.abs(blocks), axis=-1)
        floor = dtypes.smallest_normal(np.float32)
        scales = jnp.where(amax == 0, 1.0, jnp.maximum(amax / dtypes.largest(dtype), floor))
        values = dtypes.saturating_cast(blocks / scales[..., None], dtype)
        return values.reshape(wide.shape)[:, :columns], scales

    return jax.lax.platform_dependent(x, cpu=exactly, default=in_one_pass)


def widen_rows(values: jax.Array, scales: jax.Array) -> jax.Array:
    """What quantised rows stand for, (rows, in) float32."""
    return values.astype(jnp.float32) * expand(scales, values.shape, (1, ACTIVATION_BLOCK))
