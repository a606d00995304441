"""Rebuilding NNX modules around variables that are stored already."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from .errors import UnsupportedCast


def _tags(variables: nnx.State[Any, Any]) -> set[str]:
    """The names of the random streams that a module kept."""
    return {leaf.tag for _, leaf in nnx.to_flat_state(variables) if isinstance(leaf, nnx.RngKey)}


def streams(variables: nnx.State[Any, Any]) -> nnx.Rngs:
    """Streams to rebuild a module with: those it kept, and a default one if parameters could not be drawn from them."""
    names = _tags(variables)
    return nnx.Rngs(**dict.fromkeys(sorted(names if names & {"default", "params"} else names | {"default"}), 0))


def reseeded(rngs: Mapping[str, Any], variables: nnx.State[Any, Any]) -> dict[str, Any]:
    """`rngs` by the streams that a module has: one it does not have stands for its default stream, as in `nnx.Rngs`."""
    tags = _tags(variables)
    known = {name: key for name, key in rngs.items() if name in tags}
    for name, key in rngs.items():
        if name not in tags and name != "params" and tags:
            if "default" not in tags or "default" in known:
                raise UnsupportedCast(
                    f"rngs: {name!r} is no stream of the module, which has {', '.join(sorted(tags))}. "
                    "Name one of these."
                )
            known["default"] = key
    return known


def takes_policy(module: Callable[..., Any]) -> bool:
    """Whether `module` is called with `policy=`."""
    while isinstance(module, functools.partial):
        if "policy" in module.keywords:
            return False
        module = module.func
    # Of an NNX class, inspect sees only the `*args, **kwargs` of its metaclass.
    return "policy" in inspect.signature(module.__init__ if inspect.isclass(module) else module).parameters


def fill(model: nnx.Module, variables: Mapping[str, Any]) -> Any:
    """`model`, which may be abstract, with the arrays of `variables`, by path; types and metadata stay the model's.

    Raises:
      UnsupportedCast: where the two do not have the same variables.
    """
    graphdef, state = nnx.split(model)
    flat = [("/".join(map(str, keys)), keys, leaf) for keys, leaf in nnx.to_flat_state(state)]
    wanted = {path for path, _, leaf in flat if isinstance(leaf, nnx.Variable)}
    if wanted != variables.keys():
        missing, extra = sorted(wanted - variables.keys()), sorted(variables.keys() - wanted)
        raise UnsupportedCast(
            f"the variables are not those of the module: it lacks {missing[:5]}, and does not have {extra[:5]}. "
            "Give what init returned for the same module and policy."
        )
    leaves = [(keys, leaf.replace(variables[path]) if path in wanted else leaf) for path, keys, leaf in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))
