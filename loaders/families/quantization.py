"""The `quantization_config` of a config.json: float8 kernels as Qwen and DeepSeek publish them ("fp8"), and as vLLM's
tools write them ("compressed-tensors")."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ...models.config import Quantization
from ...policies.errors import named, shown
from ..fields import Fields

_FP8_READ = ("quant_method", "weight_block_size", "modules_to_not_convert")
_FP8_ONLY: Mapping[str, Any] = {
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "dequantize": False,
    "scale_fmt": "float",
    "modules_to_convert": None,
}
"""Fields of "fp8" of which one value is implemented."""

_COMPRESSED_READ = (
    "quant_method", "config_groups", "ignore", "version", "global_compression_ratio", "format", "quantization_status",
    "sparsity_config",
)  # fmt: skip
_COMPRESSED_ONLY: Mapping[str, Any] = {"transform_config": {}}
_ANY_OF = {"format": ("float-quantized", "naive-quantized"), "quantization_status": ("compressed", "frozen")}
"""Fields of which several values are implemented, which mean the same files."""

_GROUP_READ = ("weights", "input_activations", "format")
_GROUP_ONLY: Mapping[str, Any] = {"targets": ["Linear"]}
_WEIGHTS_READ = ("strategy", "block_structure", "observer", "observer_kwargs", "zp_dtype")
_ACTIVATIONS_READ = ("strategy", "group_size", "observer", "observer_kwargs", "zp_dtype", "dynamic")
_NUMBERS: Mapping[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
"""The same for "compressed-tensors": fields of the config, of its one group, and of weights and activations."""

_STRATEGIES = {"channel": (1, -1), "tensor": (-1, -1)}
"""The blocks of `strategy` in "compressed-tensors"."""

SCALE_SUFFIX = {"fp8": "_scale_inv", "compressed-tensors": "_scale"}
"""The end of the name of a kernel's scales, by `Quantization.method`; both are multipliers."""


def read_quantization(config: Fields) -> Quantization | None:
    """The contents of `quantization_config`; None without one.

    Raises:
      UnsupportedConfig: a method or a field that is not implemented, by name.
      InvalidCheckpoint: a field of the wrong type.
    """
    if config.get("quantization_config", dict) is None:
        return None
    fields = config.within("quantization_config")
    method = fields.get("quant_method", str)
    if method not in _READERS:
        listed = ", ".join(map(repr, _READERS))
        raise config.unsupported(f"quant_method {shown(method)} is not implemented. Implemented: {listed}.")
    return _READERS[method](fields)


def _read_fp8(fields: Fields) -> Quantization:
    _refuse_others(fields, "quantization_config", _FP8_READ, _FP8_ONLY)
    block = _block(fields, "weight_block_size", [128, 128])
    return Quantization(block, _modules(fields, "modules_to_not_convert"))


def _read_compressed(fields: Fields) -> Quantization:
    """Float8 weights with a scale for each output channel, for the tensor, or for each block."""
    _refuse_others(fields, "quantization_config", _COMPRESSED_READ, _COMPRESSED_ONLY)
    for key, values in _ANY_OF.items():
        if (value := fields.values.get(key)) not in (None, *values):
            raise fields.unsupported(f"quantization_config: {key} = {shown(value)} is not implemented.")
    if fields.within("sparsity_config").values.get("format", "dense") != "dense":
        sparsity = shown(fields.values["sparsity_config"])
        raise fields.unsupported(f"quantization_config: sparsity_config = {sparsity} is not implemented.")
    groups = fields.within("config_groups")
    if len(groups.values) != 1:
        raise fields.unsupported(
            f"quantization_config: {len(groups.values)} config_groups are not implemented. Implemented: one."
        )
    (key,) = groups.values
    group = groups.within(key)
    _refuse_others(group, "config_groups", _GROUP_READ, _GROUP_ONLY)
    weights, activations = group.within("weights"), group.within("input_activations")
    _refuse_others(weights, "weights", _WEIGHTS_READ, {**_NUMBERS, "dynamic": False})
    _refuse_others(activations, "input_activations", _ACTIVATIONS_READ, _NUMBERS)
    if activations.values.get("dynamic", True) is not True:
        raise fields.unsupported(
            "input_activations: dynamic = false is not implemented, since activations are quantised dynamically. "
            "Quantise the model with dynamic activations."
        )
    strategy = weights.get("strategy", str)
    if strategy == "block":
        block = _block(weights, "block_structure", None)
    elif strategy in _STRATEGIES:
        block = _STRATEGIES[strategy]
    else:
        listed = ", ".join(map(repr, [*_STRATEGIES, "block"]))
        raise fields.unsupported(f"weights: strategy {shown(strategy)} is not implemented. Implemented: {listed}.")
    return Quantization(block, _modules(fields, "ignore"), "compressed-tensors")


