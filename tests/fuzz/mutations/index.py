"""Mutations of model.safetensors.index.json, which says in which file each tensor is."""

from __future__ import annotations

import json
import random
from typing import Any

from .in_bytes import mutate_bytes, random_count
from .in_json import Pairs, dumps, json_bytes, name, plain
from .inputs import INDEX, SHARDS, Input, seed_checkpoint, something_else


def _many_files(rng: random.Random, value: Pairs) -> None:
    """More shards, or more tensors, than the folder has."""
    weights = value[1][1]
    count = random_count(rng, 20_000)
    if rng.random() < 0.5:
        weights += [[f"t{i}", f"model-{i:05}.safetensors"] for i in range(count)]
    else:
        weights += [[f"t{i}", rng.choice(SHARDS)] for i in range(count)]


def _wrong_file(rng: random.Random, value: Pairs) -> None:
    for _ in range(rng.choice([1, 1, 3])):
        rng.choice(value[1][1])[1] = name(rng)


def _wrong_tensor(rng: random.Random, value: Pairs) -> None:
    for _ in range(rng.choice([1, 1, 3])):
        rng.choice(value[1][1])[0] = name(rng)


def _other_shard(rng: random.Random, value: Pairs) -> None:
    rng.choice(value[1][1])[1] = rng.choice(SHARDS)


def _no_entry(rng: random.Random, value: Pairs) -> None:
    del value[1][1][rng.randrange(len(value[1][1]))]


def index_input(rng: random.Random) -> Input:
    files: dict[str, Any] = seed_checkpoint(rng, 2)
    if special := something_else(rng, files, INDEX):
        return special
    if rng.random() < 0.15:
        return Input("index", "bytes", {**files, INDEX: mutate_bytes(rng, files[INDEX])})
    value = plain(json.loads(files[INDEX]))
    if rng.random() < 0.5:
        moves = (_many_files, _wrong_file, _wrong_file, _wrong_tensor, _other_shard, _no_entry)
        done = [rng.choice(moves) for _ in range(rng.choice([1, 1, 2]))]
        for move in done:
            move(rng, value)
        text, label = dumps(value).encode(), "+".join(move.__name__.strip("_") for move in done)
    else:
        text, label = json_bytes(rng, value)
    return Input("index", label, {**files, INDEX: text})
