"""A decoder's config.json: every field is implemented, known to change nothing, or refused by name."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...models.config import DecoderConfig
from ...models.heads import CLASSIFICATION, Task
from ...policies.dtypes import as_dtype, is_activation, is_narrow
from ...policies.errors import UnknownDtype, UnsupportedExport, named, shown
from ..fields import Fields
from ..json_file import read_json
from .family import Family
from .quantization import quantization_to_json, read_quantization
from .rope import read_rope, rope_to_json

# Accepted and unused: fields for training, for transformers itself or for a tokenizer. Two are read all the same:
# `architectures` tells the task, `id2label` and `label2id` the classes of a classifier.
_CHANGES_NOTHING = frozenset(
    """
    architectures _attn_implementation_autoset attention_dropout auto_map bos_token_id chunk_size_feed_forward
    classifier_dropout do_sample id2label initializer_range is_decoder is_encoder_decoder is_llama_config label2id
    max_length max_sequence_length name_or_path _name_or_path output_attentions output_hidden_states
    output_router_logits problem_type return_dict router_aux_loss_coef temperature tokenizer_class top_k top_p
    torchscript transformers.js_config transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()
)
_ONLY: Mapping[str, Any] = {
    "add_cross_attention": False,
    "hidden_act": "silu",
    "pruned_heads": {},
    "tie_encoder_decoder": False,
    "token_classification_bias": True,
}
"""Fields of which one value is implemented, for every family."""

_IMPLEMENTED = frozenset(
    """
    dtype eos_token_id head_dim hidden_size intermediate_size max_position_embeddings model_type
    num_attention_heads num_hidden_layers num_key_value_heads num_labels pad_token_id quantization_config rms_norm_eps
    rope_parameters rope_scaling rope_theta tie_word_embeddings torch_dtype vocab_size
    """.split()
)

WINDOWS = frozenset({"layer_types", "max_window_layers", "sliding_window", "use_sliding_window"})
"""The fields that `read_windows` implements."""

# Far above any model; a damaged config must not take minutes.
_MOST_LAYERS = 1000
_MOST_LABELS = 100_000


