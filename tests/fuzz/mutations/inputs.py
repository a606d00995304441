"""One hostile input, and the small checkpoints without a fault that such inputs are made from."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from collections.abc import Mapping
from typing import Any

import checkpoints

CONFIG, GENERATION, WHOLE, INDEX, POLICY = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "policy.yaml",
)
TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

FIFO, FOLDER, LOOP, ENDLESS = "fifo", "folder", "loop", "endless"
"""What may stand where a file is expected: a pipe nobody writes to, a folder, a link to itself, a device."""

KIND_OF = {CONFIG: "config", GENERATION: "config", INDEX: "index", POLICY: "policy"}


@dataclasses.dataclass(frozen=True)
class Input:
    """One hostile input.

    kind   "safetensors", "index", "config", "policy", "tokenizer" or "template"
    label  the mutations that made it
    files  content by name; a str is one of FIFO, FOLDER, LOOP and ENDLESS
    """

    kind: str
    label: str
    files: Mapping[str, bytes | str]


def something_else(rng: random.Random, files: dict[str, Any], file: str, kind: str | None = None) -> Input | None:
    """Now and then, something in place of `file` that is no file; `kind` is the input's, if `file` does not say it."""
    if rng.random() > 0.003:
        return None
    what = rng.choice([FIFO, FOLDER, LOOP, ENDLESS])
    return Input(kind or KIND_OF.get(file, "safetensors"), what, {**files, file: what})


# Checkpoints that are read without complaint.

SMALL = {
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 11,
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [4, 4],
        "modules_to_not_convert": ["lm_head"],
    },
}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "mscale": 1.0}
_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"quantization_config": None, "tie_word_embeddings": True},
    {"attention_bias": True, "rope_scaling": {**_YARN, "mscale_all_dim": 0.5}},
    {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "num_hidden_layers": 3},
    {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "eos_token_id": [3, 4]},
    {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True, "sliding_window": 3},
)


@functools.cache
def _seed(variant: int, shards: int) -> Mapping[str, bytes]:
    """The files of a checkpoint without a fault."""
    config = checkpoints.fields(**{**SMALL, **_VARIANTS[variant]})
    arrays = checkpoints.tensors(config)
    files = {CONFIG: json.dumps(config).encode()}
    if shards == 1:
        return files | {WHOLE: checkpoints.safetensors_bytes(arrays, format="pt")}
    placed = {name: SHARDS[i % 2] for i, name in enumerate(arrays)}
    for shard in SHARDS:
        files[shard] = checkpoints.safetensors_bytes({n: a for n, a in arrays.items() if placed[n] == shard})
    return files | {INDEX: json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}).encode()}


def seed_checkpoint(rng: random.Random, shards: int = 1) -> dict[str, bytes]:
    """The files of one of a few sound checkpoints, by name."""
    return dict(_seed(rng.randrange(len(_VARIANTS)), shards))


def sound_checkpoint() -> dict[str, bytes]:
    """The files of a checkpoint without a fault, by name."""
    return dict(_seed(0, 1))
