"""Trees of parameters: from any Flax or plain tree to `{path: array}`, and back.

Paths are what users see: Linen's `params/`, NNX's `.value` and boxes (`nn.Partitioned`) do not appear.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.core import FrozenDict, meta

from .errors import UnsupportedCast
from .policy import Block, is_scale, scale_path


class Narrow(nnx.Variable):
    """One half of a scaled pair, the kernel or its scales; `block` is the block of the scales.

    It is no `nnx.Param`, so `nnx.grad` and `nnx.Optimizer` over `nnx.Param` pass narrow kernels by.
    """


@dataclasses.dataclass(frozen=True)
class Found:
    """A parameter as it was found: its shape and dtype, and the block of a narrow kernel where that is known."""

    shape: tuple[int, ...]
    dtype: np.dtype
    block: Block | None = None

    @property
    def bytes(self) -> int:
        """Bytes that the parameter takes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def is_box(leaf: Any) -> bool:
    """Whether `leaf` is a variable or a box that holds the array."""
    return isinstance(leaf, (nnx.Variable, meta.AxisMetadata))


def unbox(leaf: Any) -> Any:
    """The array inside."""
    if isinstance(leaf, nnx.Variable):
        return leaf.get_value()
    return leaf.unbox() if isinstance(leaf, meta.AxisMetadata) else leaf


def rebox(leaf: Any, value: Any) -> Any:
    """`value` in the box that `leaf` is."""
    if isinstance(leaf, nnx.Variable):
        return leaf.replace(value)
    return leaf.replace_boxed(value) if isinstance(leaf, meta.AxisMetadata) else value


def is_linen(tree: Any) -> bool:
    """Whether `tree` is a Linen variable dict, whose parameters are the collection `params`."""
    return isinstance(tree, Mapping) and isinstance(tree.get("params"), Mapping)


def is_parameter(leaf: Any) -> bool:
    """Whether a leaf is under the policy: arrays and shapes, `nnx.Param` and `Narrow`; no other NNX variable."""
    if isinstance(leaf, nnx.Variable):
        return isinstance(leaf, (nnx.Param, Narrow))
    return hasattr(unbox(leaf), "dtype") and hasattr(unbox(leaf), "shape")


def _component(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def map_parameters(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """`tree` with `function(path, leaf)` in place of every parameter; boxes are handed over closed."""
    linen = is_linen(tree)

    def visit(keys: tuple[Any, ...], leaf: Any) -> Any:
        names = [_component(key) for key in keys]
        if not is_parameter(leaf) or (linen and names[0] != "params"):
            return leaf
        return function("/".join(names[1:] if linen else names), leaf)

    return jax.tree_util.tree_map_with_path(visit, tree, is_leaf=is_box)


def parameters(tree: Any) -> dict[str, Any]:
    """The arrays (or shapes) of `tree` by path, in the tree's order."""
    flat: dict[str, Any] = {}
    map_parameters(lambda path, leaf: flat.setdefault(path, unbox(leaf)), tree)
    return flat


def found(tree: Any) -> dict[str, Found]:
    """Shape, dtype and known block of every parameter of `tree`."""
    flat: dict[str, Found] = {}

    def note(path: str, leaf: Any) -> Any:
        value = unbox(leaf)
        block = leaf.get_metadata().get("block") if isinstance(leaf, Narrow) else getattr(value, "block", None)
        flat[path] = Found(tuple(value.shape), value.dtype, block)
        return leaf

    map_parameters(note, tree)
    return flat


def variables_by_path(state: nnx.State) -> dict[str, Any]:
    """The array of every variable of an NNX state by path, parameter or not."""
    return {"/".join(map(str, keys)): unbox(leaf) for keys, leaf in nnx.to_flat_state(state)}


def replace_parameters(tree: Any, flat: Mapping[str, Any], blocks: Mapping[str, Block]) -> Any:
    """`tree` with the arrays of `flat`: parameters that `flat` lacks are removed, scales that it adds stand beside
    their kernel.  `blocks` holds the block of each narrow kernel by path; NNX variables remember it.

    Raises:
      UnsupportedCast: where scales come or go in a tree that is no nested mapping.
    """
    if isinstance(tree, nnx.State):
        return _replace_state(tree, flat, blocks)
    if is_linen(tree):
        rest = {**tree, "params": _replace_children(tree["params"], flat, "")}
        return FrozenDict(rest) if isinstance(tree, FrozenDict) else rest
    if set(parameters(tree)) == set(flat):
        return map_parameters(lambda path, leaf: rebox(leaf, flat[path]), tree)
    if not isinstance(tree, Mapping):
        raise UnsupportedCast(
            f"scales cannot be added to or taken from a {type(tree).__name__}. Give nested mappings or an nnx.State."
        )
    return _replace_children(tree, flat, "")


def _replace_children(node: Any, flat: Mapping[str, Any], prefix: str) -> Any:
    """A container of parameters whose paths begin with `prefix`, with the arrays of `flat`."""
    keyed = node.items() if isinstance(node, Mapping) else enumerate(node)
    children: dict[Any, Any] = {}
    for key, child in keyed:
        path = f"{prefix}{key}"
        if isinstance(child, (Mapping, list, tuple)) and not is_box(child):
            children[key] = _replace_children(child, flat, f"{path}/")
        elif not is_parameter(child):
            children[key] = child
        elif path in flat:
            children[key] = rebox(child, flat[path])
            sibling = scale_path(str(key))
            if scale_path(path) in flat and (not isinstance(node, Mapping) or sibling not in node):
                children[sibling] = rebox(child, flat[scale_path(path)])
    if isinstance(node, FrozenDict):
        return FrozenDict(children)
    if isinstance(node, Mapping):
        return children
    if len(children) != len(node):
        raise UnsupportedCast(f"{prefix}: scales cannot stand in a {type(node).__name__}. Use a mapping for the layer.")
    return type(node)(*children.values()) if hasattr(node, "_fields") else type(node)(children.values())


def _replace_state(state: nnx.State, flat: Mapping[str, Any], blocks: Mapping[str, Block]) -> nnx.State:
    """A pair's variables become `Narrow`, with the metadata they had; a dissolved pair's become `nnx.Param`."""
    variables = {"/".join(map(str, keys)): (keys, leaf) for keys, leaf in nnx.to_flat_state(state)}
    leaves = []
    for path, (keys, leaf) in variables.items():
        scales = scale_path(path)
        if not is_parameter(leaf):
            leaves.append((keys, leaf))
        elif path in flat and is_scale(path):
            leaves.append((keys, leaf.replace(flat[path])))
        elif path in flat and scales in flat:
            leaves.append((keys, retyped(leaf, Narrow, flat[path], block=blocks[path])))
            if scales not in variables:
                sibling = (*keys[:-1], scale_path(str(keys[-1])))
                leaves.append((sibling, retyped(leaf, Narrow, flat[scales], block=blocks[path])))
        elif path in flat:
            leaves.append((keys, retyped(leaf, nnx.Param if isinstance(leaf, Narrow) else type(leaf), flat[path])))
    return nnx.from_flat_state(leaves)


def retyped(leaf: nnx.Variable, kind: type[nnx.Variable], value: Any, **metadata: Any) -> nnx.Variable:
    """A variable of type `kind` that holds `value`, with the metadata of `leaf` and `metadata`."""
    if type(leaf) is kind and not metadata:
        return leaf.replace(value)
    kept = {name: item for name, item in leaf.get_metadata().items() if name != "block"}
    return kind(value, **{**kept, **metadata})
