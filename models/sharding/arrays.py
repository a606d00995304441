"""Shardings of a model's parameters and their scales, by path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from ...policies.blocks import Block, block_sides
from ...policies.errors import InvalidSharding, UnmatchedRule
from ...policies.matmul.sharded import Split
from ...policies.paths import is_scale, scale_path
from ...policies.patterns import Pattern
from ...policies.trees import ArrayInfo
from ..config import DecoderConfig
from .model_sharding import ModelSharding, as_names, auto_mesh, tensor_parallel


def as_model_sharding(layout: Any) -> ModelSharding | None:
    """The ModelSharding of what a user passes as `sharding`; None if it has no logical axes."""
    if isinstance(layout, Mesh):
        return tensor_parallel(layout)
    return layout if isinstance(layout, ModelSharding) else None


def shardings(layout: Any, config: DecoderConfig | None, stored: Mapping[str, ArrayInfo]) -> dict[str, Sharding | None]:
    """{path: sharding} of all parameters and scales in `stored`; None: JAX's default device.

    layout  None, a ModelSharding, a Mesh (`tensor_parallel` over its last axis), a Sharding for all, or
            {pattern: sharding}: the first pattern that matches decides, "default" is for all other parameters, which
            are replicated without it
    config  the model's config, which a ModelSharding and a Mesh need; None for parameters without a model
    stored  {path: shape and format}

    Scales are sharded as their kernel; see `scales_sharding`.

    Raises:
      InvalidSharding: any other layout, or an axis that cannot be divided evenly among its devices.
      UnmatchedRule: a pattern that matches nothing and does not end with '?'.
    """
    if layout is None:
        return dict.fromkeys(stored)
    paths = [path for path in stored if not is_scale(path)]
    if (found := as_model_sharding(layout)) is not None:
        if config is None:
            raise InvalidSharding(
                f"sharding: a {type(layout).__name__} needs a model, and these parameters have none. Pass {{pattern: "
                "NamedSharding, …}."
            )
        decide = _by_axes(found, config, {path: len(stored[path].shape) for path in paths})
    else:
        decide = _by_patterns(layout, paths)
    result: dict[str, Sharding | None] = {}
    for path in paths:
        info = stored[path]
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


def splits(sharding: ModelSharding, config: DecoderConfig, stored: Mapping[str, ArrayInfo]) -> dict[str, Split]:
    """{path: how the parameter and its activations are divided over the mesh} of all parameters; see `shardings`."""
    found = {}
    for path, each in shardings(sharding, config, stored).items():
        if not is_scale(path):
            assert isinstance(each, NamedSharding)
            names = [as_names(name) for name in each.spec]
            rest = [()] * (len(stored[path].shape) - len(names))
            found[path] = Split(sharding.mesh, sharding.batch, (*names, *rest))
    return found


def _by_axes(sharding: ModelSharding, config: DecoderConfig, paths: Mapping[str, int]) -> dict[str, Sharding]:
    """The sharding of each path, by the first of the patterns that matches it, or else by its logical axes.

    paths  {path: number of dimensions}
    """
    _check_patterns(sharding.patterns, list(paths))
    own = {Pattern.of(key.removesuffix("?")): spec for key, spec in sharding.patterns.items()}
    logical = {Pattern.of(key): axes for key, axes in config.logical_axes.items()}
    divided = sharding.divided(config.axis_sizes)

    def spec(path: str) -> PartitionSpec:
        for pattern, each in own.items():
            if pattern.matches(path):
                return each
        axes = _of_adapter(path, logical) or next((each for key, each in logical.items() if key.matches(path)), ())
        if len(axes) != paths[path]:
            return PartitionSpec()
        names = [divided.get(axis or "", ()) for axis in axes]
        if len(set(flat := [name for each in names for name in each])) < len(flat):
            raise InvalidSharding(f"{path}: two of its logical axes, {', '.join(map(str, axes))}, have one mesh axis.")
        return PartitionSpec(*(each if len(each) > 1 else each[0] if each else None for each in names))

    return {path: NamedSharding(sharding.mesh, spec(path)) for path in paths}


def _of_adapter(path: str, logical: Mapping[Pattern, tuple[str | None, ...]]) -> tuple[str | None, ...]:
    """The logical axes of an adapter's array, which are those of its kernel but for the rank; () for other paths."""
    module, _, name = path.rpartition("/")
    axes = next((each for key, each in logical.items() if key.matches(f"{module}/kernel")), ())
    if not axes or name not in ("lora_a", "lora_b"):
        return ()
    return (*axes[:-2], None, axes[-1]) if name == "lora_a" else (*axes[:-1], None)


def _by_patterns(layout: Any, paths: list[str]) -> dict[str, Sharding]:
    """The sharding of each path, by the first pattern that matches it, or by one Sharding for all."""
    if isinstance(layout, Sharding):
        layout = {"default": layout}
    if not isinstance(layout, Mapping) or not layout or not all(isinstance(s, Sharding) for s in layout.values()):
        raise InvalidSharding(
            "sharding: expected a jax.sharding.Mesh, a ModelSharding, a Sharding or a mapping of patterns to them, "
            f"found {layout!r}."
        )
    layout = {key: _auto_sharding(each) for key, each in layout.items()}
    default = layout.pop("default", None)
    if default is None:
        mesh = next((one.mesh for one in layout.values() if isinstance(one, NamedSharding)), None)
        if mesh is None:
            raise InvalidSharding('sharding: no "default", and no NamedSharding with a mesh. Add one of them.')
        default = NamedSharding(mesh, PartitionSpec())
    _check_patterns(layout, paths)
    patterns = {Pattern.of(key.removesuffix("?")): each for key, each in layout.items()}
    return {path: next((each for key, each in patterns.items() if key.matches(path)), default) for path in paths}


def _auto_sharding(sharding: Sharding) -> Sharding:
    """The same sharding over a mesh of Auto axes."""
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return sharding
    return NamedSharding(auto_mesh(sharding.mesh), sharding.spec, memory_kind=sharding.memory_kind)


def _check_patterns(patterns: Mapping[str, Any], paths: list[str]) -> None:
    """Raises UnmatchedRule for a pattern that matches nothing and does not end with '?'."""
    for key in patterns:
        if not key.endswith("?") and not any(map(Pattern.of(key).matches, paths)):
            raise UnmatchedRule(
                f"{key!r} (sharding) matches none of the model's parameters. Correct the pattern, remove it, or end "
                "it with '?' if it may match nothing."
            )


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
