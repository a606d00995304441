"""Training with narrow parameters: splits a tree into a trainable and a frozen part, and checks optimizer inputs.

These functions are for trees and states.  NNX modules do not need them: scaled pairs are `Narrow` variables, which
`nnx.grad` and `nnx.Optimizer` over `nnx.Param` ignore.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax
from flax import nnx

from .. import dtypes
from ..errors import UnmatchedRule, UnsupportedCast, count
from ..paths import is_scale, scale_path
from ..patterns import Pattern
from ..trees import is_leaf, map_parameters, parameters, rebox, unbox

Trainable = str | Iterable[str] | Callable[[str], bool]
"""Patterns of paths, or a function of the path."""


def partition(variables: Any, trainable: Trainable = "**") -> tuple[Any, Any]:
    """Returns `(trainable, frozen)`: the chosen floating-point parameters, and all other leaves.

    trainable  patterns of paths, or a function of the path; by default all parameters. Scaled pairs, integers and other
               state are always frozen

    Both halves have the structure of `variables`, with None in place of leaves of the other half, so that gradients and
    optimizers see the trainable leaves only; an `nnx.State` is divided into two states. `combine` joins the halves.

    Raises:
      UnmatchedRule: a pattern that matches none of the parameters that can be trained, and does not end with '?'.

    >>> trainable, frozen = partition({"kernel": jax.numpy.ones((2, 2), "float8_e4m3fn"),
    ...                                 "scale_inv": jax.numpy.ones((1, 1)), "bias": jax.numpy.ones(2)})
    >>> jax.tree.map(lambda x: x.dtype.name, trainable)
    {'bias': 'float32', 'kernel': None, 'scale_inv': None}
    """
    flat = parameters(variables)
    narrow = {path for path in flat if not is_scale(path) and scale_path(path) in flat}
    scales = {scale_path(path) for path in narrow}
    can_train = [path for path, x in flat.items() if _is_trainable(x.dtype) and path not in narrow | scales]
    paths = set(filter(choice(trainable, can_train), can_train))
    if isinstance(variables, nnx.State):
        leaves = [("/".join(map(str, keys)) in paths, (keys, leaf)) for keys, leaf in nnx.to_flat_state(variables)]
        first = nnx.from_flat_state([leaf for in_first, leaf in leaves if in_first])
        return first, nnx.from_flat_state([leaf for in_first, leaf in leaves if not in_first])
    marked = map_parameters(lambda path, leaf: rebox(leaf, _Trainable()) if path in paths else leaf, variables)
    mask = jax.tree.map(lambda leaf, mark: isinstance(unbox(mark), _Trainable), variables, marked, is_leaf=is_leaf)
    first = jax.tree.map(lambda leaf, in_first: leaf if in_first else None, variables, mask, is_leaf=is_leaf)
    return first, jax.tree.map(lambda leaf, in_first: None if in_first else leaf, variables, mask, is_leaf=is_leaf)


def choice(trainable: Trainable, paths: list[str]) -> Callable[[str], bool]:
    """Returns whether a parameter is trained, as a function of its path.

    trainable  patterns of paths, or such a function
    paths      the paths of the parameters that can be trained

    Raises:
      UnmatchedRule: a pattern that matches none of `paths`, and does not end with '?'.
    """
    if callable(trainable):
        return trainable
    texts = [trainable] if isinstance(trainable, str) else list(trainable)
    patterns = {text: Pattern.of(text.removesuffix("?")) for text in texts}
    for text, pattern in patterns.items():
        if paths and not text.endswith("?") and not any(map(pattern.matches, paths)):
            raise UnmatchedRule(
                f"{text!r} (trainable) matches none of {count(len(paths), 'trainable parameter')}, such as {paths[0]}. "
                "Correct the pattern, or end it with '?' if it may match nothing."
            )
    return lambda path: any(pattern.matches(path) for pattern in patterns.values())


def _is_trainable(dtype: Any) -> bool:
    return dtypes.is_floating(dtype) and not dtypes.is_narrow(dtype)


class _Trainable:
    """A marker that replaces a trainable leaf."""


def combine(trainable: Any, frozen: Any) -> Any:
    """Returns the variables that `partition` divided into `trainable` and `frozen`."""
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
                    "first result of perparam.training.partition(variables), or store the parameter as f32."
                )
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        return updates, state

    return optax.GradientTransformation(init, update)
