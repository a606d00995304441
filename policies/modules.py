"""Modules: rebuilds NNX modules around stored variables, and checks what a policy asks of a module."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import nnx

from . import dtypes
from .errors import UnmatchedRule, UnsupportedCast
from .rules import PolicyRules


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
    function, _, bound = _unwrapped(module)
    return "policy" not in bound and "policy" in inspect.signature(function).parameters


def _unwrapped(module: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Returns the function that a callable calls, and the arguments that it binds."""
    args, kwargs = tuple[Any, ...](), dict[str, Any]()
    while isinstance(module, functools.partial):
        args, kwargs = (*module.args, *args), {**module.keywords, **kwargs}
        module = module.func
    # For an NNX class, inspect shows only the `*args, **kwargs` of its metaclass.
    return (module.__init__, (None, *args), kwargs) if inspect.isclass(module) else (module, args, kwargs)


def check_callable(module: Any) -> None:
    """Raises UnsupportedCast unless `module` is a callable `module(rngs=rngs)`, with or without `policy=`."""
    function = module
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", type(function).__name__)
    is_class = inspect.isclass(function)
    if is_class and issubclass(function, nn.Module):
        raise UnsupportedCast(f"{name} is a class of Linen, expected a module. Pass {name}(…) with its arguments.")
    is_tree = not jax.tree_util.all_leaves([function])  # as modules of other libraries are
    if not callable(module) or is_tree or (is_class and not issubclass(function, nnx.Module)):
        raise _unsupported(name)
    function, args, kwargs = _unwrapped(module)
    policy = {"policy": None} if takes_policy(module) else {}
    try:
        inspect.signature(function).bind(*args, **{**kwargs, "rngs": None, **policy})
    except TypeError as error:
        call = f"module(rngs=rngs{', policy=policy' if policy else ''})"
        raise UnsupportedCast(
            f"{name} cannot be called as {call}: {error}. Write lambda rngs: …, or bind the other arguments with "
            "functools.partial."
        ) from error


def build(module: Callable[..., Any], **arguments: Any) -> nnx.Module:
    """Returns the NNX module that `module` makes.

    Raises:
      UnsupportedCast: if the result is not an NNX module.
    """
    built = module(**arguments)
    if not isinstance(built, nnx.Module):
        raise _unsupported(f"{getattr(module, '__name__', 'module')}, which returns {type(built).__name__},")
    return built


def _unsupported(name: str) -> UnsupportedCast:
    return UnsupportedCast(
        f"{name} is neither a Linen module nor a callable that returns an NNX module. Modules of other libraries and "
        "trees of arrays are stored with policy.store(tree); call policy.to_compute(tree) in the compiled function."
    )


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


def refuse_kv_cache(policy: PolicyRules, module: Any) -> None:
    """Raises UnmatchedRule for `kv_cache` and a module that has no keys and values."""
    if policy.kv_cache is not None:
        raise UnmatchedRule(
            f"kv_cache: {dtypes.dtype_name(policy.kv_cache)} has no effect on {type(module).__name__}: only perparam's "
            "models have such a cache. Use policy.replace(kv_cache=None)."
        )


def activations_of(policy: PolicyRules, inputs: Any) -> np.dtype:
    """Returns the dtype of activations: the policy's, or else that of the first floating-point input, or float32."""
    if policy.activations is not None:
        return policy.activations
    floats = [
        leaf.dtype for leaf in jax.tree.leaves(inputs) if hasattr(leaf, "dtype") and dtypes.is_floating(leaf.dtype)
    ]
    return np.dtype(jax.dtypes.canonicalize_dtype(floats[0]) if floats else np.float32)
