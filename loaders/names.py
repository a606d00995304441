"""The name table: what a Qwen3 checkpoint calls each tensor, where it stands in the model, and its shape.

A matrix may have scales: `….weight_scale_inv` beside `….weight`, at the scale's path, one a block.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Container
from typing import Literal

from ..models.config import Qwen3Config

Axis = Literal["vocabulary", "hidden", "wide", "queries", "keys", "head"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor, or with `{i}` one a layer.

    name   in the checkpoint
    path   in the model
    shape  axes, as `axes` sizes them
    when   the config field that must be true for the tensor to be there; "untied" for the head
    """

    name: str
    path: str
    shape: tuple[Axis, ...]
    when: Literal["always", "attention_bias", "untied"] = "always"


_ATTENTION, _MLP = "model.layers.{i}.self_attn", "model.layers.{i}.mlp"
TABLE = (
    Entry("model.embed_tokens.weight", "embed_tokens/embedding", ("vocabulary", "hidden")),
    Entry("model.layers.{i}.input_layernorm.weight", "layers/{i}/input_layernorm/scale", ("hidden",)),
    Entry(f"{_ATTENTION}.q_proj.weight", "layers/{i}/self_attn/q_proj/kernel", ("queries", "hidden")),
    Entry(f"{_ATTENTION}.q_proj.bias", "layers/{i}/self_attn/q_proj/bias", ("queries",), "attention_bias"),
    Entry(f"{_ATTENTION}.k_proj.weight", "layers/{i}/self_attn/k_proj/kernel", ("keys", "hidden")),
    Entry(f"{_ATTENTION}.k_proj.bias", "layers/{i}/self_attn/k_proj/bias", ("keys",), "attention_bias"),
    Entry(f"{_ATTENTION}.v_proj.weight", "layers/{i}/self_attn/v_proj/kernel", ("keys", "hidden")),
    Entry(f"{_ATTENTION}.v_proj.bias", "layers/{i}/self_attn/v_proj/bias", ("keys",), "attention_bias"),
    Entry(f"{_ATTENTION}.o_proj.weight", "layers/{i}/self_attn/o_proj/kernel", ("hidden", "queries")),
    Entry(f"{_ATTENTION}.o_proj.bias", "layers/{i}/self_attn/o_proj/bias", ("hidden",), "attention_bias"),
    Entry(f"{_ATTENTION}.q_norm.weight", "layers/{i}/self_attn/q_norm/scale", ("head",)),
    Entry(f"{_ATTENTION}.k_norm.weight", "layers/{i}/self_attn/k_norm/scale", ("head",)),
    Entry("model.layers.{i}.post_attention_layernorm.weight", "layers/{i}/post_attention_layernorm/scale", ("hidden",)),
    Entry(f"{_MLP}.gate_proj.weight", "layers/{i}/mlp/gate_proj/kernel", ("wide", "hidden")),
    Entry(f"{_MLP}.up_proj.weight", "layers/{i}/mlp/up_proj/kernel", ("wide", "hidden")),
    Entry(f"{_MLP}.down_proj.weight", "layers/{i}/mlp/down_proj/kernel", ("hidden", "wide")),
    Entry("model.norm.weight", "norm/scale", ("hidden",)),
    Entry("lm_head.weight", "lm_head/kernel", ("vocabulary", "hidden"), "untied"),
)


def axes(config: Qwen3Config) -> dict[Axis, int]:
    """The size of every axis."""
    return {
        "vocabulary": config.vocab_size,
        "hidden": config.hidden_size,
        "wide": config.intermediate_size,
        "queries": config.num_attention_heads * config.head_dim,
        "keys": config.num_key_value_heads * config.head_dim,
        "head": config.head_dim,
    }


TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""The files of a tokenizer."""

PREFIXES = (("model.", ""), ("", ""), ("model.language_model.", ""), ("language_model.model.", "language_model."))
"""What stands before the names of the body and of the head: in published files, in those of a bare Qwen3Model, and in
those taken from models that see or hear as well."""


def prefixes(names: Container[str]) -> tuple[str, str]:
    """Those of PREFIXES under which the embedding stands."""
    return next((each for each in PREFIXES if f"{each[0]}embed_tokens.weight" in names), PREFIXES[0])


def expected(config: Qwen3Config, prefixes: tuple[str, str] = PREFIXES[0]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """`{name in the checkpoint: (path, shape)}` of every tensor, scales apart, that a model of `config` has."""
    sizes = axes(config)
    present = {"always": True, "attention_bias": config.attention_bias, "untied": not config.tie_word_embeddings}
    entries = {}
    for in_layers, group in itertools.groupby(TABLE, key=lambda entry: "{i}" in entry.name):
        kept = [entry for entry in group if present[entry.when]]
        for i, entry in itertools.product(range(config.num_hidden_layers if in_layers else 1), kept):
            shape = tuple(sizes[axis] for axis in entry.shape)
            name = entry.name.format(i=i)
            name = f"{prefixes[0]}{name[6:]}" if name.startswith("model.") else f"{prefixes[1]}{name}"
            entries[name] = (entry.path.format(i=i), shape)
    return entries


def explained(name: str, config: Qwen3Config) -> str | None:
    """Why a tensor is left out that the model has no place for, where the config explains it."""
    if config.tie_word_embeddings and name.endswith(("lm_head.weight", "lm_head.weight_scale_inv")):
        return "the head is tied to the embedding"
    if name.endswith("rotary_emb.inv_freq"):
        return "frequencies follow from rope_theta"
    return None
