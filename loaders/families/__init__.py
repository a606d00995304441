"""Model families by their `model_type`: config.json to configs and back."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from ...models.config import DecoderConfig
from ...models.heads import Task
from ...policies.errors import UnsupportedConfig, UnsupportedExport, named, shown
from ..fields import Fields
from ..json_file import read_json
from .config_json import decoder_to_json, read_decoder
from .family import SUFFIXES, Family
from .llama import LLAMA
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .qwen3_moe import QWEN3_MOE

FAMILIES = {family.model_type: family for family in (LLAMA, QWEN2, QWEN3, QWEN3_MOE)}
"""Implemented families by `model_type`."""


def read_config(source: str | os.PathLike[str] | Mapping[str, Any]) -> DecoderConfig:
    """The config in a `config.json`, of its family's class.

    source  path of the file, or its contents

    Both the published form (`torch_dtype`, `rope_theta`, `rope_scaling`) and the newer one (`dtype`,
    `rope_parameters`) are read.

    Raises:
      MissingFile, InvalidCheckpoint: no such file, not JSON, or a field of the wrong type.
      UnsupportedConfig: an architecture, field or value that is not implemented, by name.
    """
    if isinstance(source, Mapping):
        return _read(Fields("config.json", source))
    config = _read(Fields(os.fspath(source), read_json(source)))
    return dataclasses.replace(config, source=pathlib.Path(source).absolute())


def config_to_json(config: DecoderConfig) -> dict[str, Any]:
    """The contents of a `config.json` that transformers and vLLM can read; `read_config` of them gives `config`.

    Raises:
      UnsupportedExport: a field that the family's config.json cannot hold, such as windows that differ between layers.
    """
    family = family_of(config)
    fields = {
        "architectures": [family.architecture(config.task)],
        "model_type": family.model_type,
        **decoder_to_json(config),
        **family.write(config),
    }
    # Without an eos_token_id, transformers takes the family's default.
    written = {name: value for name, value in fields.items() if value is not None or name == "eos_token_id"}
    again = _read(Fields("config.json", written))
    lost = [
        field.name
        for field in dataclasses.fields(config)
        if field.compare and getattr(again, field.name) != getattr(config, field.name)
    ]
    if lost:
        raise UnsupportedExport(
            f"{', '.join(lost)}: the config.json of {family.architecture(config.task)} cannot hold "
            f"{getattr(config, lost[0])!r}."
        )
    return written


def family_of(config: DecoderConfig) -> Family:
    """The family of a config.

    Raises:
      UnsupportedConfig: a config of no family's class.
    """
    for family in FAMILIES.values():
        if isinstance(config, family.config):
            return family
    names = ", ".join(sorted(family.config.__name__ for family in FAMILIES.values()))
    raise UnsupportedConfig(f"{type(config).__name__} is not the config of an implemented model family: {names}.")


def _read(fields: Fields) -> DecoderConfig:
    family, task = _family_and_task(fields)
    return family.config(**read_decoder(fields, family, task), **family.read(fields))


def _family_and_task(fields: Fields) -> tuple[Family, Task]:
    """The family that `model_type` names, and the task that `architectures` names, a causal LM by default."""
    model_type, named_ones = fields.get("model_type", str), fields.get("architectures", list, [])
    family = FAMILIES.get(model_type or "")
    if family is not None and not named_ones:
        return family, "causal_lm"
    if family is not None:
        for task in SUFFIXES:
            if family.architecture(task) in named_ones:
                return family, task
    found = f"model_type {shown(model_type)}"
    if named_ones:
        found = f"{named(str(named_ones[0]))} ({found})"
    first, *others = SUFFIXES.values()
    ending = next((each for each in SUFFIXES.values() if named_ones and str(named_ones[0]).endswith(each)), None)
    remedy = f' Set architectures to ["{family.name}{ending}"] if it is one.' if family and ending else ""
    names = [each.name for each in FAMILIES.values()]
    raise fields.unsupported(
        f"{found} is not supported. Supported: "
        f"{', '.join(f'{name}{first}' for name in names)}, and {', '.join(f'…{each}' for each in others)} of the same "
        f"families.{remedy}"
    )
