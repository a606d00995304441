"""Shardings of a model's parameters over several devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from ..policies.blocks import Block, block_sides
from ..policies.errors import InvalidSharding, UnmatchedRule
from ..policies.paths import is_scale, scale_path
from ..policies.patterns import Pattern
from ..policies.trees import ArrayInfo
from .config import DecoderConfig


def tensor_parallel(config: DecoderConfig, mesh: Mesh) -> dict[str, NamedSharding]:
    """{pattern: sharding} for tensor parallelism over the last axis of `mesh` (Megatron-LM, arXiv:1909.08053).

    q_proj, k_proj, v_proj, gate_proj and up_proj are split along their output axis, o_proj and down_proj along their
    input axis, the embedding and `lm_head` along the vocabulary. Norms, `score`, mixtures of experts, and parameters
    that cannot be divided evenly among the devices, are replicated.
    """
    mesh, axis = _auto(mesh), mesh.axis_names[-1]
    count = mesh.shape[axis]
    by_rows, by_columns = NamedSharding(mesh, PartitionSpec(axis)), NamedSharding(mesh, PartitionSpec(None, axis))
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    replicated = NamedSharding(mesh, PartitionSpec())
    rules: dict[str, NamedSharding] = {}
    if config.expert_size:
        rules["**/experts/**?"] = replicated
    if heads % count == 0:
        rules |= {"**/q_proj/*": by_rows, "**/o_proj/kernel": by_columns}
    if kv_heads % count == 0:
        rules |= {"**/{k,v}_proj/*": by_rows}
    if config.intermediate_size % count == 0:
        rules |= {"**/{gate,up}_proj/*": by_rows, "**/down_proj/kernel": by_columns}
    if config.vocab_size % count == 0:
        rules |= {"embed_tokens/embedding": by_rows, "lm_head/kernel?": by_rows}
    return {**rules, "default": replicated}


def _auto(mesh: Mesh) -> Mesh:
    """The mesh with axes that XLA partitions, which models need; `jax.make_mesh` makes Explicit ones by default."""
    if not isinstance(mesh, Mesh):  # an AbstractMesh, for its shape alone
        return mesh
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _auto_sharding(sharding: Sharding) -> Sharding:
    """The same sharding over a mesh of Auto axes."""
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return sharding
    return NamedSharding(_auto(sharding.mesh), sharding.spec, memory_kind=sharding.memory_kind)


def shardings(layout: Any, config: DecoderConfig | None, stored: Mapping[str, ArrayInfo]) -> dict[str, Sharding | None]:
    """{path: sharding} of all parameters and scales in `stored`; None: JAX's default device.

    layout  None, a `Sharding` for all, a `Mesh` (see `tensor_parallel`), or {pattern: sharding}: the first pattern that
            matches decides, "default" is for all other parameters, which are replicated without it
    config  the model's config, which a Mesh needs; None for parameters without a model
    stored  {path: shape and format}

    Scales are sharded as their kernel; see `scales_sharding`.

    Raises:
      InvalidSharding: any other layout, or an axis that cannot be divided evenly among its devices.
      UnmatchedRule: a pattern that matches nothing and does not end with '?'.
    """
    if layout is None:
        return dict.fromkeys(stored)
    if isinstance(layout, Mesh):
        if config is None:
            raise InvalidSharding(
                "sharding: a Mesh needs a model, and these parameters have none. Pass {pattern: NamedSharding, …}."
            )
        layout = tensor_parallel(config, layout)
    if isinstance(layout, Sharding):
        layout = {"default": layout}
    if not isinstance(layout, Mapping) or not layout or not all(isinstance(s, Sharding) for s in layout.values()):
        raise InvalidSharding(
            f"sharding: expected a jax.sharding.Mesh, a Sharding or a mapping of patterns to them, found {layout!r}."
        )
    layout = {pattern: _auto_sharding(each) for pattern, each in layout.items()}
    result: dict[str, Sharding | None] = {}
    decide = _rules(layout, [path for path in stored if not is_scale(path)])
    for path, info in stored.items():
        if is_scale(path):
            continue
        result[path] = _checked(path, info.shape, decide[path])
        if scale_path(path) in stored:
            assert info.block is not None
            result[scale_path(path)] = scales_sharding(decide[path], info.shape, info.block, path)
    return result


def scales_sharding(sharding: Sharding, shape: tuple[int, ...], block: Block, path: str = "kernel") -> Sharding:
    """The sharding of a kernel's scales, where the kernel has this shape, block and sharding.

    An axis is split like the kernel's if each device has whole blocks, and replicated otherwise: of 768 rows, each of 4
    devices has 192, which are one and a half blocks of 128.

    Raises:
      InvalidSharding: a sharding without names of axes.
    """
    if sharding.is_fully_replicated:
        return sharding
    if not isinstance(sharding, NamedSharding):
        raise InvalidSharding(
            f"{path}: expected a NamedSharding, which also shards the scales, found {type(sharding).__name__}."
        )
    names = [*sharding.spec, *(None,) * (len(shape) - len(sharding.spec))]
    shards = sharding.shard_shape(shape)
    sides = (*(1,) * (len(shape) - 2), *block_sides(block, shape))
    spec = [
        name if shard % side == 0 or shard == size else None
        for name, size, shard, side in zip(names, shape, shards, sides, strict=True)
    ]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)


def _rules(layout: Mapping[str, Sharding], paths: list[str]) -> dict[str, Sharding]:
    """The sharding of each path, by the first pattern that matches it."""
    patterns = {key: Pattern.of(key.removesuffix("?")) for key in layout if key != "default"}
    default = layout.get("default")
    if default is None:
        mesh = next((one.mesh for one in layout.values() if isinstance(one, NamedSharding)), None)
        if mesh is None:
            raise InvalidSharding('sharding: no "default", and no NamedSharding with a mesh. Add one of them.')
        default = NamedSharding(mesh, PartitionSpec())
    for key, pattern in patterns.items():
        if not key.endswith("?") and not any(map(pattern.matches, paths)):
            raise UnmatchedRule(
                f"{key!r} (sharding) matches none of the model's parameters. Correct the pattern, remove it, or end "
                "it with '?' if it may match nothing."
            )
    return {
        path: next((layout[key] for key, pattern in patterns.items() if pattern.matches(path)), default)
        for path in paths
    }


def _checked(path: str, shape: tuple[int, ...], sharding: Sharding) -> Sharding:
    """`sharding`, if it fits the shape; else raises InvalidSharding."""
    try:
        if isinstance(sharding, NamedSharding) and len(sharding.spec) > len(shape):
            raise ValueError(f"its spec has {len(sharding.spec)} axes")
        sharding.shard_shape(shape)
    except ValueError as error:
        raise InvalidSharding(
            f"{path}: the shape {np.array(shape).tolist()} cannot be split as {sharding}: {error}. Replicate that axis."
        ) from error
    return sharding
