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
from .slots import Block, is_scale, scale_path


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


def is_parameter(leaf: Any, nnx_tree: bool = False) -> bool:
    """Whether a leaf is under the policy: an array or shape; of an NNX tree `nnx.Param` and `Narrow` alone."""
    if isinstance(leaf, nnx.Variable):
        return isinstance(leaf, (nnx.Param, Narrow))
    value = unbox(leaf)
    # A PRNG key has a dtype that numpy does not know.
    return not nnx_tree and hasattr(value, "shape") and isinstance(getattr(value, "dtype", None), np.dtype)


def _component(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def map_parameters(function: Callable[[str, Any], Any], tree: Any, prefix: str = "") -> Any:
    """`tree` with `function(path, leaf)` in place of every parameter; boxes are handed over closed."""
    linen, nnx_tree = is_linen(tree) and not prefix, isinstance(tree, (nnx.State, nnx.Module))

    def visit(keys: tuple[Any, ...], leaf: Any) -> Any:
        names = [_component(key) for key in keys]
        if not is_parameter(leaf, nnx_tree) or (linen and names[0] != "params"):
            return leaf
        return function("/".join([*filter(None, [prefix]), *(names[1:] if linen else names)]), leaf)

    return jax.tree_util.tree_map_with_path(visit, tree, is_leaf=is_box)


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The parameters of `tree` by path, in the tree's order, boxes closed."""
    flat: dict[str, Any] = {}

    def note(path: str, leaf: Any) -> Any:
        if path in flat:
            raise UnsupportedCast(f"{path}: two parameters of the tree have this path. Rename one.")
        flat[path] = leaf
        return leaf

    # As a state, a module's shared variables count once.
    map_parameters(note, nnx.state(tree) if isinstance(tree, nnx.Module) else tree, prefix)
    return flat


def parameters(tree: Any) -> dict[str, Any]:
    """The arrays (or shapes) of `tree` by path, in the tree's order."""
    return {path: unbox(leaf) for path, leaf in _leaves(tree).items()}


def found(tree: Any) -> dict[str, Found]:
    """Shape, dtype and known block of every parameter of `tree`."""
    result = {}
    for path, leaf in _leaves(tree).items():
        value = unbox(leaf)
        block = leaf.get_metadata().get("block") if isinstance(leaf, Narrow) else getattr(value, "block", None)
        result[path] = Found(tuple(value.shape), value.dtype, block)
    return result


def variables_by_path(state: nnx.State) -> dict[str, Any]:
    """The array of every variable of an NNX state by path, parameter or not; arrays in no variable are left out."""
    flat = nnx.to_flat_state(state)
    return {"/".join(map(str, keys)): unbox(leaf) for keys, leaf in flat if isinstance(leaf, nnx.Variable)}


def replace_parameters(tree: Any, flat: Mapping[str, Any], blocks: Mapping[str, Block]) -> Any:
    """`tree` with the arrays of `flat`: parameters that `flat` lacks are removed, scales that it adds stand beside
    their kernel.  `blocks` holds the block of each narrow kernel by path; NNX variables remember it.

    Raises:
      UnsupportedCast: where scales come or go in a container that is no mapping.
    """
    if isinstance(tree, nnx.State):
        return _replace_state(tree, flat, blocks)
    if is_linen(tree):
        rest = {**tree, "params": _replace(tree["params"], flat, "")}
        return FrozenDict(rest) if isinstance(tree, FrozenDict) else rest
    return _replace(tree, flat, "")


def _replace(node: Any, flat: Mapping[str, Any], path: str) -> Any:
    """The part of a tree that stands at `path`, with the arrays of `flat`."""
    prefix = f"{path}/" if path else ""
    if isinstance(node, Mapping) and not is_box(node):
        children: dict[Any, Any] = {}
        for key, child in node.items():
            where, name = f"{prefix}{key}", scale_path(str(key))
            if where not in flat and is_parameter(child):
                continue
            children[key] = _replace(child, flat, where)
            if where in flat and scale_path(where) in flat and name not in node:
                if not isinstance(key, str):
                    raise UnsupportedCast(f"{where}: its scales need a name beside the key {key!r}. Use text for keys.")
                children[name] = _box_of_scales(child, flat[scale_path(where)])
        return FrozenDict(children) if isinstance(node, FrozenDict) else children
    if type(node) in (list, tuple):
        items = [f"{prefix}{i}" for i, child in enumerate(node) if is_parameter(child)]
        if any(item not in flat or scale_path(item) in flat for item in items):
            raise _immovable(path, node)
        return type(node)(_replace(child, flat, f"{prefix}{i}") for i, child in enumerate(node))
    here = _leaves(node, path)
    for where in here:
        if where not in flat or (where != path and (scale_path(where) in flat) != (scale_path(where) in here)):
            raise _immovable(path, node)
    return map_parameters(lambda where, leaf: rebox(leaf, flat[where]), node, path)


def _immovable(path: str, node: Any) -> UnsupportedCast:
    return UnsupportedCast(
        f"{path or 'the tree'}: scales cannot be added to or taken from a {type(node).__name__}. Use a mapping there."
    )


def _box_of_scales(kernel: Any, scale_inv: Any) -> Any:
    """Scales in a box like their kernel's, replicated: an axis of the grid need not divide among a mesh's devices."""
    if hasattr(kernel, "names"):
        kernel = dataclasses.replace(kernel, names=(None,) * scale_inv.ndim)
    return rebox(kernel, scale_inv) if isinstance(kernel, meta.AxisMetadata) else scale_inv


def _replace_state(state: nnx.State, flat: Mapping[str, Any], blocks: Mapping[str, Block]) -> nnx.State:
    """A pair's variables become `Narrow`, with the metadata they had; a dissolved pair's become `nnx.Param`."""
    variables = {"/".join(map(str, keys)): (keys, leaf) for keys, leaf in nnx.to_flat_state(state)}
    leaves = []
    for path, (keys, leaf) in variables.items():
        scales = scale_path(path)
        if not is_parameter(leaf, nnx_tree=True):
            leaves.append((keys, leaf))
        elif is_scale(path):
            continue  # beside its kernel, or dissolved
        elif path in flat and scales in flat:
            leaves.append((keys, _retyped(leaf, Narrow, flat[path], block=blocks[path])))
            if scales in variables:
                sibling, like = variables[scales]
                leaves.append((sibling, _retyped(like, Narrow, flat[scales], block=blocks[path])))
            else:
                sibling = (*keys[:-1], scale_path(str(keys[-1])))
                leaves.append((sibling, Narrow(flat[scales], block=blocks[path])))  # replicated, as above
        elif path in flat:
            leaves.append((keys, _retyped(leaf, nnx.Param if isinstance(leaf, Narrow) else type(leaf), flat[path])))
    return nnx.from_flat_state(leaves)


def _retyped(leaf: nnx.Variable, kind: type[nnx.Variable], value: Any, **metadata: Any) -> nnx.Variable:
    """A variable of type `kind` that holds `value`, with the metadata of `leaf` and `metadata`."""
    if type(leaf) is kind and not metadata:
        return leaf.replace(value)
    kept = {name: item for name, item in leaf.get_metadata().items() if name != "block"}
    return kind(value, **{**kept, **metadata})
