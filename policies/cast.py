"""Casts that keep the structure of a tree: by path for parameters, to one dtype for inputs and outputs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from . import dtypes
from .decisions import decide
from .errors import InvalidPolicy, UnsupportedCast
from .paths import is_scale, scale_path
from .rules import PolicyRules, Rule
from .scaled_array import ScaledArray
from .trees import check_array, map_parameters, parameters, rebox, unbox


def cast(policy: PolicyRules, tree: Any, slot: str, path: str | None = None) -> Any:
    """Returns `tree` with its parameters cast; see `Policy.cast`."""
    if slot not in ("params", "compute"):
        raise InvalidPolicy(
            f"cast to slot {slot!r}: expected 'params' or 'compute'. Use cast_output for the results of a model."
        )
    if path is not None:
        rule = policy.slot(slot).rule(path)
        tree = jnp.asarray(tree) if isinstance(tree, (int, float)) else tree
        return rebox(tree, _cast_leaf(path, unbox(tree), rule, slot, paired=is_scale(path)))
    flat = parameters(tree)
    rules = decide(slot, policy.slot(slot), flat)

    def visit(path: str, leaf: Any) -> Any:
        paired = is_scale(path) or scale_path(path) in flat
        return rebox(leaf, _cast_leaf(path, unbox(leaf), rules[path], slot, paired))

    return map_parameters(visit, tree)


def _cast_leaf(path: str, value: Any, rule: Rule | None, slot: str, paired: bool) -> Any:
    """Returns one parameter cast as `rule` says; `paired` parameters (values with scales, or scales) are unchanged."""
    if rule is None or rule.format is None or paired or isinstance(value, ScaledArray):
        return value
    dtype = rule.format.values
    check_array(path, value)
    if not dtypes.is_floating(value.dtype) or value.dtype == dtype:
        return value
    if rule.format.narrow:
        raise UnsupportedCast(
            f"{path}: a plain {dtypes.dtype_name(np.dtype(value.dtype))} array cannot be cast to "
            f"{dtypes.dtype_name(dtype)} ({slot}, rule {rule.key!r}) without scales, which a cast cannot add. "
            "Use policy.store(tree), perparam.init or perparam.quantize."
        )
    if dtypes.is_narrow(value.dtype):
        raise UnsupportedCast(
            f"{path}: a {dtypes.dtype_name(np.dtype(value.dtype))} array cannot be cast without its scales. "
            f"Add {scale_path(path)!r} to the tree."
        )
    return dtypes.saturating_cast(value, dtype)


def cast_floats(tree: Any, dtype: np.dtype) -> Any:
    """Returns `tree` with every floating-point array cast to `dtype` without saturation: overflow becomes infinity.

    NNX objects in the tree, such as `nnx.Rngs`, are returned themselves: a copy would count its random numbers apart.
    """

    def visit(leaf: Any) -> Any:
        floating = isinstance(leaf, (jax.Array, np.ndarray, np.generic)) and dtypes.is_floating(leaf.dtype)
        return jnp.asarray(leaf, dtype) if floating else leaf

    return jax.tree.map(visit, tree, is_leaf=lambda node: isinstance(node, (nnx.Pytree, nnx.Variable)))
