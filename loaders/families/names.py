"""Name tables: the name of each tensor in a checkpoint, its path in the model, and its shape.

A kernel may have scales: `….weight_scale_inv` or `….weight_scale` beside `….weight`.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Container, Sequence
from typing import Literal, NamedTuple

from ...models.config import DecoderConfig

Axis = Literal["vocabulary", "hidden", "intermediate", "expert", "experts", "queries", "keys", "head", "classes"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of a name table: one tensor, or one per layer if the name contains `{i}`, and per expert with `{e}`.

    name     in the checkpoint
    path     in the model
    shape    axes; `axis_sizes` has their sizes
    present  whether a layer of a model of a config has the tensor; the layer is 0 for an entry outside of layers

    The tensors of a layer's experts have one path: they are stacked along a new first axis, in the order of their
    numbers.
    """

    name: str
    path: str
    shape: tuple[Axis, ...]
    present: Callable[[DecoderConfig, int], bool] = lambda config, layer: True


class Expected(NamedTuple):
    """A tensor that a checkpoint must have: the path of its parameter, its own shape, and its place in the parameter.

    expert  index along the parameter's first axis; None: the tensor is the whole parameter
    """

    path: str
    shape: tuple[int, ...]
    expert: int | None = None


def norm(module: str, axis: Axis) -> Entry:
    """The entry of a norm; `module` is its name in the checkpoint."""
    return Entry(f"{module}.weight", f"{_path(module)}/scale", (axis,))


def linear(
    module: str,
    out: Axis,
    features: Axis,
    present: Callable[[DecoderConfig, int], bool] = lambda config, layer: True,
) -> tuple[Entry, Entry]:
    """The entries of a projection's kernel and bias; `module` is its name in the checkpoint."""
    projection = module.rpartition(".")[2]

    def has_bias(config: DecoderConfig, layer: int) -> bool:
        return present(config, layer) and config.use_bias(projection)

    return (
        Entry(f"{module}.weight", f"{_path(module)}/kernel", (out, features), present),
        Entry(f"{module}.bias", f"{_path(module)}/bias", (out,), has_bias),
    )


def mixture(module: str) -> tuple[Entry, ...]:
    """The entries of a mixture of experts in layers that have one; `module` is its name in the checkpoint."""

    def expert(projection: str, out: Axis, features: Axis) -> Entry:
        path = f"{_path(module)}/experts/{projection}/kernel"
        return Entry(f"{module}.experts.{{e}}.{projection}.weight", path, (out, features), _is_sparse)

    return (
        Entry(f"{module}.gate.weight", f"{_path(module)}/gate/kernel", ("experts", "hidden"), _is_sparse),
        expert("gate_proj", "expert", "hidden"),
        expert("up_proj", "expert", "hidden"),
        expert("down_proj", "hidden", "expert"),
    )


def _is_sparse(config: DecoderConfig, layer: int) -> bool:
    return config.experts(layer) > 0


def _is_dense(config: DecoderConfig, layer: int) -> bool:
    return config.experts(layer) == 0


def _path(module: str) -> str:
    return module.removeprefix("model.").replace(".", "/")


_LAYER = "model.layers.{i}"
_EMBEDDING = (Entry("model.embed_tokens.weight", "embed_tokens/embedding", ("vocabulary", "hidden")),)
_ATTENTION = (
    norm(f"{_LAYER}.input_layernorm", "hidden"),
    *linear(f"{_LAYER}.self_attn.q_proj", "queries", "hidden"),
    *linear(f"{_LAYER}.self_attn.k_proj", "keys", "hidden"),
    *linear(f"{_LAYER}.self_attn.v_proj", "keys", "hidden"),
    *linear(f"{_LAYER}.self_attn.o_proj", "hidden", "queries"),
)
_MLP = (
    norm(f"{_LAYER}.post_attention_layernorm", "hidden"),
    *linear(f"{_LAYER}.mlp.gate_proj", "intermediate", "hidden", _is_dense),
    *linear(f"{_LAYER}.mlp.up_proj", "intermediate", "hidden", _is_dense),
    *linear(f"{_LAYER}.mlp.down_proj", "hidden", "intermediate", _is_dense),
)
_HEAD = (
    norm("model.norm", "hidden"),
    Entry("lm_head.weight", "lm_head/kernel", ("vocabulary", "hidden"), lambda config, _: config.head == "lm_head"),
    Entry("score.weight", "score/kernel", ("classes", "hidden"), lambda config, _: config.head == "score"),
    Entry("score.bias", "score/bias", ("classes",), lambda config, _: config.task == "token_classification"),
)


def decoder_names(*own: Entry) -> tuple[Entry, ...]:
    """The name table of a decoder whose layers have the tensors `own` in addition to those of every decoder."""
    return (*_EMBEDDING, *_ATTENTION, *own, *_MLP, *_HEAD)


def axis_sizes(config: DecoderConfig) -> dict[Axis, int]:
    """The size of every axis."""
    return {
        "vocabulary": config.vocab_size,
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "expert": config.expert_size,
        "experts": max(map(config.experts, range(config.num_hidden_layers)), default=0),
        "queries": config.num_attention_heads * config.head_dim,
        "keys": config.num_key_value_heads * config.head_dim,
        "head": config.head_dim,
        "classes": len(config.id2label),
    }


WITHOUT_HEAD = ("", "")
PREFIXES = (("model.", ""), WITHOUT_HEAD, ("model.language_model.", ""), ("language_model.model.", "language_model."))
"""Prefixes of the names of the body and of the head: in published files, in those of a model without its head, and in
those of language models that were part of a multimodal model."""


def prefixes(names: Container[str]) -> tuple[str, str]:
    """The entry of PREFIXES that the name of the embedding has; the first one without an embedding."""
    return next((each for each in PREFIXES if f"{each[0]}embed_tokens.weight" in names), PREFIXES[0])


def expected_tensors(
    table: Sequence[Entry], config: DecoderConfig, prefixes: tuple[str, str] | None = None
) -> dict[str, Expected]:
    """`{name in the checkpoint: (path, shape, expert)}` of every tensor of a model; see `Family.tensors`."""
    sizes, tensors = axis_sizes(config), dict[str, Expected]()
    if prefixes is None:
        prefixes = WITHOUT_HEAD if config.task == "feature_extraction" else PREFIXES[0]
    for in_layers, group in itertools.groupby(table, key=lambda entry: "{i}" in entry.name):
        entries = list(group)
        for i, entry in itertools.product(range(config.num_hidden_layers if in_layers else 1), entries):
            if not entry.present(config, i):
                continue
            path, shape = entry.path.format(i=i), tuple(sizes[axis] for axis in entry.shape)
            for expert in range(config.experts(i)) if "{e}" in entry.name else [None]:
                name = entry.name.format(i=i, e=expert)
                name = f"{prefixes[0]}{name[6:]}" if name.startswith("model.") else f"{prefixes[1]}{name}"
                tensors[name] = Expected(path, shape, expert)
    return tensors


def reason_left_out(name: str, config: DecoderConfig) -> str | None:
    """The reason why the model has no parameter for a tensor, if its config explains that; else None."""
    if config.head != "lm_head" and re.search(r"lm_head\.weight(_scale(_inv)?)?$", name):
        return "the head is tied to the embedding" if config.task == "causal_lm" else "the model has no such head"
    if name.endswith("rotary_emb.inv_freq"):
        return "frequencies are computed from rope_theta"
    return None
