"""Dense Qwen3: its config.json and its names."""

from __future__ import annotations

from typing import Any

from ...models.qwen3 import Qwen3, Qwen3Config
from ..fields import Fields
from .config_json import WINDOWS, read_windows, windows_to_json
from .family import Family
from .names import decoder_names, norm


def _read(config: Fields) -> dict[str, Any]:
    return {"attention_bias": config.get("attention_bias", bool, False), "windows": read_windows(config)}


def _write(config: Qwen3Config) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias, **windows_to_json(config)}


QWEN3 = Family(
    model_type="qwen3",
    name="Qwen3",
    model=Qwen3,
    names=decoder_names(
        norm("model.layers.{i}.self_attn.q_norm", "head"), norm("model.layers.{i}.self_attn.k_norm", "head")
    ),
    fields=WINDOWS | {"attention_bias"},
    read=_read,
    write=_write,
    only={"use_qk_norm": True},
    head_dim=128,
)
