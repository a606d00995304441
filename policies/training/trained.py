"""The parameters of a tree as an optimizer sees them: one wide array for each, whatever their storage and container."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from .. import dtypes
from ..blocks import DEFAULT_BLOCK
from ..errors import InvalidGradients, InvalidScale, UnpairedScale, UnsupportedCast
from ..formats import Format
from ..paths import is_scale, proxy_path, scale_path
from ..resolved import resolve
from ..rules import PolicyRules
from ..scaled_array import ScaledArray
from ..scales import F32
from ..trees import ArrayInfo, Narrow, component, is_leaf, is_linen, rebox, unbox
from .proxies import Proxy


@dataclasses.dataclass(frozen=True)
class Trained:
    """One parameter that the optimizer updates.

    path       its path
    values     its stored array
    scale_inv  its scales; None without
    format     its complete format
    """

    path: str
    values: Any
    scale_inv: Any
    format: Format

    @property
    def wide_dtype(self) -> np.dtype:
        """The dtype of the optimizer's arithmetic: float32, or float64 for a float64 parameter."""
        return np.dtype(np.float64) if self.format.values == np.float64 else F32

    def wide(self) -> jax.Array:
        """Returns the value in `wide_dtype`."""
        if self.format.scale is not None:
            return ScaledArray(self.values, self.scale_inv, self.format).dequantize()
        return jnp.asarray(self.values).astype(self.wide_dtype)


