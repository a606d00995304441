"""Rematerialisation by path: submodules whose intermediate values are computed again in the backward pass."""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Iterable
from typing import Any, TypeVar

import jax
from flax import nnx

from ..policies.errors import UnmatchedRule, count
from ..policies.patterns import Pattern
from . import taps
from .plain import is_rematerialised, plain_class

M = TypeVar("M", bound=nnx.Module)


def remat(model: M, paths: str | Iterable[str]) -> M:
    """Returns the model with `jax.checkpoint` around the calls of its submodules with these paths.

    paths  patterns of the paths of modules, such as "layers/*", or "layers/{0..7}/mlp"

    Of the values in such a call, a derivative keeps the arguments only, and computes the others again, by the same
    operations. Projections that share a launch still do, and are computed again together if any of them is. The result
    shares its arrays with `model`, which is not changed, and has the same parameters. Generation and observed values
    (`Decoder.observe`) are as before. Another policy (`with_policy`) leaves it where it is.

    XLA's CPU backend merges the second computation with the first, so that a compiled program takes as much memory as
    without it; its backends for GPUs and TPUs do not.

    >>> from perparam.models import Qwen3, Qwen3Config
    >>> config = Qwen3Config(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=2,
    ...                      num_attention_heads=1, num_key_value_heads=1, head_dim=4)
    >>> type(remat(Qwen3(config, rngs=nnx.Rngs(0)), "layers/*").layers[1]).__name__
    'RematLayer'

    Raises:
      UnmatchedRule: a pattern that matches no module, and no pattern at all.
    """
    changed = nnx.clone(model)
    modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(changed) if path}
    texts = [paths] if isinstance(paths, str) else list(paths)
    if not texts:
        raise UnmatchedRule("remat: found no pattern, so nothing would change. Write 'layers/*', for example.")
    for text in texts:
        pattern = Pattern.of(text)
        matched = [module for path, module in modules.items() if pattern.matches(path) and callable(module)]
        if not matched:
            raise UnmatchedRule(
                f"{text!r} (remat) matches none of {count(len(modules), 'module')}, such as "
                f"{', '.join(list(modules)[:3])}. Write the path of modules that are called, without the names of "
                "their parameters."
            )
        for module in matched:
            module.__class__ = _rematerialised(plain_class(module))
    return changed


def remat_like(model: M, other: nnx.Module) -> M:
    """`model`, with rematerialisation where `other`, a model with the same modules, has it; `model` is changed."""
    modules = dict(nnx.iter_modules(model))
    for path, module in nnx.iter_modules(other):
        if is_rematerialised(module):
            modules[path].__class__ = _rematerialised(plain_class(modules[path]))
    return model


@functools.cache
def _rematerialised(plain: Any) -> Any:
    """The subclass of a module class whose call is rematerialised."""

    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if taps.active():  # which take values out of the function
            return plain.__call__(self, *arguments, **keywords)
        graphdef, state = nnx.split(self)
        paths, variables = zip(*nnx.to_flat_state(state), strict=True)
        leaves, tree = jax.tree.flatten((arguments, keywords))
        is_array = [isinstance(leaf, jax.Array) for leaf in leaves]

        @jax.checkpoint
        def run(values: list[Any], arrays: list[jax.Array]) -> tuple[Any, dict[int, Any]]:
            inside = [variable.replace(value) for variable, value in zip(variables, values, strict=True)]
            module = nnx.merge(graphdef, nnx.from_flat_state(zip(paths, inside, strict=True)))
            rest = iter(arrays)
            both = [next(rest) if array else leaf for leaf, array in zip(leaves, is_array, strict=True)]
            arguments, keywords = jax.tree.unflatten(tree, both)
            result = plain.__call__(module, *arguments, **keywords)
            after = dict(nnx.to_flat_state(nnx.state(module)))
            now = [after[path].get_value() for path in paths]
            return result, {i: value for i, value in enumerate(now) if value is not values[i]}

        values = [variable.get_value() for variable in variables]
        result, changed = run(values, [leaf for leaf, array in zip(leaves, is_array, strict=True) if array])
        for i, value in changed.items():  # such as the counts of random keys and the averages of norms
            variables[i].set_value(value)
        return result

    call.__doc__ = plain.__call__.__doc__
    names = {"__call__": call, "__module__": plain.__module__, "_plain": plain}
    metaclass: Any = type(plain)
    return _metaclass(metaclass)(f"Remat{plain.__name__}", (plain,), names)


@functools.cache
def _metaclass(metaclass: Any) -> Any:
    """A metaclass whose classes are pickled as the class that they rematerialise: they are in no module by name."""
    result = type(f"Remat{metaclass.__name__}", (metaclass,), {})
    copyreg.pickle(result, lambda made: (_rematerialised, (made._plain,)))
    return result