_READERS = {"fp8": _read_fp8, "compressed-tensors": _read_compressed}


def not_converted(quantization: Quantization) -> Callable[[str], bool] | None:
    """A function that says whether `modules_to_not_convert`, or `ignore`, leaves out the kernel at a path.

    None where that list has a regular expression, which is not evaluated. An entry is the name of the kernel's module,
    of a parent, or the end of its name, as in transformers.
    """
    # The kernels of a layer's experts are one parameter, without the number of an expert in its path.
    listed = {re.sub(r"\.experts\.\d+\.", ".experts.", name) for name in quantization.not_converted}
    if any(name.startswith("re:") for name in listed):  # a regular expression of compressed-tensors
        return None
    ends = {".".join(name.rsplit(".", count)[1:]) for name in listed for count in range(1, 7) if "." in name}

    def is_left_out(path: str) -> bool:
        words = path.split("/")[:-1]
        beginnings = {".".join(words[:count]) for count in range(1, len(words) + 1)}
        spellings = beginnings | {"model", *(f"model.{each}" for each in beginnings)}
        spellings |= {".".join(words[count:]) for count in range(1, len(words))}
        return not listed.isdisjoint(spellings) or ".".join(words) in ends

    return is_left_out


def list_field(quantization: Quantization) -> str:
    """The field of `quantization_config` that lists the modules that are not quantised."""
    return "ignore" if quantization.method == "compressed-tensors" else "modules_to_not_convert"


def _refuse_others(fields: Fields, name: str, read: tuple[str, ...], only: Mapping[str, Any]) -> None:
    """Raises UnsupportedConfig for a field that is neither read nor null nor at its implemented value."""
    for key, value in fields.values.items():
        if key not in read and value is not None and (key not in only or value != only[key]):
            raise fields.unsupported(f"{name}: {named(key)} = {shown(value)} is not implemented.")


def _block(fields: Fields, key: str, default: list[int] | None) -> tuple[int, int]:
    block = fields.get(key, list, default)
    if block is None or len(block) != 2 or any(type(side) is not int or not 1 <= side < 2**31 for side in block):
        raise fields.invalid(f"{key}: expected two positive integers, found {shown(block)}.")
    return block[0], block[1]


def _modules(fields: Fields, key: str) -> tuple[str, ...]:
    listed = fields.get(key, list, [])
    if any(not isinstance(module, str) for module in listed):
        raise fields.invalid(f"{key}: expected names of modules, found {shown(listed)}.")
    return tuple(listed)


def quantization_to_json(quantization: Quantization | None) -> dict[str, Any] | None:
    """The `quantization_config` of scaled e4m3 kernels; None for an unquantised checkpoint."""
    if quantization is None:
        return None
    if quantization.method == "compressed-tensors":
        return _compressed_to_json(quantization)
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(quantization.block),
        "modules_to_not_convert": list(quantization.not_converted),
    }


def _compressed_to_json(quantization: Quantization) -> dict[str, Any]:
    strategies = {block: strategy for strategy, block in _STRATEGIES.items()}
    strategy = strategies.get(quantization.block, "block")
    weights = {**_NUMBERS, "dynamic": False, "strategy": strategy}
    activations = {**_NUMBERS, "dynamic": True, "strategy": "token"}
    if strategy == "block":
        weights["block_structure"] = list(quantization.block)
        activations |= {"strategy": "group", "group_size": quantization.block[1]}
    group = {**_GROUP_ONLY, "format": "float-quantized", "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(quantization.not_converted),
    }
