"""Linear layers that can have low-rank adapters: where they are in a model, and how adapters are inserted there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..policies.dtypes import saturating_cast
from ..policies.errors import InvalidAdapter
from ..policies.scales import F32
from ..policies.scope import Scope
from .adapters import Adapter
from .layers import Linear
from .moe import ExpertLinear

Draw = Callable[[str, tuple[int, ...]], Any]
"""A function of a path and a shape that returns the array of a new adapter."""


def linear_layers(model: nnx.Module) -> dict[str, Linear | ExpertLinear]:
    """{path: layer} of the model's linear layers, those of experts included."""
    layers = {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, (Linear, ExpertLinear))
    }
    return dict(sorted(layers.items(), key=lambda item: _in_order(item[0])))


def _in_order(path: str) -> list[tuple[int, str]]:
    """A key that sorts layer 10 after layer 2."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split("/")]


def adapters_of(model: nnx.Module) -> dict[str, Adapter]:
    """{path: settings} of the adapters in a model."""
    return {path: layer.adapter for path, layer in linear_layers(model).items() if layer.adapter is not None}


def insert_adapters(model: nnx.Module, adapters: Mapping[str, Adapter], scope: Scope, draw: Draw | None = None) -> None:
    """Inserts adapters into layers of `model`, which is changed.

    adapters  {path of a layer: settings}; the dtypes in which they are computed, and their division over a mesh, are
              those of the scope
    scope     the scope of the model: the rules for `lora_a` and `lora_b` decide how these are stored and computed
    draw      the arrays by path, stored in their own dtype without a rule; None: the adapters have shapes and no arrays

    Raises:
      InvalidAdapter: a policy under which adapters would be narrow.
    """
    layers = linear_layers(model) if adapters else {}
    for path, adapter in adapters.items():
        layer, at = layers[path], scope.at(*path.split("/"))
        shapes = shapes_of(layer, adapter)
        stored: dict[str, Any] = {}
        computes = []
        for name, shape in shapes.items():
            spec = at.spec(name)
            for format in filter(None, (spec.storage, spec.compute)):
                if format.narrow:
                    raise InvalidAdapter(
                        f"{at.path(name)}: the policy asks {format} of it, but adapters are trained, so they are "
                        f"stored and computed in f32, bf16 or f16. Write a rule such as '{name}?: f32' before the "
                        "one that matches."
                    )
            dtype = None if spec.storage is None else spec.storage.values
            if draw is None:
                stored[name] = jax.ShapeDtypeStruct(shape, dtype or F32)
            else:
                array = draw(at.path(name), shape)
                stored[name] = array if dtype in (None, array.dtype) else saturating_cast(array, dtype)
            computes.append(spec.compute_dtype)
        layer.lora_a, layer.lora_b = nnx.LoRAParam(stored["lora_a"]), nnx.LoRAParam(stored["lora_b"])
        splits = at.split("lora_a"), at.split("lora_b")
        layer.adapter = dataclasses.replace(adapter, computes=(computes[0], computes[1]), splits=splits)


def shapes_of(layer: Linear | ExpertLinear, adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the arrays of an adapter of `layer`."""
    *experts, out, features = layer.kernel.shape
    return {"lora_a": (*experts, adapter.rank, features), "lora_b": (*experts, out, adapter.rank)}


def remove_adapter(layer: Linear | ExpertLinear) -> None:
    """Removes the adapter of a layer, which is changed."""
    del layer.adapter, layer.lora_a, layer.lora_b


def peft_uniform(rngs: nnx.Rngs) -> Draw:
    """The initial values that peft draws: `lora_a` uniform between ±1/sqrt(in), as of He et al. with a = sqrt(5), and
    `lora_b` zeros, all float32."""

    def draw(path: str, shape: tuple[int, ...]) -> jax.Array:
        if path.endswith("/lora_b"):
            return jnp.zeros(shape, jnp.float32)
        bound = 1 / np.sqrt(shape[-1], dtype=np.float32)
        return jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)

    return draw
