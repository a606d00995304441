"""Trees of parameters: from any Flax or plain tree to `{path: array}`, and back.

Paths are what users see: Linen's `params/`, NNX's `.value` and boxes (`nn.Partitioned`) do not appear.  A scaled pair
is two entries, the values and their scales, whether the tree has them side by side or as one `ScaledArray`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.core import FrozenDict, meta

from .blocks import Block
from .errors import UnsupportedCast
from .formats import Format, ScaledArray
from .paths import is_scale, scale_path


class Narrow(nnx.Variable[Any]):
    """One half of a scaled pair, the kernel or its scales; `block` is the block of the scales.

    It is no `nnx.Param`, so `nnx.grad` and `nnx.Optimizer` over `nnx.Param` pass narrow kernels by.
    """


@dataclasses.dataclass(frozen=True)
class ArrayInfo:
    """Shape and format of a parameter, without its values.

    shape   logical: of the array that it represents
    format  of a narrow kernel's own values where its scales are not known yet, scale None; block None: unknown
    """

    shape: tuple[int, ...]
    format: Format

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the values."""
        return self.format.values

    @property
    def block(self) -> Block | None:
        """The block of the scales; None where there are none, or where it is not known."""
        return self.format.block

    @property
    def bytes(self) -> int:
        """Bytes of the values, scales apart."""
        return math.prod(self.shape) * self.dtype.itemsize


def is_leaf(node: Any) -> bool:
    """Whether `node` is one parameter: a variable or a box that holds the array, or a ScaledArray."""
    return isinstance(node, (nnx.Variable, meta.AxisMetadata, ScaledArray))


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

    return jax.tree_util.tree_map_with_path(visit, tree, is_leaf=is_leaf)


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The parameters of `tree` by path, in the tree's order, boxes closed and `ScaledArray`s whole."""
    flat: dict[str, Any] = {}

    def note(path: str, leaf: Any) -> Any:
        if path in flat:
            raise UnsupportedCast(f"{path}: two parameters of the tree have this path. Rename one.")
        flat[path] = leaf
        return leaf

    # As a state, a module's shared variables count once.
    map_parameters(note, nnx.state(tree) if isinstance(tree, nnx.Module) else tree, prefix)
    for path, leaf in flat.items():
        if isinstance(unbox(leaf), ScaledArray) and scale_path(path) in flat:
            raise UnsupportedCast(f"{path}: a ScaledArray, and scales beside it. Remove {scale_path(path)!r}.")
    return flat


def parameters(tree: Any) -> dict[str, Any]:
    """The arrays (or shapes) of `tree` by path, in the tree's order; scales after their kernel in a `ScaledArray`."""
    flat: dict[str, Any] = {}
    for path, leaf in _leaves(tree).items():
        value = unbox(leaf)
        if isinstance(value, ScaledArray):
            flat[path], flat[scale_path(path)] = value
        else:
            flat[path] = value
    return flat


def describe(tree: Any) -> dict[str, ArrayInfo]:
    """Shape and format, as far as it is known, of every parameter of `tree`, scales included."""
    result: dict[str, ArrayInfo] = {}
    for path, leaf in _leaves(tree).items():
        value = unbox(leaf)
        if isinstance(value, ArrayInfo):
            result[path] = value
        elif isinstance(value, ScaledArray):
            result[path] = ArrayInfo(value.shape, value.format)
            scales = value.scale_inv
            result[scale_path(path)] = ArrayInfo(tuple(scales.shape), Format(np.dtype(scales.dtype)))
        else:
            block = leaf.get_metadata().get("block") if isinstance(leaf, Narrow) else None
            result[path] = ArrayInfo(tuple(value.shape), Format(value.dtype, block))
    return result


def variables_by_path(state: nnx.State[Any, Any]) -> dict[str, Any]:
    """The array of every variable of an NNX state by path, parameter or not; arrays in no variable are left out."""
    flat = nnx.to_flat_state(state)
    return {"/".join(map(str, keys)): unbox(leaf) for keys, leaf in flat if isinstance(leaf, nnx.Variable)}


def replace_parameters(
    tree: Any, flat: Mapping[str, Any], formats: Mapping[str, Format], *, scaled: bool = False
) -> Any:
    """`tree` with the arrays of `flat`: parameters that `flat` lacks are removed, new scales are put beside their
    kernel, or with it into a `ScaledArray` where the container has no room for a sibling.

    formats  the format of each narrow kernel by path; NNX variables remember its block
    scaled   whether pairs in mappings become `ScaledArray`s too

    Raises:
      UnsupportedCast: where scales have a field of their own, which cannot be removed.
    """
    if isinstance(tree, nnx.State):
        return _replace_state(tree, flat, formats)
    replace = _Replacement(flat, formats, scaled)
    if is_linen(tree):
        rest = {**tree, "params": replace.node(tree["params"], "")}
        return FrozenDict(rest) if isinstance(tree, FrozenDict) else rest
    return replace.node(tree, "")


