"""`Family`: the classes, the config.json and the tensor names of a model family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ...models.config import DecoderConfig
from ...models.decoder import Decoder
from ...models.heads import Task
from ..fields import Fields
from .names import Entry, Expected, expected_tensors

SUFFIXES: Mapping[Task, str] = {
    "causal_lm": "ForCausalLM",
    "feature_extraction": "Model",
    "sequence_classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
}
"""The ends of the names of transformers' classes, by task."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family: its classes, its config.json and its name table.

    model_type  as config.json spells it
    name        beginning of the names of transformers' classes: "Qwen3" of `Qwen3ForCausalLM`
    model       class of its models
    names       its name table
    fields      fields of config.json that `read` implements
    read        reads those fields into arguments of `config`
    write       writes them from a config
    only        {field: value}: fields of config.json of which one value is implemented
    head_dim    width of a head where config.json names none; None: hidden_size over the number of heads
    longest     max_position_embeddings where config.json names none
    """

    model_type: str
    name: str
    model: type[Decoder]
    names: tuple[Entry, ...]
    fields: frozenset[str]
    read: Callable[[Fields], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    head_dim: int | None = None
    longest: int = 32768

    @property
    def config(self) -> type[DecoderConfig]:
        """The class of its configs."""
        return self.model.config_class

    def architecture(self, task: Task) -> str:
        """transformers' class for a task."""
        return f"{self.name}{SUFFIXES[task]}"

    def tensors(self, config: DecoderConfig, prefixes: tuple[str, str] | None = None) -> dict[str, Expected]:
        """`{name in the checkpoint: (path, shape, expert)}` of every tensor of a model, without the scales.

        prefixes  an entry of PREFIXES; None: the one that transformers writes
        """
        return expected_tensors(self.names, config, prefixes)