def read_decoder(config: Fields, family: Family, task: Task) -> dict[str, Any]:
    """The arguments of a `DecoderConfig` that all families share.

    Raises:
      UnsupportedConfig: a field or value that is not implemented, by name.
      InvalidCheckpoint: a field of the wrong type or out of range.
    """
    only = {**_ONLY, **family.only}
    for field, implemented in only.items():
        if (value := config.values.get(field)) not in (None, implemented):
            raise config.unsupported(f"{field} = {shown(value)} is not implemented. Implemented: {implemented!r}.")
    accepted = _IMPLEMENTED | _CHANGES_NOTHING | family.fields | only.keys()
    if unknown := sorted(key for key, value in config.values.items() if key not in accepted and value is not None):
        listed = ", ".join(f"{named(key)} = {shown(config.values[key])}" for key in unknown[:5])
        raise config.unsupported(f"fields that are not implemented: {listed}. Remove them if they change nothing.")
    hidden, heads, layers = config.size("hidden_size"), config.size("num_attention_heads"), _layers(config)
    kv_heads = config.size("num_key_value_heads", heads)
    width = config.size("head_dim", family.head_dim or max(hidden // heads, 1))
    if heads % kv_heads:
        raise config.invalid(f"{heads} attention heads do not divide among {kv_heads} key-value heads.")
    if width % 2:
        raise config.invalid(f"head_dim {width} is odd, and RoPE rotates pairs.")
    longest = config.size("max_position_embeddings", family.longest)
    theta, scaling = read_rope(config, longest)
    return {
        "vocab_size": config.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": config.size("intermediate_size"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width,
        "max_position_embeddings": longest,
        "rms_norm_eps": config.positive("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.get("tie_word_embeddings", bool, False),
        "dtype": _dtype(config),
        "quantization": read_quantization(config),
        "eos_token_id": config.token_ids("eos_token_id"),
        "pad_token_id": next(iter(config.token_ids("pad_token_id")), None),
        "task": task,
        "id2label": _labels(config) if task in CLASSIFICATION else (),
    }


def decoder_to_json(config: DecoderConfig) -> dict[str, Any]:
    """The fields of a config.json that all families share; absent fields are None."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope_to_json(config.rope_scaling),
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": config.dtype and config.dtype.name,
        "eos_token_id": config.eos_token_id[0] if len(config.eos_token_id) == 1 else list(config.eos_token_id) or None,
        "pad_token_id": config.pad_token_id,
        "id2label": {str(i): label for i, label in enumerate(config.id2label)} or None,
        "label2id": {label: i for i, label in enumerate(config.id2label)} or None,
        "quantization_config": quantization_to_json(config.quantization),
    }


def read_windows(config: Fields) -> tuple[int | None, ...]:
    """The sliding window of each layer; () where every layer attends to all tokens.

    Raises:
      UnsupportedConfig, InvalidCheckpoint: layer types that are not implemented, or do not fit the other fields.
    """
    layers, window = _layers(config), None
    # An absent sliding_window means 4096, as in transformers; null means none.
    if config.get("use_sliding_window", bool, False) and config.values.get("sliding_window", 4096) is not None:
        window = config.size("sliding_window", 4096)
    kinds = config.get("layer_types", list)
    if kinds is None:
        first = config.get("max_window_layers", int, 28)
        kinds = ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
    if len(kinds) != layers:
        raise config.invalid(f"layer_types names {len(kinds)} layers, num_hidden_layers is {layers}.")
    if unknown := sorted({str(kind) for kind in kinds} - {"full_attention", "sliding_attention"}):
        raise config.unsupported(f"layer_types: {shown(unknown[0])} is not implemented.")
    sliding = "sliding_attention" in kinds
    if window is None and sliding:
        raise config.invalid("layer_types has sliding layers, but there is no sliding_window in use.")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds) if sliding else ()


def windows_to_json(config: DecoderConfig) -> dict[str, Any]:
    """The fields of sliding windows.

    Raises:
      UnsupportedExport: windows that differ between layers, since a config.json can have only one.
    """
    windows = sorted({window for window in config.windows if window is not None})
    if len(windows) > 1:
        raise UnsupportedExport(
            f"sliding windows of {windows} tokens: a config.json can have only one. Use the same for all layers."
        )
    return {
        "use_sliding_window": bool(windows),
        "sliding_window": windows[0] if windows else None,
        "layer_types": [
            "full_attention" if config.window(i) is None else "sliding_attention"
            for i in range(config.num_hidden_layers)
        ],
    }


def unused_fields(source: pathlib.Path | None) -> dict[str, Any]:
    """The fields of a config.json that only other programs use; {} if the file no longer exists."""
    if source is None or not source.is_file():
        return {}
    return {name: value for name, value in read_json(source).items() if name in _CHANGES_NOTHING}


def _labels(config: Fields) -> tuple[str, ...]:
    """The names of the classes by id; without id2label and label2id, those that transformers gives them."""
    given, field = config.get("id2label", dict), "id2label"
    if given is None and (ids := config.get("label2id", dict)):
        given, field = {str(i): label for label, i in ids.items()}, "label2id"
        if len(given) < len(ids):
            raise config.invalid(f"label2id: expected one name for each id, found {shown(ids)}.")
    count = config.size("num_labels", 2 if given is None else max(len(given), 1))
    if count > _MOST_LABELS:
        raise config.invalid(f"num_labels: expected at most {_MOST_LABELS}, found {count}.")
    if given is None:
        return tuple(f"LABEL_{i}" for i in range(count))
    labels = [given.get(str(i)) for i in range(count)]
    if len(given) != count or not all(isinstance(label, (str, int)) for label in labels):
        raise config.invalid(
            f"{field}: expected a name for each of the ids 0 to {count - 1}, the classes of the head, found "
            f"{shown(given)}."
        )
    return tuple(map(str, labels))


def _layers(config: Fields) -> int:
    layers = config.size("num_hidden_layers")
    if layers > _MOST_LAYERS:
        raise config.invalid(f"num_hidden_layers: expected at most {_MOST_LAYERS}, found {layers}.")
    return layers


def _dtype(config: Fields) -> np.dtype | None:
    """The dtype to run in; None where the config names a narrow one, since it then means the embedding's dtype."""
    name = config.get("dtype", str) or config.get("torch_dtype", str)
    if name is None:
        return None
    try:
        dtype = as_dtype(name.removeprefix("torch."))
    except UnknownDtype as error:
        raise config.unsupported(f"torch_dtype: {error}") from error
    if is_narrow(dtype):
        return None
    if not is_activation(dtype):
        raise config.unsupported(f"torch_dtype {shown(name)}: a model runs in float32, bfloat16 or float16.")
    return dtype
