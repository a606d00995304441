"""Trees of parameters: converts any Flax tree or pytree to `{path: array}`, and replaces arrays in it by path.

Paths are those in policies and plans: without Linen's `params/`, NNX's `.value` and boxes such as `nn.Partitioned`.
The parameters of a train state are those in its field `params`; optimizer state has none.  A scaled pair has two paths,
one for the values and one for the scales, whether the tree contains two arrays or one `ScaledArray`.
"""

from __future__ import annotations

import copy
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
from .formats import Format
from .paths import is_scale, scale_path
from .scaled_array import ScaledArray
from .trainable import TrainableValues
from .training.states import PolicyState


class Narrow(nnx.Variable[Any]):
    """An NNX variable for a narrow kernel or its scales; its metadata `block` is the block of the scales.

    It is not an `nnx.Param`, so that `nnx.grad` and `nnx.Optimizer` over `nnx.Param` ignore narrow kernels.
    """


@dataclasses.dataclass(frozen=True)
class ArrayInfo:
    """Shape and format of a parameter or of scales, without the array.

    shape   shape of the represented array
    format  its format; for a narrow array that is described without its scales, scale is None, and block is None if it
            is unknown
    """

    shape: tuple[int, ...]
    format: Format

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the values."""
        return self.format.values

    @property
    def block(self) -> Block | None:
        """(rows, columns) that share one scale; None without scales, or if the block is unknown."""
        return self.format.block

    @property
    def bytes(self) -> int:
        """Bytes of the values, without the scales."""
        return math.prod(self.shape) * self.dtype.itemsize


def is_leaf(node: Any) -> bool:
    """Returns whether `node` is one leaf here: an NNX variable, a Linen box, a ScaledArray, state of an optimizer."""
    # Moments have the names of their parameters.
    is_state = type(node).__module__.partition(".")[0] == "optax" or isinstance(node, PolicyState)
    return is_state or isinstance(node, (nnx.Variable, meta.AxisMetadata, ScaledArray, TrainableValues))


def unbox(leaf: Any) -> Any:
    """Returns the value of a variable or box; any other leaf itself."""
    if isinstance(leaf, nnx.Variable):
        return leaf.get_value()
    return leaf.unbox() if isinstance(leaf, meta.AxisMetadata) else leaf


def rebox(leaf: Any, value: Any) -> Any:
    """Returns `value` in a variable or box like `leaf`; `value` itself if `leaf` is neither."""
    if isinstance(leaf, nnx.Variable):
        return leaf.replace(value)
    return leaf.replace_boxed(value) if isinstance(leaf, meta.AxisMetadata) else value


def is_linen(tree: Any) -> bool:
    """Returns whether `tree` is a Linen variable dict, whose parameters are in the collection `params`."""
    return isinstance(tree, Mapping) and isinstance(tree.get("params"), Mapping)


def is_train_state(tree: Any) -> bool:
    """Returns whether `tree` is a record of parameters and optimizer state, such as Flax's `TrainState`.

    As in Linen's variables, the parameters are those in its field `params`.
    """
    record = dataclasses.is_dataclass(tree) or hasattr(tree, "_replace")  # a named tuple
    return (
        record and not isinstance(tree, (type, nnx.Module)) and hasattr(tree, "params") and hasattr(tree, "opt_state")
    )


def _with_params(state: Any, params: Any) -> Any:
    """Returns a train state with other parameters."""
    if hasattr(state, "_replace"):
        return state._replace(params=params)
    changed = copy.copy(state)  # without __init__, which may take other arguments
    object.__setattr__(changed, "params", params)
    return changed


def is_parameter(leaf: Any, nnx_tree: bool = False) -> bool:
    """Returns whether a leaf is a parameter: an array or shape; in an NNX tree only an `nnx.Param` or `Narrow`."""
    if isinstance(leaf, nnx.Variable):
        return isinstance(leaf, (nnx.Param, Narrow))
    value = unbox(leaf)
    # The dtype of a PRNG key is not an np.dtype.
    return not nnx_tree and hasattr(value, "shape") and isinstance(getattr(value, "dtype", None), np.dtype)


def component(key: Any) -> str:
    """Returns a key of a path in a pytree as a component of a parameter's path."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def path_of(keys: tuple[Any, ...], tree: Any) -> str:
    """Returns the path of the leaf of `tree` that JAX's tree functions find at `keys`."""
    names = [component(key) for key in keys]
    return "/".join(names[1:] if is_linen(tree) else names)


