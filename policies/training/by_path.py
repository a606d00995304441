"""Choices of parameters by path for training: filters for NNX, masks and labels for optax.

Patterns are those of policies: a bare name, or a path from the root with `*`, `**`, `{a,b}` and `{0..5}`.  They are
strict as well: a pattern without effect is an error, unless it ends with `?`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import optax
from flax import nnx

from ..errors import ShadowedRule, UnmatchedRule, count
from ..paths import is_scale, scale_path
from ..patterns import Pattern
from ..trees import is_leaf, path_of
from .partition import partition

Patterns = str | Iterable[str]


@dataclasses.dataclass(frozen=True)
class ByPath:
    """An NNX filter of the variables at `paths`; a value, so that optimizers with equal filters are equal."""

    paths: frozenset[str]

    def __call__(self, path: tuple[Any, ...], _: Any) -> bool:
        """Returns whether the variable at `path` is one of them."""
        return "/".join(map(str, path)) in self.paths


def trainable(module: nnx.Module, patterns: Patterns = "**") -> ByPath:
    """Returns an NNX filter of the parameters of `module` to train, for `wrt=` and `nnx.DiffState`.

    patterns  of paths. Scaled pairs are frozen, and so is what is no parameter, as in `partition`

    The filter is for `module` itself, of which it has the paths, and for modules with the same ones.

    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 1, rngs=nnx.Rngs(0)))
    >>> last = trainable(model, "layers/1/*")
    >>> gradient = nnx.grad(lambda model: model(jax.numpy.ones((1, 2))).sum(), argnums=nnx.DiffState(0, last))(model)
    >>> ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(gradient)]
    ['layers/1/bias', 'layers/1/kernel']

    Raises:
      UnmatchedRule: for a pattern that matches none of the parameters that can be trained, and does not end with '?'.
    """
    chosen, _ = partition(nnx.state(module), [patterns] if isinstance(patterns, str) else list(patterns))
    return ByPath(frozenset("/".join(map(str, keys)) for keys, _ in nnx.to_flat_state(chosen)))


def path_mask(patterns: Patterns) -> Callable[[Any], Any]:
    """Returns a function of a tree of parameters that returns booleans: True where the path matches one of `patterns`.

    It is a `mask` for optax, as in `optax.masked` and `optax.adamw(…, mask=…)`, for trees, Linen variables and states.
    Scales have the value of their kernel.

    >>> path_mask("**/kernel")({"dense": {"kernel": jax.numpy.ones((2, 2)), "bias": jax.numpy.ones(2)}})
    {'dense': {'bias': False, 'kernel': True}}

    Raises:
      UnmatchedRule: from the function, for a pattern that matches none of the parameters and does not end with '?'.
    """
    label = path_labels({"True": patterns}, default="False")
    return lambda params: jax.tree.map(lambda name: name == "True", label(params))


def path_labels(labels: Mapping[str, Patterns], default: str | None = None) -> Callable[[Any], Any]:
    """Returns a function of a tree of parameters that returns labels, for `optax.multi_transform`.

    labels   the patterns of each label; of several that match a path, the first label applies
    default  the label of parameters that no pattern matches

    The scales of a narrow kernel have the label of the kernel, since they are trained together; patterns do not see
    them.

    >>> label = path_labels({"fast": "head/*"}, default="frozen")
    >>> label({"body": {"kernel": jax.numpy.ones((2, 2))}, "head": {"kernel": jax.numpy.ones((2, 2))}})
    {'body': {'kernel': 'frozen'}, 'head': {'kernel': 'fast'}}

    Raises:
      UnmatchedRule: from the function, for a pattern that matches nothing and does not end with '?', and for a
        parameter without a label.
      ShadowedRule: from the function, for a pattern of which earlier labels match every path.
    """
    rules = [
        (text, Pattern.of(text.removesuffix("?")), label)
        for label, patterns in labels.items()
        for text in ([patterns] if isinstance(patterns, str) else patterns)
    ]

    def label(params: Any) -> Any:
        paths: list[str] = []
        effective: set[str] = set()

        def choose(path: str) -> str | None:
            paths.append(path)
            matching = [(text, name) for text, pattern, name in rules if pattern.matches(path)]
            effective.update(text for text, name in matching if name == matching[0][1])
            return matching[0][1] if matching else default

        result = _by_path(choose, params)
        for text, pattern, name in rules:
            if text not in effective:
                _raise_without_effect(text, pattern, name, paths)
        return result

    return label


def _by_path(choose: Callable[[str], str | None], params: Any) -> Any:
    """Returns `params` with each leaf, which can be a variable or box, replaced by `choose(path)`.

    Scales have the result of their kernel: an optimizer needs both.
    """
    # What `optax.masked` left out is a leaf as well: of the groups of a `multi_transform`, each sees the others so.
    leaves, structure = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda node: isinstance(node, optax.MaskedNode) or is_leaf(node)
    )
    paths = [path_of(keys, params) for keys, _ in leaves]
    kernels = {scale_path(path): path for path in paths}
    names = {path: choose(path) for path in paths if path not in kernels}
    for path, name in names.items():
        if name is None:
            raise UnmatchedRule(f"{path}: no pattern matches this parameter. Add one for it, or give a default label.")
    return jax.tree_util.tree_unflatten(structure, [names[kernels.get(path, path)] for path in paths])


def _raise_without_effect(text: str, pattern: Pattern, label: str, paths: list[str]) -> None:
    """Raises the error for a pattern that decides nothing; not for one that may match nothing."""
    matched = [path for path in paths if pattern.matches(path)]
    if matched:
        raise ShadowedRule(
            f"{text!r} ({label}) decides nothing: earlier labels have a pattern for {matched[0]} and everything else "
            "that it matches. Write the more specific label first, or remove this pattern."
        )
    shown = next((path for path in paths if not is_scale(path)), None)
    if shown is not None and not text.endswith("?"):
        raise UnmatchedRule(
            f"{text!r} ({label}) matches none of {count(len(paths), 'parameter')}, such as {shown}. Correct the "
            "pattern, or end it with '?' if it may match nothing."
        )
