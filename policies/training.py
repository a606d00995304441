"""Training over narrow storage: what is trained, what is frozen, and a guard for optimizers.

NNX needs none of this: narrow pairs are `Narrow` variables, and `nnx.grad` and `nnx.Optimizer` over `nnx.Param` pass
them by.  These functions are for plain trees and states.
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
    """`(trainable, frozen)`: the floating-point parameters, and all the rest: scaled pairs, integers, other state.

    Both have the structure of `variables`, with None where the other holds the leaf, so that gradients and optimizers
    see the trainable leaves alone; an `nnx.State` is divided into two states.  `join_trainable` puts them together.

    >>> trainable, frozen = split_trainable({"kernel": jax.numpy.ones((2, 2), "float8_e4m3fn"),
    ...                                      "scale_inv": jax.numpy.ones((1, 1)), "bias": jax.numpy.ones(2)})
    >>> jax.tree.map(lambda x: x.dtype.name, trainable)
    {'bias': 'float32', 'kernel': None, 'scale_inv': None}
    """
    flat = parameters(variables)
    narrow = {path for path in flat if not is_scale(path) and scale_path(path) in flat}
    scales = {scale_path(path) for path in narrow}
    trained = {p for p, x in flat.items() if _trains(x.dtype) and p not in narrow | scales}
    if isinstance(variables, nnx.State):
        leaves = [("/".join(map(str, keys)) in trained, (keys, leaf)) for keys, leaf in nnx.to_flat_state(variables)]
        inside = nnx.from_flat_state([leaf for is_trained, leaf in leaves if is_trained])
        return inside, nnx.from_flat_state([leaf for is_trained, leaf in leaves if not is_trained])
    mask = map_parameters(lambda path, leaf: rebox(leaf, _Trained()) if path in trained else leaf, variables)
    sides = jax.tree.map(lambda leaf, mark: isinstance(unbox(mark), _Trained), variables, mask, is_leaf=is_leaf)
    trainable = jax.tree.map(lambda leaf, side: leaf if side else None, variables, sides, is_leaf=is_leaf)
    frozen = jax.tree.map(lambda leaf, side: None if side else leaf, variables, sides, is_leaf=is_leaf)
    return trainable, frozen


def _trains(dtype: Any) -> bool:
    return dtypes.is_floating(dtype) and not dtypes.is_narrow(dtype)


class _Trained:
    """A mark in the place of a leaf."""


def join_trainable(trainable: Any, frozen: Any) -> Any:
    """The variables whose two halves `split_trainable` gave."""
    if isinstance(trainable, nnx.State):
        return nnx.merge_state(trainable, frozen)
    return jax.tree.map(
        lambda left, right: right if left is None else left,
        trainable,
        frozen,
        is_leaf=lambda leaf: leaf is None or is_leaf(leaf),
    )


def refuse_narrow() -> optax.GradientTransformation:
    """A transform that changes nothing and refuses to be initialised with a narrow leaf; put it first in `optax.chain`.

    `optax.adam` over float8 parameters would keep float8 moments, which round every step away.

    Raises:
      UnsupportedCast: from `init`, with the path of the leaf.
    """

    def init(params: Any) -> optax.EmptyState:
        for path, leaf in parameters(params).items():
            if dtypes.is_narrow(leaf.dtype):
                raise UnsupportedCast(
                    f"{path}: {dtypes.dtype_name(leaf.dtype)} {leaf.shape} cannot be trained: its moments would be "
                    "narrow, and an update smaller than half a step is lost. Give the optimizer the first half of "
                    "perparam.split_trainable(variables), or store the parameter as f32."
                )
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        return updates, state

    return optax.GradientTransformation(init, update)
