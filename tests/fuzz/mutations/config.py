"""Mutations of config.json and generation_config.json."""

from __future__ import annotations

import json
import random
from typing import Any

from .in_bytes import mutate_bytes, random_count
from .in_json import dumps, json_bytes, junk, name, number, plain
from .inputs import CONFIG, GENERATION, SMALL, Input, seed_checkpoint, something_else

_YARN_FIELDS = "attention_factor beta_fast beta_slow factor mscale mscale_all_dim rope_theta truncate".split()
_FIELDS = (
    "model_type hidden_act hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim vocab_size max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters attention_bias "
    "tie_word_embeddings use_sliding_window sliding_window max_window_layers layer_types torch_dtype dtype "
    "eos_token_id pad_token_id quantization_config use_qk_norm architectures id2label num_labels unknown_field"
).split()
_QUANTIZATION = (
    "quant_method fmt activation_scheme weight_block_size modules_to_not_convert dequantize scale_fmt x"
).split()


def _field(rng: random.Random, config: dict[str, Any]) -> None:
    config[rng.choice(_FIELDS)] = junk(rng)


def _sizes(rng: random.Random, config: dict[str, Any]) -> None:
    sizes = [field for field in _FIELDS if field.endswith(("size", "heads", "layers", "dim", "embeddings"))]
    config[rng.choice(sizes)] = rng.choice([0, -1, 1, 2, 7, 1000, 9_999, 10_000, 10_001, 2**31 - 1, 2**31, 2**62])


def _rope(rng: random.Random, config: dict[str, Any]) -> None:
    where = rng.choice(["rope_scaling", "rope_parameters"])
    settings = {rng.choice(["rope_type", "type"]): rng.choice(["yarn", "yarn", "default", "linear", 1])}
    for field in rng.sample([*_YARN_FIELDS, "original_max_position_embeddings"], rng.randrange(6)):
        settings[field] = rng.choice(
            [0, 1, 1.0, 2, -10, 0.1, -14.426950408889634, 1e29, 1e-300, 2**31 - 1, number(rng)]
        )
    config[where] = settings


def _quantization(rng: random.Random, config: dict[str, Any]) -> None:
    settings = config.get("quantization_config")
    if not isinstance(settings, dict):
        settings = dict(SMALL["quantization_config"])
    settings = dict(settings)
    field = rng.choice(_QUANTIZATION)
    settings[field] = junk(rng)
    if field == "weight_block_size":
        settings[field] = rng.choice([[number(rng), number(rng)], [4, number(rng)], [2**31, 2**31], [2**62] * 2, [4]])
    elif field == "modules_to_not_convert":
        names = [f"model.layers.{i}.mlp" for i in range(random_count(rng))]
        settings[field] = rng.choice([names, ["", "."], ["lm_head", name(rng)], ["model"], settings[field]])
    config["quantization_config"] = settings


def config_fields() -> tuple[str, ...]:
    """Fields of a config.json; one within another after a dot."""
    return (
        *_FIELDS,
        *(f"quantization_config.{field}" for field in _QUANTIZATION),
        *(f"rope.{f}" for f in _YARN_FIELDS),
    )


def with_field(config: bytes, field: str, value: Any) -> bytes:
    """A config.json with another value of one of `config_fields`."""
    changed = json.loads(config)
    within, _, inner = field.rpartition(".")
    if within == "rope":
        changed["rope_scaling"] = {"rope_type": "yarn", "factor": 2.0, inner: value}
    elif within:
        changed[within][inner] = value
    else:
        changed[inner] = value
    return json.dumps(changed).encode()


_CONFIG_MOVES = (_field, _field, _sizes, _rope, _quantization)


def config_input(rng: random.Random) -> Input:
    files: dict[str, Any] = seed_checkpoint(rng)
    generation = {"eos_token_id": [3, 4], "pad_token_id": 5, "temperature": 0.6}
    if rng.random() < 0.5:
        files[GENERATION] = json.dumps(generation).encode()
    file = rng.choice([CONFIG, CONFIG, CONFIG, CONFIG, GENERATION])
    if special := something_else(rng, files, file):
        return special
    value = json.loads(files[CONFIG]) if file == CONFIG else generation
    way = rng.randrange(10)
    if way == 0:
        return Input("config", "bytes", {**files, file: mutate_bytes(rng, json.dumps(value).encode())})
    if way < 4 or file == GENERATION:
        text, label = json_bytes(rng, value)
        return Input("config", label, {**files, file: text})
    moves = [rng.choice(_CONFIG_MOVES) for _ in range(rng.choice([1, 1, 2, 3]))]
    for move in moves:
        move(rng, value)
    label = "+".join(move.__name__.strip("_") for move in moves)
    return Input("config", label, {**files, file: dumps(plain(value)).encode("utf-8", "surrogatepass")})
