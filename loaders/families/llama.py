"""Llama: its config.json and its names."""

from __future__ import annotations

from typing import Any

from ...models.llama import Llama, LlamaConfig
from ...policies.errors import shown
from ..fields import Fields
from .family import Family
from .names import decoder_names

_ONLY = {"pretraining_tp": 1, "rope_interleaved": False}
"""Fields of which one value is implemented."""


def _read(config: Fields) -> dict[str, Any]:
    for field, implemented in _ONLY.items():
        if (value := config.values.get(field)) not in (None, implemented):
            raise config.unsupported(f"{field} = {shown(value)} is not implemented. Implemented: {implemented}.")
    return {field: config.get(field, bool, False) for field in ("attention_bias", "mlp_bias")}


def _write(config: LlamaConfig) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    config=LlamaConfig,
    model=Llama,
    names=decoder_names(),
    fields=frozenset({"attention_bias", "mlp_bias", "is_llama_config", "transformers.js_config", *_ONLY}),
    read=_read,
    write=_write,
)
