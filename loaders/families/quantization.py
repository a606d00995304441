"""The `quantization_config` of a config.json: block-scaled float8 kernels."""

from __future__ import annotations

from typing import Any

from ...models.config import Quantization
from ...policies.errors import named, shown
from ..fields import Fields

_ONLY = {
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "dequantize": False,
    "scale_fmt": "float",
    "modules_to_convert": None,
}
"""Fields of which one value is implemented."""

_READ = ("quant_method", "weight_block_size", "modules_to_not_convert")


def read_quantization(config: Fields) -> Quantization | None:
    """What `quantization_config` says; None without one.

    Raises:
      UnsupportedConfig: a method or a field that is not implemented.
      InvalidCheckpoint: a field of the wrong type.
    """
    if config.get("quantization_config", dict) is None:
        return None
    fields = config.within("quantization_config")
    method = fields.get("quant_method", str)
    if method != "fp8":
        raise config.unsupported(
            f"quant_method {shown(method)} is not implemented. Implemented: 'fp8', block-scaled float8."
        )
    for key, value in fields.values.items():
        if key not in _READ and value is not None and (key not in _ONLY or value != _ONLY[key]):
            raise config.unsupported(f"quantization_config: {named(key)} = {shown(value)} is not implemented.")
    block = fields.get("weight_block_size", list, [128, 128])
    if len(block) != 2 or any(type(side) is not int or not 1 <= side < 2**31 for side in block):
        raise config.invalid(f"weight_block_size: expected two positive integers, found {shown(block)}.")
    listed = fields.get("modules_to_not_convert", list, [])
    if any(not isinstance(module, str) for module in listed):
        raise config.invalid(f"modules_to_not_convert: expected names of modules, found {shown(listed)}.")
    return Quantization((block[0], block[1]), tuple(listed))


def quantization_to_json(quantization: Quantization | None) -> dict[str, Any] | None:
    """The `quantization_config` of block-scaled e4m3 kernels; None for an unquantised checkpoint."""
    if quantization is None:
        return None
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(quantization.block),
        "modules_to_not_convert": list(quantization.not_converted),
    }
