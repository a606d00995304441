"""Llama: its config.json and its names."""

from __future__ import annotations

from typing import Any

from ...models.llama import Llama, LlamaConfig
from ..fields import Fields
from .family import Family
from .names import decoder_names


def _read(config: Fields) -> dict[str, Any]:
    return {field: config.get(field, bool, False) for field in ("attention_bias", "mlp_bias")}


def _write(config: LlamaConfig) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


LLAMA = Family(
    model_type="llama",
    name="Llama",
    model=Llama,
    names=decoder_names(),
    fields=frozenset({"attention_bias", "mlp_bias"}),
    read=_read,
    write=_write,
    only={"pretraining_tp": 1, "rope_interleaved": False},
    longest=2048,
)
