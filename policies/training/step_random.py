"""The random numbers of one step of `with_policy`, and rounding with them or to nearest."""

from __future__ import annotations

import zlib

import jax
import numpy as np

from .. import dtypes
from .rounding import stochastic_cast


class StepRandom:
    """The random keys of one step: `fold_in(fold_in(key(seed), step), crc32(path of the parameter))`."""

    def __init__(self, seed: int, step: jax.Array):
        self._key = jax.random.fold_in(jax.random.key(seed), step)

    def key(self, path: str, state: int = 0) -> jax.Array:
        """Returns the key for a parameter, or with `state` the one for an array of its state, counted from 1."""
        key = jax.random.fold_in(self._key, np.uint32(zlib.crc32(path.encode())))
        return jax.random.fold_in(key, state) if state else key


def key_of(random: StepRandom | None, path: str, state: int = 0) -> jax.Array | None:
    """Returns the key as `StepRandom.key` does; None without random numbers."""
    return None if random is None else random.key(path, state)


def rounded(values: jax.Array, dtype: np.dtype, key: jax.Array | None) -> jax.Array:
    """Returns `values` in `dtype`, rounded stochastically with a key, and to nearest without one or to 4 bytes."""
    if key is None or values.dtype == dtype or dtype.itemsize >= 4:
        return dtypes.saturating_cast(values, dtype)
    drawn: jax.Array = stochastic_cast(values, dtype, key)
    return drawn
