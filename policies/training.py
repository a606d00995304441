"""Training over narrow storage: trainable and frozen parameters, and a guard for optimizers.

NNX modules need none of this: scaled pairs are `Narrow` variables, which `nnx.grad` and `nnx.Optimizer` over
`nnx.Param` skip. These functions are for plain trees and states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax
from flax import nnx

from . import dtypes
from .errors import UnmatchedRule, UnsupportedCast
from .paths import is_scale, scale_path
from .patterns import Pattern
from .trees import is_leaf, map_parameters, parameters, rebox, unbox


def partition(variables: Any, trainable: str | Iterable[str] | Callable[[str], bool] = "**") -> tuple[Any, Any]:
    """`(trainable, frozen)`: the chosen floating-point parameters, and everything else.

    trainable  patterns of paths, or a function of the path; by default all parameters. Scaled pairs, integers and other
               state are frozen whatever it says

    Both halves have the structure of `variables`, with None in place of leaves of the other half, so that gradients and
    optimizers see the trainable leaves only; an `nnx.State` is divided into two states. `combine` joins the halves.

    Raises:
      UnmatchedRule: a pattern that matches none of the parameters that can be trained, and does not end with '?'.

    >>> trainable, frozen = partition({"kernel": jax.numpy.ones((2, 2), "float8_e4m3fn"),
    ...                                      "scale_inv": jax.numpy.ones((1, 1)), "bias": jax.numpy.ones(2)})
    >>> jax.tree.map(lambda x: x.dtype.name, trainable)
    {'bias': 'float32', 'kernel': None, 'scale_inv': None}
    """
    flat = parameters(variables)
    narrow = {path for path in flat if not is_scale(path) and scale_path(path) in flat}
    scales = {scale_path(path) for path in narrow}
    can_train = [path for path, x in flat.items() if _trains(x.dtype) and path not in narrow | scales]
    trained = set(filter(_chosen(trainable, can_train), can_train))
    if isinstance(variables, nnx.State):
        leaves = [("/".join(map(str, keys)) in trained, (keys, leaf)) for keys, leaf in nnx.to_flat_state(variables)]
        inside = nnx.from_flat_state([leaf for is_trained, leaf in leaves if is_trained])
        return inside, nnx.from_flat_state([leaf for is_trained, leaf in leaves if not is_trained])
    mask = map_parameters(lambda path, leaf: rebox(leaf, _Trained()) if path in trained else leaf, variables)
    sides = jax.tree.map(lambda leaf, mark: isinstance(unbox(mark), _Trained), variables, mask, is_leaf=is_leaf)
    inside = jax.tree.map(lambda leaf, side: leaf if side else None, variables, sides, is_leaf=is_leaf)
    return inside, jax.tree.map(lambda leaf, side: None if side else leaf, variables, sides, is_leaf=is_leaf)


def _chosen(trainable: str | Iterable[str] | Callable[[str], bool], paths: list[str]) -> Callable[[str], bool]:
    """The choice as a function of the path."""
    if callable(trainable):
        return trainable
    texts = [trainable] if isinstance(trainable, str) else list(trainable)
    patterns = {text: Pattern.of(text.removesuffix("?")) for text in texts}
    for text, pattern in patterns.items():
        if paths and not text.endswith("?") and not any(map(pattern.matches, paths)):
            raise UnmatchedRule(
                f"{text!r} (trainable) matches none of {len(paths)} trainable parameters, such as {paths[0]}. Correct "
                "the pattern, or end it with '?' if it may match nothing."
            )
    return lambda path: any(pattern.matches(path) for pattern in patterns.values())


def _trains(dtype: Any) -> bool:
    return dtypes.is_floating(dtype) and not dtypes.is_narrow(dtype)


class _Trained:
    """A mark in the place of a leaf."""


def combine(trainable: Any, frozen: Any) -> Any:
    """The variables whose two halves are given; the inverse of `partition`."""
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
                    "perparam.training.partition(variables), or store the parameter as f32."
                )
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        return updates, state

    return optax.GradientTransformation(init, update)
