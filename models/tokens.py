"""Checks of the token ids and masks that callers pass."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from ..policies.errors import InvalidTokens, shown
from ..policies.hosts import on_host


def checked_tokens(
    input_ids: ArrayLike, attention_mask: ArrayLike | None, vocabulary: int
) -> tuple[jax.Array, jax.Array]:
    """`(ids, mask)`, both (batch, length), int32 and bool; the ids of padding are 0, whatever they were.

    input_ids       (batch, length) integers
    attention_mask  (batch, length) booleans or integers, nonzero for real tokens, or floats that are 0 or 1; None: all
                    are real

    Raises:
      InvalidTokens: shapes or dtypes that do not fit; ids of real tokens outside the vocabulary, and floats other than
        0 and 1, except under jit.
    """
    ids = _array("input_ids", input_ids)
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise InvalidTokens(f"input_ids: expected integers of shape (batch, length), found {ids.dtype} {ids.shape}.")
    mask = np.ones(ids.shape, bool) if attention_mask is None else _mask(_array("attention_mask", attention_mask))
    if mask.shape != ids.shape:
        raise InvalidTokens(f"attention_mask: expected the shape of input_ids, {ids.shape}, found {mask.shape}.")
    if not isinstance(ids, jax.core.Tracer) and not isinstance(mask, jax.core.Tracer):
        outside = mask & ((ids < 0) | (ids >= vocabulary))
        if outside.any():
            row, column = (int(i) for i in np.argwhere(outside)[0])
            raise InvalidTokens(
                f"input_ids[{row}, {column}] is {ids[row, column]}, outside the vocabulary of {vocabulary}. "
                "Use the tokenizer that belongs to the checkpoint."
            )
        # In numpy: JAX would compile a program for every new shape.
        return jnp.asarray(np.where(mask, ids, 0).astype(np.int32)), jnp.asarray(mask)
    mask = jnp.asarray(mask)
    return jnp.where(mask, jnp.asarray(ids, jnp.int32), 0), mask


def padding_last(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`(order, back)`, both (b, t) int32: the real tokens of each row first, in their order, and the inverse.

    For `jnp.take_along_axis`; mask (b, t) bool, True for real tokens.

    >>> order, back = padding_last(jnp.array([[False, True, False, True]]))
    >>> order.tolist(), jnp.take_along_axis(order, back, axis=1).tolist()
    ([[1, 3, 0, 2]], [[0, 1, 2, 3]])
    """
    order = jnp.argsort(~mask, axis=1, stable=True)
    return order, jnp.argsort(order, axis=1)


def integers(name: str, values: ArrayLike) -> Any:
    """`values` as an array of integers: a traced array as it is, anything else in numpy.

    Raises:
      InvalidTokens: values that are not integers, or rows of different length.
    """
    array = _array(name, values)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise InvalidTokens(f"{name}: expected integers, found {array.dtype} {array.shape}.")
    return array


def _mask(values: Any) -> Any:
    """`values` as booleans, (batch, length)."""
    floating = jnp.issubdtype(values.dtype, jnp.floating)
    if not (values.dtype == bool or jnp.issubdtype(values.dtype, jnp.integer) or floating):
        raise InvalidTokens(
            f"attention_mask: expected booleans or integers, nonzero for real tokens, found {values.dtype.name}."
        )
    # A mask that is added to scores has 0 for real tokens.
    if floating and not isinstance(values, jax.core.Tracer):
        other = values[(values != 0) & (values != 1)]
        if other.size:
            raise InvalidTokens(
                f"attention_mask: expected 1 for real tokens and 0 for others, found {other[0]}. Pass booleans or "
                "integers."
            )
    return values.astype(bool)


def _array(name: str, values: ArrayLike) -> Any:
    """A traced array as it is, anything else in numpy."""
    if isinstance(values, jax.core.Tracer):
        return values
    try:
        return on_host(values)
    except (ValueError, OverflowError) as error:
        raise InvalidTokens(
            f"{name}: found rows of different length. Pad them, and mark the real tokens in attention_mask."
        ) from error
    except TypeError as error:
        raise InvalidTokens(f"{name}: expected an array of numbers, found {shown(values)}.") from error
