"""`adapter_config.json` of peft: the settings of adapters by the name of their module, read and written.

The fields are those of `LoraConfig` in peft 0.21.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..models.adapters import Adapter
from ..models.config import DecoderConfig
from ..policies.errors import UnsupportedExport, shown
from .fields import Fields

_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),  # the others change the base model's kernels, or begin elsewhere
}
"""Values of fields that are implemented, beside null."""

_IGNORED = frozenset(
    # Where adapters are is in the names of their tensors; `lora_dropout` is for training, and zero here.
    "target_modules target_parameters exclude_modules layers_to_transform layers_pattern lora_dropout "
    # Of no effect on the result: where a model comes from, and settings of programs or of fields that are refused.
    "base_model_name_or_path revision peft_version task_type auto_mapping inference_mode megatron_core "
    "qalora_group_size ensure_weight_tying runtime_config".split()
)

_READ = frozenset("r lora_alpha use_rslora rank_pattern alpha_pattern".split())

_MOST_PATTERNS = 4096

_PATTERN = re.compile(r"(?:[\w-]|\\?\.|\\d\+?|\.\*|\^|\$)+")
"""Regular expressions in `rank_pattern` that are read: others can take exponential time, and files are not trusted."""

_MOST_REPEATS = 3


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The settings of adapters; those of a module are `adapter(name)`.

    rank, alpha    of modules without a pattern
    rslora         see `Adapter`
    ranks, alphas  {regular expression: value} for the end of a module's name
    """

    rank: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    def adapter(self, *names: str) -> Adapter:
        """The settings of the module or parameter with one of these names in the checkpoint."""
        rank, alpha = _by_pattern(self.ranks, names, self.rank), _by_pattern(self.alphas, names, self.alpha)
        return Adapter(rank, alpha, self.rslora)


def _by_pattern(patterns: Mapping[str, Any], names: Sequence[str], default: Any) -> Any:
    """The value of the first pattern that matches the end of a name, as peft's `get_pattern_key` finds it."""
    found = (each for key, each in patterns.items() if any(re.match(rf"(.*\.)?({key})$", name) for name in names))
    return next(found, default)


def read_config(fields: Fields) -> PeftConfig:
    """The settings in an `adapter_config.json`.

    Raises:
      UnsupportedConfig: a field that is not implemented and not at its default, by name.
      InvalidCheckpoint: a value of the wrong type, or out of range.
    """
    for name, value in fields.values.items():
        accepted = _ONLY.get(name)
        if name in _READ | _IGNORED or value is None or (accepted is None and not value):
            continue
        if accepted is None or not any(type(value) is type(each) and value == each for each in accepted):
            raise fields.unsupported(
                f"{name}: {shown(value)} is not supported"
                + (f", expected {' or '.join(map(repr, accepted))}. " if accepted else ". ")
                + "Merge the adapter into its model with peft, by merge_and_unload(), and load that."
            )
    if fields.values.get("peft_type") is None:
        raise fields.unsupported("peft_type is missing. The adapter_config.json that peft writes has it: 'LORA'.")
    return PeftConfig(
        fields.size("r", 8),
        fields.positive("lora_alpha", 8),
        fields.get("use_rslora", bool, False),
        {key: Fields(fields.name, {key: each}).size(key) for key, each in _patterns(fields, "rank_pattern")},
        {key: Fields(fields.name, {key: each}).positive(key, 0) for key, each in _patterns(fields, "alpha_pattern")},
    )


def _patterns(fields: Fields, name: str) -> Iterable[tuple[str, Any]]:
    """The items of a field with regular expressions as keys."""
    patterns = fields.get(name, dict, {})
    for key in patterns:
        repeats = sum(map(key.count, ("*", "+")))
        if not _PATTERN.fullmatch(key) or repeats > _MOST_REPEATS or len(key) > 500 or len(patterns) > _MOST_PATTERNS:
            raise fields.unsupported(
                f"{name}: {shown(key)} is not supported as a pattern. Write names of modules, with '.*' and '\\d+' at "
                f"most {_MOST_REPEATS} times, in at most {_MOST_PATTERNS} patterns."
            )
    return patterns.items()


def config_to_json(
    config: DecoderConfig, modules: Mapping[str, Adapter], parameters: Mapping[str, Adapter]
) -> dict[str, Any]:
    """The contents of an `adapter_config.json`.

    modules     settings by the name of a linear layer in transformers' model
    parameters  settings by the name of a parameter there, such as the stacked kernels of experts

    Raises:
      UnsupportedExport: adapters with and without rslora.
    """
    adapters = {**modules, **parameters}
    if len({adapter.rslora for adapter in adapters.values()}) > 1:
        raise UnsupportedExport(
            "adapter_config.json has one field use_rslora for all adapters, and these have both. Save a model whose "
            "adapters are all of one kind."
        )
    usual, _ = collections.Counter((each.rank, each.alpha) for each in adapters.values()).most_common(1)[0]
    others = {name: each for name, each in adapters.items() if (each.rank, each.alpha) != usual}
    tasks = {"causal_lm": "CAUSAL_LM", "feature_extraction": "FEATURE_EXTRACTION"}
    return {
        "peft_type": "LORA",
        # For classification peft would expect the head in the file.
        "task_type": tasks.get(config.task),
        "base_model_name_or_path": None if config.source is None else str(config.source.parent),
        "r": usual[0],
        "lora_alpha": _number(usual[1]),
        "use_rslora": next(iter(adapters.values())).rslora,
        "rank_pattern": {name: each.rank for name, each in others.items()},
        "alpha_pattern": {name: _number(each.alpha) for name, each in others.items()},
        "target_modules": list(modules) or None,
        "target_parameters": list(parameters) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _number(value: float) -> float | int:
    """The value as an integer if it is one, as peft writes it."""
    return int(value) if value == int(value) else value