@dataclasses.dataclass(frozen=True)
class _Replacement:
    """See `replace_parameters`."""

    flat: Mapping[str, Any]
    formats: Mapping[str, Format]
    scaled: bool

    def node(self, node: Any, path: str) -> Any:
        """The part of a tree that stands at `path`."""
        prefix = f"{path}/" if path else ""
        if isinstance(node, Mapping) and not is_leaf(node):
            return self._mapping(node, prefix)
        if type(node) in (list, tuple):
            return type(node)(self.node(child, f"{prefix}{i}") for i, child in enumerate(node))
        here = _leaves(node, path)
        alone = [where for where in here if where in self.formats and scale_path(where) not in here]
        if isinstance(node, nnx.Module) and alone:
            raise UnsupportedCast(
                f"{alone[0]}: a {type(node).__name__} that exists has no place for scales, and would read its kernels "
                "without them. Use perparam.init and perparam.apply, or store nnx.state(module)."
            )
        if gone := [where for where in here if where not in self.flat]:
            raise UnsupportedCast(
                f"{gone[0]}: the scales cannot be removed from a {type(node).__name__}. Keep them in a mapping, or "
                "give the pair as one ScaledArray."
            )

        def replaced(where: str, leaf: Any) -> Any:
            return self._leaf(where, leaf, alone=scale_path(where) not in here)

        return map_parameters(replaced, node, path)

    def _leaf(self, path: str, leaf: Any, alone: bool) -> Any:
        """The leaf at `path`, as a `ScaledArray` where it is narrow and its scales have no place of their own."""
        if path in self.formats and alone:
            return rebox(leaf, ScaledArray(self.flat[path], self.flat[scale_path(path)], self.formats[path]))
        return rebox(leaf, self.flat[path])

    def _mapping(self, node: Mapping[Any, Any], prefix: str) -> Any:
        def is_whole(key: Any, child: Any) -> bool:
            """Whether a child is, or becomes, one `ScaledArray`."""
            return f"{prefix}{key}" in self.formats and (self.scaled or isinstance(unbox(child), ScaledArray))

        whole = {key for key, child in node.items() if is_whole(key, child)}
        inside = {scale_path(str(key)) for key in whole}
        children: dict[Any, Any] = {}
        for key, child in node.items():
            where, name = f"{prefix}{key}", scale_path(str(key))
            if key in inside or (where not in self.flat and is_parameter(child)):
                continue
            if key in whole:
                children[key] = self._leaf(where, child, alone=True)
            elif where not in self.formats:
                children[key] = self.node(child, where)
            else:
                children[key] = self._leaf(where, child, alone=False)
                if name not in node:
                    if not isinstance(key, str):
                        raise UnsupportedCast(
                            f"{where}: its scales need a name beside the key {key!r}. Use text for keys."
                        )
                    children[name] = _box_of_scales(child, self.flat[scale_path(where)])
        return FrozenDict(children) if isinstance(node, FrozenDict) else children


def _box_of_scales(kernel: Any, scale_inv: Any) -> Any:
    """Scales in a box like their kernel's, replicated: an axis of the grid need not divide among a mesh's devices."""
    if hasattr(kernel, "names"):
        kernel = dataclasses.replace(kernel, names=(None,) * scale_inv.ndim)
    return rebox(kernel, scale_inv) if isinstance(kernel, meta.AxisMetadata) else scale_inv


def _replace_state(
    state: nnx.State[Any, Any], flat: Mapping[str, Any], formats: Mapping[str, Format]
) -> nnx.State[Any, Any]:
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
            leaves.append((keys, _retyped(leaf, Narrow, flat[path], block=formats[path].block)))
            if scales in variables:
                sibling, like = variables[scales]
                leaves.append((sibling, _retyped(like, Narrow, flat[scales], block=formats[path].block)))
            else:
                sibling = (*keys[:-1], scale_path(str(keys[-1])))
                leaves.append((sibling, Narrow(flat[scales], block=formats[path].block)))  # replicated, as above
        elif path in flat:
            leaves.append((keys, _retyped(leaf, nnx.Param if isinstance(leaf, Narrow) else type(leaf), flat[path])))
    return nnx.from_flat_state(leaves)


def _retyped(leaf: nnx.Variable[Any], kind: type[nnx.Variable[Any]], value: Any, **metadata: Any) -> nnx.Variable[Any]:
    """A variable of type `kind` that holds `value`, with the metadata of `leaf` and `metadata`."""
    if type(leaf) is kind and not metadata:
        return leaf.replace(value)
    kept = {name: item for name, item in leaf.get_metadata().items() if name != "block"}
    return kind(value, **{**kept, **metadata})
