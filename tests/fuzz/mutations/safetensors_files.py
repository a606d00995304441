"""Mutations of safetensors files: of their header, its length, and the data behind it."""

from __future__ import annotations

import json
import random
from typing import Any

import checkpoints

from .in_bytes import in_another_encoding, mutate_bytes, random_count
from .in_json import Pairs, Raw, dumps, json_bytes, junk, mutate_json, name, plain
from .inputs import SHARDS, WHOLE, Input, seed_checkpoint, something_else


def _split(data: bytes) -> tuple[Pairs, bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return plain(json.loads(data[8:end])), data[end:]


def _fields(rng: random.Random, header: Pairs) -> Pairs:
    """The dtype, shape and data_offsets of one tensor."""
    return rng.choice([value for key, value in header if key != "__metadata__"])


def _with(fields: Pairs, key: str, value: Any) -> None:
    for pair in fields:
        if pair[0] == key:
            pair[1] = value


def _get(fields: Pairs, key: str) -> Any:
    return next(value for name, value in fields if name == key)


def _dims(rng: random.Random, header: Pairs, data: bytes) -> bytes:
    """A shape of too many or too large dimensions; often of the right number of bytes."""
    fields = _fields(rng, header)
    begin, end = _get(fields, "data_offsets")
    count = end - begin
    shape = rng.choice(
        [
            [count, *[1] * rng.choice([30, 31, 63, 64, 65, 300])],
            [2**63 - 1] * rng.choice([1, 2, 60, 300]),
            [0, 2**63 - 1, 2**63 - 1],
            [0, *[2**62] * 3],
            [2**32, 2**32],
            [2**62, 4, count],
            [-1, -count],
            [True, count],
            [float(count)],
            [],
            Raw("[" + ",".join([str(rng.choice([0, 1, 2, 2**62]))] * random_count(rng)) + "]"),
        ]
    )
    _with(fields, "shape", shape)
    if rng.random() < 0.7:
        _with(fields, "dtype", rng.choice(["U8", "I8", "F8_E4M3", "F8_E5M2", "BOOL", "F8_E8M0"]))
    if rng.random() < 0.3:  # no bytes at all, as the shape may promise
        header.append(["empty", plain({"dtype": "U8", "shape": [], "data_offsets": [end, end]})])
        _with(header[-1][1], "shape", shape)
    return data


def _offsets(rng: random.Random, header: Pairs, data: bytes) -> bytes:
    """Offsets that overlap, leave holes, run backwards or past the end, or are swapped with another tensor's."""
    fields, other = _fields(rng, header), _fields(rng, header)
    begin, end = _get(fields, "data_offsets")
    move = rng.choice([-8, -1, 1, 2, 8, 2**31, 2**63 - 1, 2**64])
    choices = [
        [begin + move, end + move], [begin, end + move], [begin + move, end], [end, begin], [begin], [begin, end, end],
        [0, 0], [len(data), len(data)], [0, len(data)], [float(begin), float(end)], [str(begin), str(end)],
        [False, end], [[begin], [end]], _get(other, "data_offsets"), [2**63 - 1, 2**63 - 1],
    ]  # fmt: skip
    _with(fields, "data_offsets", rng.choice(choices))
    return data


def _dtype(rng: random.Random, header: Pairs, data: bytes) -> bytes:
    """A dtype that is unknown, of another width, or refused by JAX."""
    known = "F64 F32 F16 BF16 F8_E4M3 F8_E5M2 F8_E8M0 I64 I32 I16 I8 U64 U32 U16 U8 BOOL C64 F4 F6_E2M3".split()
    strange = ["f32", "float32", "", "O", "object", "<f4", "V8", "S1", "M8", "(2,)f4", "F32,F32", "bf16\0", name(rng)]
    for _ in range(rng.choice([1, 1, 5])):
        _with(_fields(rng, header), "dtype", rng.choice(known + strange))
    return data


def _many(rng: random.Random, header: Pairs, data: bytes) -> bytes:
    """Many tensors without data, and now and then one of their names a second time."""
    count = random_count(rng, rng.choice([100, 1000, 5000, 20_000]))
    end = max([_get(value, "data_offsets")[1] for key, value in header if key != "__metadata__"], default=0)
    names = [f"t{i}" for i in range(count)]
    twice = rng.choice([[], [], names[-1:], names])
    # Lists of its own for each, so that what changes one changes no other.
    header += [
        [name, Pairs([["dtype", "F32"], ["shape", [0]], ["data_offsets", [end, end]]])] for name in names + twice
    ]
    return data


def _swap_names(rng: random.Random, header: Pairs, data: bytes) -> bytes:
    one, two = rng.choice(header), rng.choice(header)
    one[0], two[0] = two[0], one[0]
    return data


def _scales(rng: random.Random, header: Pairs, data: bytes) -> bytes:
    """Data that a header cannot vouch for: NaN, infinity and noise in weights and scales."""
    if not data:
        return data
    at = rng.randrange(len(data))
    noise = rng.choice([b"\xff\xff", b"\x7f\x80", b"\0\0", b"\x80\x7f", rng.randbytes(8)]) * rng.choice([1, 9, 999])
    return (data[:at] + noise + data[at + len(noise) :])[: len(data)]


def _metadata(rng: random.Random, header: Pairs, data: bytes) -> bytes:
    header.insert(rng.randrange(len(header) + 1), ["__metadata__", junk(rng)])
    return data


def safetensors_of(header: Any, data: bytes) -> bytes:
    """A safetensors file with any header."""
    return checkpoints.file_bytes(json.dumps(header), data)


def _length(rng: random.Random, header: bytes) -> int:
    true = len(header)
    return rng.choice([max(true - 1, 0), true + 1, 0, 1, 2, true * 2, 100_000_001, 2**31, 2**63 - 1, 2**63, 2**64 - 1])


def _json_move(rng: random.Random, header: Pairs, data: bytes) -> bytes:
    mutate_json(rng, header)
    return data


_HEADER_MOVES = (_dims, _offsets, _dtype, _many, _swap_names, _scales, _metadata, _json_move, _json_move)


def safetensors_file(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """A safetensors file after mutations of its header, its length, its data or its bytes, and their names."""
    way = rng.randrange(10)
    if way == 0:
        return mutate_bytes(rng, data), "bytes"
    if way == 1:
        end = 8 + int.from_bytes(data[:8], "little")
        return mutate_bytes(rng, data[:end]) + data[end:], "header bytes"
    header, rest = _split(data)
    if way == 2:
        whole, what = json_bytes(rng, header)
        return checkpoints.file_bytes(whole, rest), f"header {what}"
    done = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        move = rng.choice(_HEADER_MOVES)
        try:
            rest = move(rng, header, rest)
        except (IndexError, StopIteration, TypeError, ValueError, AttributeError):
            continue  # an earlier mutation took what this one changes
        done.append(move.__name__.strip("_"))
    text = dumps(header).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        text, what = in_another_encoding(rng, text)
        done.append(what)
    length = None
    if rng.random() < 0.08:
        length = _length(rng, text)
        done.append("length")
    if rng.random() < 0.08:
        cut = rng.choice([0, 1, len(rest) - 1, rng.randrange(len(rest) + 1)])
        rest = rng.choice([rest[:cut], rest + b"\0", rest + b"\0" * random_count(rng), b""])
        done.append("data length")
    return checkpoints.file_bytes(text, rest, length), "+".join(done)


def safetensors_input(rng: random.Random) -> Input:
    if rng.random() < 0.01:
        count = rng.randrange(20)
        return Input("safetensors", "short", {**seed_checkpoint(rng), WHOLE: rng.randbytes(count)})
    shards = rng.choice([1, 1, 2])
    files = seed_checkpoint(rng, shards)
    file = WHOLE if shards == 1 else rng.choice(SHARDS)
    if special := something_else(rng, files, file):
        return special
    files[file], label = safetensors_file(rng, files[file])
    return Input("safetensors", label, files)