class TrainedParameters:
    """The parameters of a tree that an optimizer updates, and trees of its structure.

    params  nested mappings, an nnx.State (with variables or pure), or any other pytree

    Trained are floating-point parameters and scaled pairs.  A proxy beside a pair is not, see `add_proxies`, but its
    gradient is that of the pair.  None, `optax.MaskedNode`, integers, PRNG keys and, in
    Linen's variables, other collections than `params` are not.

    Raises:
      UnpairedScale, InvalidScale: for a narrow parameter without scales that fit it.
      UnsupportedCast: for an NNX variable that is not a parameter.
    """

    def __init__(self, params: Any, policy: PolicyRules):
        _check_variables(params, policy)
        self._leaves, self._treedef = _flatten(params)
        linen = is_linen(params)
        self._paths = [_path(keys, linen) for keys, _ in self._leaves]
        by_path = {path: unbox(leaf) for path, (_, leaf) in zip(self._paths, self._leaves, strict=True)}
        infos: dict[str, ArrayInfo] = {}
        for path, value in by_path.items():
            if path is not None and _is_array(value):
                infos |= _describe(path, value)
        proxies = {proxy_path(path) for path in by_path if path is not None and scale_path(path) in by_path}
        _check_scales(by_path, policy)
        self.trained: dict[str, Trained] = {}
        for path, param in resolve(policy, infos, slots=()).params.items():
            if path in proxies or (param.format.scale is None and not dtypes.is_floating(param.format.values)):
                continue
            values = by_path[path]
            values, scale_inv = values if isinstance(values, ScaledArray) else (values, by_path.get(scale_path(path)))
            self.trained[path] = Trained(path, values, scale_inv, param.format)

    @property
    def paths(self) -> list[str]:
        """The paths of all parameters of the tree, those included in whose place None or a MaskedNode stands."""
        scales = [scale_path(path) for path, param in self.trained.items() if param.format.scale is not None]
        return [*dict.fromkeys([*filter(None, self._paths), *self.trained, *scales])]

    def __iter__(self) -> Iterator[Trained]:
        return iter(self.trained.values())

    def tree(self, arrays: Mapping[str, Any]) -> Any:
        """Returns a tree of the parameters' structure with one array, or None, for each path of `arrays`.

        It has None in place of scales and of leaves that are not trained, and the MaskedNodes of the parameters.
        """
        leaves = []
        for path, (_, leaf) in zip(self._paths, self._leaves, strict=True):
            if path is not None and path in self.trained:
                array = arrays.get(path)
                leaves.append(None if array is None else rebox(leaf, array))
            else:
                leaves.append(leaf if isinstance(leaf, optax.MaskedNode) else None)
        return jax.tree_util.tree_unflatten(self._treedef, leaves)

    def keys(self) -> dict[tuple[Any, ...], str]:
        """Returns the path of each parameter by its keys in the trees that `tree` returns."""
        paths = list(self.trained)
        numbered = self.tree({path: index for index, path in enumerate(paths)})
        return {keys: paths[index] for keys, index in jax.tree_util.tree_flatten_with_path(numbered)[0]}

    def updates(self, values: Mapping[str, Any], scales: Mapping[str, Any], other: Any) -> Any:
        """Returns a tree of exactly the parameters' structure: an update for each array.

        values  by path, the update of each trained parameter
        scales  by path, the update of its scales
        other   the update of every other array
        """
        kernels = {scale_path(path): path for path in scales}
        leaves = []
        for path, (_, leaf) in zip(self._paths, self._leaves, strict=True):
            value = unbox(leaf)
            if leaf is None or isinstance(leaf, optax.MaskedNode):
                leaves.append(leaf)
            elif path is not None and path in self.trained:
                update = values[path]
                if isinstance(value, ScaledArray):
                    update = ScaledArray(update, scales[path], value.format)
                leaves.append(rebox(leaf, update))
            elif path in kernels:
                leaves.append(rebox(leaf, scales[kernels[path]]))
            else:
                leaves.append(jax.tree.map(lambda _: other, leaf))
        return jax.tree_util.tree_unflatten(self._treedef, leaves)

    def by_path(self, tree: Any, what: str) -> dict[str, Any]:
        """Returns the leaves of gradients, or of a tree that `tree` returned, by path; None where the tree has None.

        what  what the leaves are, for errors

        Raises:
          InvalidGradients: for a parameter without a leaf, a leaf without a parameter, and a leaf of another shape or
            of a dtype that is not f32, bf16, f16 or f64.
        """
        leaves, _ = _flatten(tree)
        linen = is_linen(tree)
        found = {_path(keys, linen): unbox(leaf) for keys, leaf in leaves}
        for kernel in self.trained:
            if found.get(kernel) is None and _is_array(found.get(proxy_path(kernel))):
                found[kernel] = found.pop(proxy_path(kernel))
        known = set(self.paths)
        for other, leaf in found.items():
            if other is not None and other not in known and not is_scale(other) and _is_array(leaf):
                raise InvalidGradients(
                    f"{other}: a {what} of shape {tuple(leaf.shape)}, but the parameters have no such path. Pass "
                    f"{what}s of the structure of the parameters."
                )
        result: dict[str, Any] = {}
        for path, param in self.trained.items():
            if path not in found:
                raise InvalidGradients(
                    f"{path}: no {what}. Pass one for every parameter that is trained, or None in its place for a "
                    "parameter that stays as it is in this step."
                )
            leaf = found[path]
            if leaf is None or isinstance(leaf, optax.MaskedNode) or leaf.dtype == jax.dtypes.float0:
                result[path] = None
                continue
            if isinstance(leaf, ScaledArray) or not dtypes.is_floating(leaf.dtype) or dtypes.is_narrow(leaf.dtype):
                raise InvalidGradients(
                    f"{path}: a {what} of dtype {leaf.dtype}, expected f32, bf16 or f16. Differentiate with respect to "
                    "wide values: a narrow cotangent overflows, and loses most of its bits."
                )
            if tuple(leaf.shape) != tuple(param.values.shape):
                raise InvalidGradients(
                    f"{path}: a {what} of shape {tuple(leaf.shape)} for a parameter of shape "
                    f"{tuple(param.values.shape)}. Pass {what}s of the shapes of the parameters."
                )
            result[path] = leaf
        return result


def pure(params: Any) -> Any:
    """Returns an nnx.State with arrays in place of variables, as `nnx.Optimizer` passes it; other trees unchanged."""
    return nnx.as_pure(params) if isinstance(params, nnx.State) else params


def in_variables(updates: Any, params: Any) -> Any:
    """Returns the updates of `pure(params)` as `optax.apply_updates` takes them: those of a state in its variables."""
    if not isinstance(params, nnx.State):
        return updates
    flat = dict(nnx.to_flat_state(updates))
    leaves = [
        (keys, leaf.replace(flat[keys]) if isinstance(leaf, nnx.Variable) else flat[keys])
        for keys, leaf in nnx.to_flat_state(params)
    ]
    return nnx.from_flat_state(leaves)


def placed(array: jax.Array, like: Any) -> jax.Array:
    """Returns an array on the devices of a parameter: divided as the parameter if it has its shape, else whole.

    Traced arrays are left to the compiler.
    """
    concrete = isinstance(like, jax.Array) and not isinstance(like, jax.core.Tracer)
    if not concrete or isinstance(array, jax.core.Tracer):
        return array
    sharding = like.sharding
    if array.shape != like.shape and isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(), memory_kind=sharding.memory_kind)
    elif array.shape != like.shape:
        return array
    placed: jax.Array = array if array.sharding == sharding else jax.device_put(array, sharding)
    return placed


