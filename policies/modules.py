"""Rebuilds NNX modules around stored variables."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from .errors import UnsupportedCast


def _tags(variables: nnx.State[Any, Any]) -> set[str]:
    """Returns the names of the random streams in the state of a module."""
    return {leaf.tag for _, leaf in nnx.to_flat_state(variables) if isinstance(leaf, nnx.RngKey)}


def streams(variables: nnx.State[Any, Any]) -> nnx.Rngs:
    """Returns random streams to rebuild a module with: those in its state.

    A stream `default` is added where the state has neither `default` nor `params`, from which parameters are drawn.
    """
    names = _tags(variables)
    return nnx.Rngs(**dict.fromkeys(sorted(names if names & {"default", "params"} else names | {"default"}), 0))


def reseeded(rngs: Mapping[str, Any], variables: nnx.State[Any, Any]) -> dict[str, Any]:
    """Returns the keys of `rngs` by the streams of a module.

    As in `nnx.Rngs`, the default stream stands in for a stream that the module does not have.

    Raises:
      UnsupportedCast: for a stream that the module does not have, if there is no default stream to stand in for it.
    """
    tags = _tags(variables)
    by_stream = {name: key for name, key in rngs.items() if name in tags}
    for name, key in rngs.items():
        if name not in tags and name != "params" and tags:
            if "default" not in tags or "default" in by_stream:
                raise UnsupportedCast(
                    f"rngs: the module has no stream {name!r}, only {', '.join(sorted(tags))}. Use one of these."
                )
            by_stream["default"] = key
    return by_stream


def takes_policy(module: Callable[..., Any]) -> bool:
    """Returns whether `module` has a parameter `policy` that is not bound by a partial."""
    while isinstance(module, functools.partial):
        if "policy" in module.keywords:
            return False
        module = module.func
    # For an NNX class, inspect shows only the `*args, **kwargs` of its metaclass.
    return "policy" in inspect.signature(module.__init__ if inspect.isclass(module) else module).parameters


def fill(model: nnx.Module, variables: Mapping[str, Any]) -> Any:
    """Returns `model`, which may be abstract, with the arrays of `variables`, by path.

    Types and metadata of the variables are those of `model`.

    Raises:
      UnsupportedCast: if `model` and `variables` do not have the same paths.
    """
    graphdef, state = nnx.split(model)
    flat = [("/".join(map(str, keys)), keys, leaf) for keys, leaf in nnx.to_flat_state(state)]
    expected = {path for path, _, leaf in flat if isinstance(leaf, nnx.Variable)}
    if expected != variables.keys():
        missing, extra = sorted(expected - variables.keys()), sorted(variables.keys() - expected)
        raise UnsupportedCast(
            f"the variables are not those of the module: missing {missing[:5]}, unexpected {extra[:5]}. "
            "Pass the variables that init returned for the same module and policy."
        )
    leaves = [(keys, leaf.replace(variables[path]) if path in expected else leaf) for path, keys, leaf in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))
