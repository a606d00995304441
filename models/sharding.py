"""Where parameters lie on several devices: cut among them or copied to each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from ..policies.blocks import Block, block_sides
from ..policies.errors import InvalidSharding, UnmatchedRule
from ..policies.paths import is_scale, scale_path
from ..policies.patterns import Pattern
from ..policies.trees import ArrayInfo
from .config import DecoderConfig


def tensor_parallel(config: DecoderConfig, mesh: Mesh) -> dict[str, NamedSharding]:
    """The shardings, by pattern, that cut a decoder over the last axis of `mesh` (Megatron-LM, arXiv:1909.08053).

    Projections into heads and into the wide layer are cut by what they make, those out of them by what they take, the
    embedding and the head by the vocabulary; what does not divide among the devices, and every norm, is copied.
    """
    axis = mesh.axis_names[-1]
    count = mesh.shape[axis]
    by_rows, by_columns = NamedSharding(mesh, PartitionSpec(axis)), NamedSharding(mesh, PartitionSpec(None, axis))
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    rules: dict[str, NamedSharding] = {}
    if heads % count == 0:
        rules |= {"**/q_proj/*": by_rows, "**/o_proj/kernel": by_columns}
    if kv_heads % count == 0:
        rules |= {"**/{k,v}_proj/*": by_rows}
    if config.intermediate_size % count == 0:
        rules |= {"**/{gate,up}_proj/*": by_rows, "**/down_proj/kernel": by_columns}
    if config.vocab_size % count == 0:
        rules |= {"embed_tokens/embedding": by_rows, "lm_head/kernel?": by_rows}
    return {**rules, "default": NamedSharding(mesh, PartitionSpec())}


def shardings(layout: Any, config: DecoderConfig, stored: Mapping[str, ArrayInfo]) -> dict[str, Sharding | None]:
    """The sharding of every parameter of `stored`, by path; None: wherever JAX puts it.

    layout  None, a `Sharding` for all, a `Mesh` (see `tensor_parallel`), or shardings by pattern, of which the first
            that matches wins; what none names falls under "default", and without that is copied to every device

    Scales follow their kernel: cut as it is where its cuts fall between blocks, else copied along that axis.

    Raises:
      InvalidSharding: for anything else, and for an axis that does not divide among its devices.
      UnmatchedRule: for a pattern that matches nothing and does not end with '?'.
    """
    if layout is None:
        return dict.fromkeys(stored)
    if isinstance(layout, Mesh):
        layout = tensor_parallel(config, layout)
    if isinstance(layout, Sharding):
        layout = {"default": layout}
    if not isinstance(layout, Mapping) or not layout or not all(isinstance(s, Sharding) for s in layout.values()):
        raise InvalidSharding(
            f"sharding is a jax.sharding.Mesh, a Sharding, or a mapping from patterns to Shardings, found {layout!r}."
        )
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
    """The sharding of the scales of a kernel of `shape` that is sharded as `sharding`.

    An axis is cut as the kernel's where every cut falls between two blocks, and copied where one falls within a block:
    of 768 rows on 4 devices each has 192, one block of 128 and a half.
    """
    if sharding.is_fully_replicated:
        return sharding
    if not isinstance(sharding, NamedSharding):
        raise InvalidSharding(
            f"{path}: cut by {type(sharding).__name__}, expected a NamedSharding, whose axes have names."
        )
    names = [*sharding.spec, *(None,) * (len(shape) - len(sharding.spec))]
    shards = sharding.shard_shape(shape)
    sides = (*(1,) * (len(shape) - 2), *block_sides(block, shape))
    kept = [
        name if shard % side == 0 or shard == size else None
        for name, size, shard, side in zip(names, shape, shards, sides, strict=True)
    ]
    return NamedSharding(sharding.mesh, PartitionSpec(*kept), memory_kind=sharding.memory_kind)


def _rules(layout: Mapping[str, Sharding], paths: list[str]) -> dict[str, Sharding]:
    """The sharding of each path, by the first pattern that matches it."""
    patterns = {key: Pattern.of(key.removesuffix("?")) for key in layout if key != "default"}
    default = layout.get("default")
    if default is None:
        mesh = next((one.mesh for one in layout.values() if isinstance(one, NamedSharding)), None)
        if mesh is None:
            raise InvalidSharding('the shardings name no mesh and no "default" to put the other parameters. Add one.')
        default = NamedSharding(mesh, PartitionSpec())
    for key, pattern in patterns.items():
        if not key.endswith("?") and not any(map(pattern.matches, paths)):
            raise UnmatchedRule(
                f"{key!r} (sharding) matches none of {len(paths)} parameters. Correct the pattern, remove it, or end "
                "it with '?' if it may match nothing."
            )
    return {
        path: next((layout[key] for key, pattern in patterns.items() if pattern.matches(path)), default)
        for path in paths
    }


def _checked(path: str, shape: tuple[int, ...], sharding: Sharding) -> Sharding:
    try:
        if isinstance(sharding, NamedSharding) and len(sharding.spec) > len(shape):
            raise ValueError(f"it names {len(sharding.spec)} axes")
        sharding.shard_shape(shape)
    except ValueError as error:
        raise InvalidSharding(
            f"{path}: {np.array(shape).tolist()} cannot be cut as {sharding}: {error}. Leave that axis whole."
        ) from error
    return sharding
