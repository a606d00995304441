"""Random keys of the rows of a batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...policies.errors import InvalidSampling, shown


def row_keys(key: Any, rows: int, num_return_sequences: int = 1) -> jax.Array:
    """A random key for each answer, (rows * num_return_sequences,), the answers to a prompt one after the other.

    key  an integer or a JAX key: rows and answers differ; or one of them for each row: the answers to a row do not
         depend on the batch it is in.  Integers count modulo 2**32.  A uint32 `jax.Array` whose last axis is 2 is a raw
         key, as in `jax.random`; other raw keys need `jax.random.wrap_key_data`

    Raises:
      InvalidSampling: any other value.
    """
    base, one_for_all = _base_keys(key, rows)
    if one_for_all:
        base = jax.vmap(jax.random.fold_in, (None, 0))(base, jnp.arange(rows, dtype=jnp.uint32))
    answers = jnp.arange(num_return_sequences, dtype=jnp.uint32)
    each = jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(answers))
    return each(base).reshape(rows * num_return_sequences)


def _base_keys(key: Any, rows: int) -> tuple[jax.Array, bool]:
    """`(keys, one_for_all)`: keys of shape () or (rows,), and whether it is one key for all rows."""
    if isinstance(key, (list, tuple)) and key and all(isinstance(each, jax.Array) for each in key):
        key = jnp.stack(key)
    if isinstance(key, jax.Array) and key.dtype == jnp.uint32 and key.shape[-1:] == (2,):
        key = jax.random.wrap_key_data(key)
    if isinstance(key, jax.Array) and jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        keys, shape = key, key.shape
    else:
        try:
            seeds = np.asarray(key)
        except (TypeError, ValueError):  # integers and keys, or rows of different length
            raise _invalid_key(key, rows) from None
        if not np.issubdtype(seeds.dtype, np.integer):
            raise _invalid_key(key, rows)
        shape = seeds.shape
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds.reshape(-1).astype(np.uint32))).reshape(shape)
    if shape not in ((), (rows,)):
        raise _invalid_key(key, rows)
    return keys, shape == ()


def _invalid_key(key: Any, rows: int) -> InvalidSampling:
    return InvalidSampling(
        f"key: expected an integer or a JAX key, or one for each of {rows} {'row' if rows == 1 else 'rows'}, "
        f"found {shown(key)}."
    )
