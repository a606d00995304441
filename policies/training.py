"""Training with narrow parameters: splits a tree into a trainable and a frozen part, and checks optimizer inputs.

These functions are for trees and states.  NNX modules do not need them: scaled pairs are `Narrow` variables, which
`nnx.grad` and `nnx.Optimizer` over `nnx.Param` ignore.
"""

from __future__ import annotations

from typing import Any

import jax
import optax
from flax import nnx

from . import dtypes
from .errors import UnsupportedCast
from .paths import is_scale, scale_path
from .trees import is_leaf, map_parameters, parameters, rebox, unbox


def split_trainable(variables: Any) -> tuple[Any, Any]:
    """Returns `(trainable, frozen)`: the floating-point parameters without scales, and all other leaves.

    Frozen are scaled pairs, integers and other state.  Both trees have the structure of `variables`, with None in place
    of the leaves of the other tree, so that gradients and optimizers see only the trainable leaves.  An `nnx.State` is
    split into two states.  `join_trainable` is the inverse.

    >>> trainable, frozen = split_trainable({"kernel": jax.numpy.ones((2, 2), "float8_e4m3fn"),
    ...                                      "scale_inv": jax.numpy.ones((1, 1)), "bias": jax.numpy.ones(2)})
    >>> jax.tree.map(lambda x: x.dtype.name, trainable)
    {'bias': 'float32', 'kernel': None, 'scale_inv': None}
    """
    flat = parameters(variables)
    narrow = {path for path in flat if not is_scale(path) and scale_path(path) in flat}
    scales = {scale_path(path) for path in narrow}
    paths = {p for p, x in flat.items() if _is_trainable(x.dtype) and p not in narrow | scales}
    if isinstance(variables, nnx.State):
        leaves = [("/".join(map(str, keys)) in paths, (keys, leaf)) for keys, leaf in nnx.to_flat_state(variables)]
        trainable = nnx.from_flat_state([leaf for in_first, leaf in leaves if in_first])
        return trainable, nnx.from_flat_state([leaf for in_first, leaf in leaves if not in_first])
    marked = map_parameters(lambda path, leaf: rebox(leaf, _Trainable()) if path in paths else leaf, variables)
    mask = jax.tree.map(lambda leaf, mark: isinstance(unbox(mark), _Trainable), variables, marked, is_leaf=is_leaf)
    trainable = jax.tree.map(lambda leaf, in_first: leaf if in_first else None, variables, mask, is_leaf=is_leaf)
    frozen = jax.tree.map(lambda leaf, in_first: None if in_first else leaf, variables, mask, is_leaf=is_leaf)
    return trainable, frozen


def _is_trainable(dtype: Any) -> bool:
    return dtypes.is_floating(dtype) and not dtypes.is_narrow(dtype)


class _Trainable:
    """A marker that replaces a trainable leaf."""


def join_trainable(trainable: Any, frozen: Any) -> Any:
    """Returns the variables that `split_trainable` split into `trainable` and `frozen`."""
    if isinstance(trainable, nnx.State):
        return nnx.merge_state(trainable, frozen)
    return jax.tree.map(
        lambda left, right: right if left is None else left,
        trainable,
        frozen,
        is_leaf=lambda leaf: leaf is None or is_leaf(leaf),
    )


def refuse_narrow() -> optax.GradientTransformation:
    """Returns an identity transformation whose `init` raises an error for narrow leaves; put it first in `optax.chain`.

    `optax.adam` would give float8 parameters float8 moments, in which small updates are rounded away.

    Raises:
      UnsupportedCast: from `init`, with the path of the leaf.
    """

    def init(params: Any) -> optax.EmptyState:
        for path, leaf in parameters(params).items():
            if dtypes.is_narrow(leaf.dtype):
                raise UnsupportedCast(
                    f"{path}: {dtypes.dtype_name(leaf.dtype)} {leaf.shape} cannot be trained: its moments would be "
                    "narrow, and updates smaller than half a step would be lost. Initialise the optimizer with the "
                    "first result of perparam.split_trainable(variables), or store the parameter as f32."
                )
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        return updates, state

    return optax.GradientTransformation(init, update)