def map_parameters(function: Callable[[str, Any], Any], tree: Any, prefix: str = "") -> Any:
    """Returns `tree` with every parameter replaced by `function(path, leaf)`; a leaf can be a variable or box."""
    if is_train_state(tree) and not prefix:
        return _with_params(tree, map_parameters(function, tree.params))
    if isinstance(tree, nnx.Module):  # a shared variable is one parameter, and remains shared
        graphdef, state = nnx.split(tree)
        return nnx.merge(graphdef, map_parameters(function, state, prefix))
    linen, nnx_tree = is_linen(tree) and not prefix, isinstance(tree, nnx.State)

    def visit(keys: tuple[Any, ...], leaf: Any) -> Any:
        names = [component(key) for key in keys]
        if not is_parameter(leaf, nnx_tree) or (linen and names[0] != "params"):
            return leaf
        return function("/".join([*filter(None, [prefix]), *(names[1:] if linen else names)]), leaf)

    return jax.tree_util.tree_map_with_path(visit, tree, is_leaf=is_leaf)


def _check_variables(state: nnx.State[Any, Any]) -> None:
    """Raises UnsupportedCast for a pure state, whose arrays do not say which of them are parameters."""
    flat = nnx.to_flat_state(state)
    if flat and not any(isinstance(leaf, nnx.Variable) for _, leaf in flat):
        path = "/".join(map(str, flat[0][0]))
        raise UnsupportedCast(
            f"{path}: found {type(flat[0][1]).__name__} in an nnx.State, expected a variable: only its type shows that "
            "an array is a parameter. Pass the state before nnx.as_pure or nnx.pure, or, if all its arrays are "
            "parameters, nnx.to_pure_dict(state)."
        )


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the parameters of `tree` by path, in the tree's order, as variables, boxes, ScaledArrays or arrays."""
    flat: dict[str, Any] = {}

    def add(path: str, leaf: Any) -> Any:
        if path in flat:
            raise UnsupportedCast(f"{path}: two parameters of the tree have this path. Rename one.")
        flat[path] = leaf
        return leaf

    while is_train_state(tree) and not prefix:
        tree = tree.params
    if isinstance(tree, nnx.State):
        _check_variables(tree)
    # The state of a module contains a shared variable once.
    map_parameters(add, nnx.state(tree) if isinstance(tree, nnx.Module) else tree, prefix)
    for path, leaf in flat.items():
        if isinstance(unbox(leaf), ScaledArray) and scale_path(path) in flat:
            raise UnsupportedCast(f"{path}: a ScaledArray has scales beside it. Remove {scale_path(path)!r}.")
    return flat


def parameters(tree: Any) -> dict[str, Any]:
    """Returns the arrays or shapes of `tree` by path, in the tree's order; a ScaledArray gives values, then scales."""
    flat: dict[str, Any] = {}
    for path, leaf in _leaves(tree).items():
        value = unbox(leaf)
        if isinstance(value, ScaledArray):
            values, scales = value
            flat[path] = values if value.proxy is None else TrainableValues(values, value.proxy)
            flat[scale_path(path)] = scales
        else:
            flat[path] = value
    return flat


def arrays(tree: Any) -> dict[str, Any]:
    """Returns `parameters(tree)`, of which each is an array; see `check_array`."""
    flat = parameters(tree)
    for path, value in flat.items():
        check_array(path, value)
    return flat


