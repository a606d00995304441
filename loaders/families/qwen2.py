"""Qwen2 and Qwen2.5: their config.json and their names."""

from __future__ import annotations

from typing import Any

from ...models.qwen2 import Qwen2, Qwen2Config
from ..fields import Fields
from .config_json import WINDOWS, read_windows, windows_to_json
from .family import Family
from .names import decoder_names


def _read(config: Fields) -> dict[str, Any]:
    if config.get("use_mrope", bool, False):
        raise config.unsupported("use_mrope true is not implemented. Text-only models set it to false.")
    return {"windows": read_windows(config)}


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    config=Qwen2Config,
    model=Qwen2,
    names=decoder_names(),
    fields=WINDOWS | {"use_mrope"},
    read=_read,
    write=windows_to_json,
)