def keep(tree: Any, paths: Collection[str]) -> Any:
    """Returns a tree with the leaves at these paths, and None in place of others; an nnx.State has no others."""
    if isinstance(tree, nnx.State):
        return nnx.from_flat_state(
            [(keys, leaf) for keys, leaf in nnx.to_flat_state(tree) if "/".join(map(str, keys)) in paths]
        )
    leaves, treedef = _flatten(tree)
    linen = is_linen(tree)
    return jax.tree_util.tree_unflatten(
        treedef, [leaf if _path(keys, linen) in paths else None for keys, leaf in leaves]
    )


def _flatten(tree: Any) -> tuple[list[tuple[tuple[Any, ...], Any]], Any]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is None or is_leaf(node))


def _path(keys: tuple[Any, ...], linen: bool) -> str | None:
    """Returns the path of a leaf; None in another collection of Linen's variables than `params`."""
    names = [component(key) for key in keys]
    if linen and names[0] != "params":
        return None
    return "/".join(names[1:] if linen else names)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and isinstance(getattr(value, "dtype", None), np.dtype)


def _describe(path: str, value: Any) -> dict[str, ArrayInfo]:
    if isinstance(value, ScaledArray):
        scales = value.scale_inv
        return {
            path: ArrayInfo(value.shape, value.format),
            scale_path(path): ArrayInfo(tuple(scales.shape), Format(np.dtype(scales.dtype))),
        }
    return {path: ArrayInfo(tuple(value.shape), Format(value.dtype))}


def _check_scales(by_path: Mapping[str | None, Any], policy: PolicyRules) -> None:
    """Raises UnpairedScale for a narrow kernel without its scales, which an optimizer cannot update.

    Without scales an int8 array is one only if None or a MaskedNode is in their place, or if the policy stores it so.
    """
    for path, value in by_path.items():
        if path is None or is_scale(path) or not _is_array(value) or not dtypes.is_narrow(value.dtype):
            continue
        if isinstance(value, ScaledArray) or _is_array(by_path.get(scale_path(path))):
            continue
        format = policy.params.format(path)
        if scale_path(path) in by_path or dtypes.is_floating(value.dtype) or (format is not None and format.narrow):
            raise UnpairedScale(
                f"{path}: {dtypes.dtype_name(value.dtype)} {tuple(value.shape)} without its scales "
                f"{scale_path(path)!r}, so it cannot be trained. Give the optimizer both, or neither: a mask or a "
                "label of the kernel is that of its scales too, as in perparam.training.path_mask and path_labels."
            )


def _check_variables(params: Any, policy: PolicyRules) -> None:
    """Raises an error for variables that are no parameters, and for a block that only their metadata has.

    `nnx.Optimizer` passes variables to `init`, and arrays without metadata to `update`.
    """
    if not isinstance(params, nnx.State):
        return
    paths = {"/".join(map(str, keys)) for keys, _ in nnx.to_flat_state(params)}
    for keys, leaf in nnx.to_flat_state(params):
        path = "/".join(map(str, keys))
        if isinstance(leaf, nnx.Variable) and not isinstance(leaf, (nnx.Param, Narrow)):
            raise UnsupportedCast(
                f"{path}: a variable of type {type(leaf).__name__} is not a parameter. Pass the state of parameters "
                "alone: nnx.state(model, nnx.Param)."
            )
        if isinstance(leaf, Proxy) and path.removesuffix(proxy_path("")) not in paths:
            raise UnsupportedCast(
                f"{path}: the proxy of a narrow kernel, without the kernel. Pass both to the optimizer: "
                "nnx.Optimizer(model, tx, wrt=nnx.Any(nnx.Param, perparam.training.Narrow))."
            )
        block = leaf.get_metadata().get("block") if isinstance(leaf, Narrow) else None
        if block is not None and not is_scale(path):
            format = policy.params.format(path)
            expected = (None if format is None else format.block) or policy.block or DEFAULT_BLOCK
            if tuple(block) != tuple(expected):
                raise InvalidScale(
                    f"{path}: scales of blocks of {tuple(block)}, and the policy says {tuple(expected)}. An optimizer "
                    f"sees arrays without metadata: name the block in the policy, block={tuple(block)}."
                )
