"""`save_params`: write any tree of parameters as safetensors files, which `load_params` reads back bit for bit."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from ..policies.blocks import Block
from ..policies.dtypes import dtype_name
from ..policies.errors import InvalidCheckpoint, UnsupportedExport, named
from ..policies.hosts import spans_processes
from ..policies.paths import scale_path
from ..policies.presets import PolicyLike, get_policy
from ..policies.resolved import Resolved, resolve
from ..policies.trees import ArrayInfo, describe, is_leaf, is_linen, is_parameter, is_train_state, parameters
from .bare import by_paths
from .layout import INDEX
from .progress import Progress
from .rows import ArrayRows
from .safetensors.reader import Tensor
from .safetensors.writer import ALL_NAMES, in_shards, size_in_bytes
from .together import writing
from .write import write_params


def save_params(
    tree: Any,
    folder: str | os.PathLike[str],
    policy: PolicyLike = None,
    *,
    max_shard_size: int | str = "5GB",
    progress: bool | None = None,
) -> pathlib.Path:
    """Saves the parameters of any tree as safetensors files, without a model's config; returns the folder.

    tree            nested mappings, `{path: array}`, Linen variables, an NNX state or model, any other pytree; narrow
                    parameters are `ScaledArray`s, or have their scales beside them
    folder          replaced as a whole, after all files are written; a folder with other files is an error
    policy          anything `get_policy` accepts; its storage formats are applied to the files. None: the formats of
                    the tree, bit for bit
    max_shard_size  bytes of a file, or text such as "5GB"
    progress        whether to show a progress bar on stderr; None: only if that is a terminal

    The name of a tensor is the path of its parameter with "." for "/", as policies and `explain` show it:
    `encoder.layer.0.kernel`, and `encoder.layer.0.scale_inv` for its scales. A mapping from names such as
    "encoder.layer.0.kernel" is saved by these names, and `load_params` gives their paths, with "/".

    The blocks of scaled pairs are in the metadata, so that `load_params(folder, scaled=True)` gives the same
    `ScaledArray`s; a mapping does not store its block, and needs a policy with it unless it is (128, 128).

    Arrays that several processes share are saved by all of them, as by `save_model`.

    >>> import tempfile
    >>> from perparam import load_params
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_params({"dense": {"kernel": np.ones((2, 3), np.float32)}}, folder + "/saved")
    ...     list(load_params(folder + "/saved"))
    ['dense/kernel']

    Raises:
      UnsupportedExport: leaves that are not parameters, such as batch statistics, optimizer state and Python numbers,
        which would be lost; a dtype that safetensors files do not have; names that `load_params` would refuse or give
        other paths. Nothing is written then.
      UnpairedScale, InvalidScale, UnmatchedRule, ShadowedRule, InvalidSize: as `Policy.store` and `save_model`.
      SaveFailed: the disk is full, or another error of the file system; the folder is then unchanged.
    """
    limit, policy = size_in_bytes(max_shard_size), get_policy(policy)
    _refuse_other_leaves(tree)
    arrays, infos = parameters(tree), describe(tree)
    if not arrays:
        raise UnsupportedExport(f"{type(tree).__name__}: has no parameters. Pass a tree of arrays.")
    resolved = resolve(policy, tree, slots=("params",))
    names = _names(resolved, pathlib.Path(folder))
    for path, array in arrays.items():
        if not isinstance(array, (jax.Array, np.ndarray, np.generic)):
            raise UnsupportedExport(f"{path}: {type(array).__name__} has no values. Pass arrays.")
    for path, info in resolved.stored.items():
        if info.dtype not in ALL_NAMES:
            raise UnsupportedExport(
                f"{path}: safetensors files have no dtype {dtype_name(info.dtype)}. Save under a policy that stores it "
                "as another one."
            )
    groups = [
        {names[path]: jax.ShapeDtypeStruct(info.shape, info.dtype) for path, info in param.stored.items()}
        for param in resolved.params.values()
    ]
    blocks = {names[path]: block for path, block in _blocks(resolved, infos).items()}
    bar = Progress(f"saving {pathlib.Path(folder).name}", sum(info.bytes for info in infos.values()), progress)
    sources = {path: ArrayRows(path, array) for path, array in arrays.items()}
    together, shards = any(map(spans_processes, arrays.values())), in_shards(groups, limit)
    with writing(folder, _is_file_of_params, shards, blocks, together=together) as (_, writer), bar:
        write_params(writer, resolved.params.values(), sources, names, bar, together=together)
    return pathlib.Path(folder)


def _names(resolved: Resolved, folder: pathlib.Path) -> dict[str, str]:
    """{path: tensor name}, such that `load_params` gives the same paths, with "/" for the "." of a flat name."""
    names: dict[str, str] = {}
    expected: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for param in resolved.params.values():
        whole = param.path.replace(".", "/")
        for path, info in param.stored.items():
            again = whole if path == param.path else scale_path(whole)
            names[path] = name = again.replace("/", ".")
            if "/" in path and "." in path:
                raise UnsupportedExport(f"{named(path)}: would have the path {named(again)} when loaded. Rename it.")
            if name in tensors or not name.isprintable() or name == "__metadata__":
                other = next((each for each in names if names[each] == name and each != path), None)
                problem = f"{named(other)} and {named(path)} have" if other is not None else f"{named(path)} has"
                raise UnsupportedExport(f"{problem} no name of their own in a file. Rename the parameter.")
            expected[name] = again
            tensors[name] = Tensor(name, folder, info.shape, info.dtype, 0, 0)
    try:
        loaded = by_paths(folder, tensors)
    except InvalidCheckpoint as error:
        raise UnsupportedExport(f"{error}") from error
    for path, tensor in loaded.items():
        if path != expected[tensor.name]:
            raise UnsupportedExport(
                f"{named(expected[tensor.name])}: would be loaded as the scales {named(path)}. Rename it."
            )
    return names


def _blocks(resolved: Resolved, infos: Mapping[str, ArrayInfo]) -> dict[str, Block]:
    """{path: block} of the scaled pairs whose block is known: from the tree, from the policy, or since it is new."""
    blocks: dict[str, Block] = {}
    for path, format in resolved.formats.items():
        rule = resolved.policy.params.format(path)
        named_by_policy = resolved.policy.block or (rule.block if rule is not None else None)
        if infos[path].block or named_by_policy or resolved.params[path].change != "kept":
            assert format.block is not None
            blocks[path] = format.block
    return blocks


def _refuse_other_leaves(tree: Any) -> None:
    """Raises UnsupportedExport for leaves that are not parameters, such as batch statistics and optimizer state."""
    if is_train_state(tree):
        fields = tree._fields if hasattr(tree, "_fields") else [field.name for field in dataclasses.fields(tree)]
        others = [name for name in fields if name != "params" and _has_values(getattr(tree, name))]
        remedy = "Pass state.params, and save the whole state by Orbax"
    elif is_linen(tree):
        others = [name for name in tree if name != "params" and jax.tree.leaves(tree[name])]
        remedy = "Pass variables['params'], and save the others by a call of their own"
        if not others:
            return _refuse_other_leaves(tree["params"])
    elif isinstance(tree, (nnx.State, nnx.Module)):
        state = nnx.state(tree) if isinstance(tree, nnx.Module) else tree
        leaves = {"/".join(map(str, keys)): leaf for keys, leaf in nnx.to_flat_state(state)}
        others = [
            path for path, leaf in leaves.items() if not is_parameter(leaf, True) and not isinstance(leaf, nnx.RngState)
        ]
        remedy = "Pass nnx.state(model, (nnx.Param, perparam.policies.Narrow)), and save the others by other means"
    else:
        flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
        others = [
            jax.tree_util.keystr(keys, simple=True, separator="/")
            for keys, leaf in flat
            if not is_parameter(leaf) and _has_values(leaf)
        ]
        remedy = "Pass a tree of arrays alone (of an Equinox module, eqx.filter(module, eqx.is_array)), and save the "
        remedy += "others by other means, such as Orbax"
    if others:
        more = f" and {len(others) - 5} more" if others[5:] else ""
        raise UnsupportedExport(
            f"{', '.join(map(named, others[:5]))}{more}: not parameters, and would be lost. {remedy}."
        )


def _has_values(tree: Any) -> bool:
    """Whether a tree has numbers or arrays, PRNG keys included; functions and other static leaves are none."""
    leaves = jax.tree.leaves(tree)
    return any(isinstance(leaf, (int, float, complex, str)) or hasattr(leaf, "shape") for leaf in leaves)


def _is_file_of_params(name: str) -> bool:
    """Whether `save_params` writes files of this name."""
    return name == INDEX or bool(re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", name))