def check_array(path: str, value: Any) -> None:
    """Raises UnsupportedCast for a shape in place of an array."""
    if not isinstance(value, (jax.Array, np.ndarray, np.generic, TrainableValues)):
        raise UnsupportedCast(
            f"{path}: found {type(value).__name__}, expected an array. `explain` shows the effect of a policy on "
            "shapes, and jax.eval_shape(policy.store, tree) gives the shapes after storage."
        )


def describe(tree: Any) -> dict[str, ArrayInfo]:
    """Returns shape and format, as far as the tree specifies it, of every parameter of `tree`, including scales."""
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
            dtype = value.dtype.newbyteorder("=") if isinstance(value.dtype, np.dtype) else value.dtype
            result[path] = ArrayInfo(tuple(value.shape), Format(dtype, block))
    return result


def variables_by_path(state: nnx.State[Any, Any]) -> dict[str, Any]:
    """Returns the array of every variable of an NNX state by path; arrays outside of variables are omitted."""
    flat = nnx.to_flat_state(state)
    return {"/".join(map(str, keys)): unbox(leaf) for keys, leaf in flat if isinstance(leaf, nnx.Variable)}


def replace_parameters(
    tree: Any, flat: Mapping[str, Any], formats: Mapping[str, Format], *, scaled: bool = False
) -> Any:
    """Returns `tree` with the arrays of `flat`.

    Parameters that are not in `flat` are removed.  New scales are added beside their kernel; in containers with fixed
    fields, kernel and scales become one `ScaledArray`.

    formats  the format of each narrow kernel by path; NNX variables store its block
    scaled   whether pairs in mappings become `ScaledArray`s too

    Raises:
      UnsupportedCast: if scales must be removed that are a field of their container.
    """
    if isinstance(tree, nnx.State):
        return _replace_state(tree, flat, formats)
    if is_train_state(tree):
        return _with_params(tree, replace_parameters(tree.params, flat, formats, scaled=scaled))
    replace = _Replacement(flat, formats, scaled)
    if is_linen(tree):
        rest = {**tree, "params": replace.node(tree["params"], "")}
        return FrozenDict(rest) if isinstance(tree, FrozenDict) else rest
    return replace.node(tree, "")


@dataclasses.dataclass(frozen=True)
class _Replacement:
    """The arguments of `replace_parameters`, with its recursion."""

    flat: Mapping[str, Any]
    formats: Mapping[str, Format]
    scaled: bool

    def node(self, node: Any, path: str) -> Any:
        """Returns the subtree `node` at `path` with its parameters replaced."""
        prefix = f"{path}/" if path else ""
        if isinstance(node, Mapping) and not is_leaf(node):
            return self._mapping(node, prefix)
        if type(node) in (list, tuple):
            return type(node)(self.node(child, f"{prefix}{i}") for i, child in enumerate(node))
        leaves = _leaves(node, path)
        unpaired = [leaf for leaf in leaves if leaf in self.formats and scale_path(leaf) not in leaves]
        if isinstance(node, nnx.Module) and unpaired:
            raise UnsupportedCast(
                f"{unpaired[0]}: scales cannot be added to an existing {type(node).__name__}, which would use its "
                "kernels without them. Use perparam.init and perparam.apply, or store nnx.state(module)."
            )
        if removed := [leaf for leaf in leaves if leaf not in self.flat]:
            raise UnsupportedCast(
                f"{removed[0]}: the scales cannot be removed from a {type(node).__name__}. Store the pair in a "
                "mapping, or as one ScaledArray."
            )

        def replace(leaf_path: str, leaf: Any) -> Any:
            return self._leaf(leaf_path, leaf, as_one=scale_path(leaf_path) not in leaves)

        return map_parameters(replace, node, path)

    def _leaf(self, path: str, leaf: Any, as_one: bool) -> Any:
        """Returns the new leaf at `path`; `as_one` makes a narrow parameter and its scales one `ScaledArray`."""
        if path in self.formats and as_one:
            return rebox(leaf, ScaledArray(self.flat[path], self.flat[scale_path(path)], self.formats[path]))
        return rebox(leaf, self.flat[path])

    def _mapping(self, node: Mapping[Any, Any], prefix: str) -> Any:
        """Returns a mapping with its parameters replaced, scales added and scales removed."""

        def is_one(key: Any, child: Any) -> bool:
            """Whether a child is, or becomes, one `ScaledArray`."""
            return f"{prefix}{key}" in self.formats and (self.scaled or isinstance(unbox(child), ScaledArray))

        scaled_arrays = {key for key, child in node.items() if is_one(key, child)}
        absorbed = {scale_path(str(key)) for key in scaled_arrays}  # scales that are part of a ScaledArray
        children: dict[Any, Any] = {}
        for key, child in node.items():
            path, scale_key = f"{prefix}{key}", scale_path(str(key))
            if key in absorbed or (path not in self.flat and is_parameter(child)):
                continue
            if key in scaled_arrays:
                children[key] = self._leaf(path, child, as_one=True)
            elif path not in self.formats:
                children[key] = self.node(child, path)
            else:
                children[key] = self._leaf(path, child, as_one=False)
                if scale_key not in node:
                    if not isinstance(key, str):
                        raise UnsupportedCast(
                            f"{path}: scales can only be added beside a key that is text, found {key!r}. Use text keys."
                        )
                    children[scale_key] = _box_of_scales(child, self.flat[scale_path(path)])
        return FrozenDict(children) if isinstance(node, FrozenDict) else children


