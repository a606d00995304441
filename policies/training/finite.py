"""Checks of trees for NaN and infinities, and the choice between two trees, leaf by leaf and bit for bit."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ..dtypes import dtype_name
from ..errors import UnsupportedCast, shown

_BITS = {1: jnp.uint8, 2: jnp.uint16}


def all_finite(tree: Any) -> jax.Array:
    """Returns whether no floating-point leaf of a tree has NaN or an infinity, () bool.

    Leaves of other dtypes, such as integers and PRNG keys, count as finite.

    >>> bool(all_finite({"a": jnp.ones(3), "n": 1})), bool(all_finite([jnp.array([1.0, jnp.nan])]))
    (True, False)
    """
    return functools.reduce(jnp.logical_and, map(_finite, jax.tree.leaves(tree)), jnp.asarray(True))


def _finite(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array):
        # In its own dtype: JAX may convert a float64 of numpy to an infinite float32.
        leaf = np.asarray(leaf)
        if leaf.dtype == jax.dtypes.float0:
            return True
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return True
    if isinstance(leaf, np.ndarray):
        with np.errstate(invalid="ignore"):  # which numpy reports for signaling NaN
            return np.isfinite(leaf.astype(np.float32) if leaf.dtype.itemsize < 4 else leaf).all()
    # float8 through float32, which is exact, since XLA does not have the test for all of them.
    wide = leaf.astype(jnp.float32) if leaf.dtype.itemsize == 1 else leaf
    return jnp.isfinite(wide).all()


def select_tree(condition: ArrayLike, on_true: Any, on_false: Any) -> Any:
    """Returns `on_true` where `condition`, () bool, is true, and otherwise `on_false`.

    Both have the same structure, shapes and dtypes; leaves are arrays of any dtype, PRNG keys or numbers. The result
    has the bits of the chosen tree, including those of NaN and of -0.0.

    >>> select_tree(jnp.array(False), {"a": jnp.ones(2)}, {"a": jnp.zeros(2)})["a"].tolist()
    [0.0, 0.0]

    Raises:
      UnsupportedCast: a condition that is not a boolean scalar; trees that differ in structure, shapes or dtypes.
    """
    condition = boolean_scalar("select_tree: condition", condition)
    structures: list[Any] = [jax.tree.structure(tree) for tree in (on_true, on_false)]
    left, right = structures
    if left != right:
        raise UnsupportedCast(
            f"select_tree: the trees differ in structure: {shown(left)} and {shown(right)}. Pass trees of one "
            "structure."
        )
    return jax.tree_util.tree_map_with_path(functools.partial(_select, condition), on_true, on_false)


def _select(condition: jax.Array, keys: Any, left: Any, right: Any) -> Any:
    if getattr(left, "dtype", None) == jax.dtypes.float0:
        return left
    left, right = jnp.asarray(left), jnp.asarray(right)
    if left.dtype != right.dtype or left.shape != right.shape:
        found = [f"{getattr(x.dtype, 'name', x.dtype)} {x.shape}" for x in (left, right)]
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        raise UnsupportedCast(
            f"select_tree: {path or 'the tree'}: {found[0]} and {found[1]} differ. Cast both to one dtype and shape."
        )
    bits = _BITS.get(left.dtype.itemsize) if jnp.issubdtype(left.dtype, jnp.floating) else None
    if bits is None:
        return jnp.where(condition, left, right)
    # XLA's CPU backend computes with 8-bit and 16-bit floats as float32, which may change the bits of NaN.
    left_bits, right_bits = (jax.lax.bitcast_convert_type(x, bits) for x in (left, right))
    return jax.lax.bitcast_convert_type(jnp.where(condition, left_bits, right_bits), left.dtype)


def boolean_scalar(name: str, value: ArrayLike) -> jax.Array:
    """Returns `value` as an array, () bool.

    Raises:
      UnsupportedCast: a value of another shape or dtype.
    """
    array = jnp.asarray(value)
    if array.dtype != bool or array.shape:
        raise UnsupportedCast(
            f"{name}: expected a boolean scalar, found {dtype_name(array.dtype)} {array.shape}. Pass the result of "
            "perparam.training.all_finite(tree), or reduce it with jnp.all."
        )
    return array
