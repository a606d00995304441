"""Qwen2 and Qwen2.5: their config.json and their names."""

from __future__ import annotations

from typing import Any

from ...models.qwen2 import Qwen2
from ..fields import Fields
from .config_json import WINDOWS, read_windows, windows_to_json
from .family import Family
from .names import decoder_names


def _read(config: Fields) -> dict[str, Any]:
    return {"windows": read_windows(config)}


QWEN2 = Family(
    model_type="qwen2",
    name="Qwen2",
    model=Qwen2,
    names=decoder_names(),
    fields=WINDOWS,
    read=_read,
    write=windows_to_json,
    only={"use_mrope": False, "attention_bias": False},  # biases of queries, keys and values are always there
)