def _box_of_scales(kernel: Any, scale_inv: Any) -> Any:
    """Returns scales in a box like their kernel's, but replicated, since their axes may not divide among devices."""
    if hasattr(kernel, "names"):
        kernel = dataclasses.replace(kernel, names=(None,) * scale_inv.ndim)
    return rebox(kernel, scale_inv) if isinstance(kernel, meta.AxisMetadata) else scale_inv


def _replace_state(
    state: nnx.State[Any, Any], flat: Mapping[str, Any], formats: Mapping[str, Format]
) -> nnx.State[Any, Any]:
    """Returns an NNX state with the arrays of `flat`.

    The variables of a scaled pair become `Narrow` and a dequantised kernel becomes an `nnx.Param`, with their metadata.
    """
    variables = {"/".join(map(str, keys)): (keys, leaf) for keys, leaf in nnx.to_flat_state(state)}
    leaves = []
    for path, (keys, leaf) in variables.items():
        scales = scale_path(path)
        if not is_parameter(leaf, nnx_tree=True):
            leaves.append((keys, leaf))
        elif is_scale(path):
            continue  # added after its kernel, or removed
        elif path in flat and scales in flat:
            leaves.append((keys, with_type(leaf, Narrow, flat[path], block=formats[path].block)))
            if scales in variables:
                sibling, scale_leaf = variables[scales]
                leaves.append((sibling, with_type(scale_leaf, Narrow, flat[scales], block=formats[path].block)))
            else:  # replicated, as in `_box_of_scales`
                sibling = (*keys[:-1], scale_path(str(keys[-1])))
                leaves.append((sibling, Narrow(flat[scales], block=formats[path].block)))
        elif path in flat:
            leaves.append((keys, with_type(leaf, nnx.Param if isinstance(leaf, Narrow) else type(leaf), flat[path])))
    return nnx.from_flat_state(leaves)


def with_type(leaf: nnx.Variable[Any], kind: type[nnx.Variable[Any]], value: Any, **metadata: Any) -> nnx.Variable[Any]:
    """Returns a variable of type `kind` with `value`, the metadata of `leaf` except its block, and `metadata`."""
    if type(leaf) is kind and not metadata:
        return leaf.replace(value)
    current = {name: item for name, item in leaf.get_metadata().items() if name != "block"}
    return kind(value, **{**current, **metadata})
