"""Hostile inputs for everything that reads files from elsewhere, each made from a kind, a seed and a number alone.

Two ways lead away from what is well-formed: structural mutations, which know JSON, safetensors and YAML, and reach what
lies behind the parsers; and mutations of bytes, which reach the parsers themselves.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from collections.abc import Callable, Mapping
from typing import Any

import checkpoints

CONFIG, GENERATION, WHOLE, INDEX, POLICY = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "policy.yaml",
)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

FIFO, FOLDER, LOOP, ENDLESS = "fifo", "folder", "loop", "endless"
"""What may stand where a file is expected: a pipe nobody writes to, a folder, a link to itself, a device."""


@dataclasses.dataclass(frozen=True)
class Input:
    """One hostile input.

    kind   "safetensors", "index", "config" or "policy"
    label  the mutations that made it
    files  content by name; a str is one of FIFO, FOLDER, LOOP and ENDLESS
    """

    kind: str
    label: str
    files: Mapping[str, bytes | str]


def make(kind: str, seed: int, number: int) -> Input:
    """The input of that kind, seed and number: always the same one."""
    rng = random.Random(f"{kind}/{seed}/{number}")
    return _KINDS[kind](rng)


# Seeds: small checkpoints that are read without complaint.

_SMALL = {
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
    config = checkpoints.fields(**{**_SMALL, **_VARIANTS[variant]})
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


# JSON that Python's own encoder would not write.


class Raw(str):
    """Text that stands in JSON as it is."""


class Pairs(list):
    """An object as pairs of key and value, so that a key can stand in it twice."""


def plain(value: Any) -> Any:
    """`value` with every mapping as `Pairs`."""
    if isinstance(value, dict):
        return Pairs([key, plain(one)] for key, one in value.items())
    return [plain(one) for one in value] if isinstance(value, list) else value


def dumps(value: Any) -> str:
    """The JSON of `value`, which may hold `Raw` and `Pairs`."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{dumps(key)}: {dumps(one)}" for key, one in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dumps, value)) + "]"
    return json.dumps(value)


def _size(rng: random.Random, most: int = 100_000) -> int:
    """A count, small ones as likely as large ones."""
    return min(most, int(10 ** rng.uniform(0, 5.01)))


def _depth(rng: random.Random) -> int:
    """How deep to nest: often close to the interpreter's limit, where parsing works and printing fails."""
    return rng.choice([rng.randrange(1, 200), rng.randrange(880, 1010), rng.randrange(880, 1010), _size(rng)])


def nested(rng: random.Random) -> Raw:
    """Brackets or braces within each other, closed or not."""
    depth = _depth(rng)
    begin, end = rng.choice([("[", "]"), ('{"a":', "}"), ('[{"a":', "}]"), ("[[],", "]")])
    return Raw(begin * depth + rng.choice(["1", "[]", '"x"', "null"]) + end * rng.choice([depth, depth, depth, 0]))


_NAMES: tuple[Callable[[random.Random], Any], ...] = (
    lambda rng: "",
    lambda rng: "a\0b",
    lambda rng: "\x1b[2J\x1b[31mred\r\n\x07",
    lambda rng: "../" * rng.randrange(1, 9) + "etc/passwd",
    lambda rng: "/etc/passwd",
    lambda rng: "..",
    lambda rng: ".",
    lambda rng: "C:\\windows\\x",
    lambda rng: rng.choice(["a", "é", "😀", "\x01", "/", "../"]) * _size(rng),
    lambda rng: rng.choice(["é", "文", "😀"]) * rng.randrange(60, 256),
    lambda rng: Raw(rng.choice(['"\\ud800"', '"\\udcff.safetensors"', '"a\\udfffb"', '"\\ud83d\\ude00"'])),
    lambda rng: "\u202e\u200b\u2028\x85",
    lambda rng: "__metadata__",
    lambda rng: "__proto__",
    lambda rng: rng.choice(["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]),
    lambda rng: f"model.layers.{rng.choice([-1, '01', 2, 10**9, '٣'])}.mlp.up_proj.weight",
    lambda rng: "model.layers.0.mlp.up_proj.weight_scale_inv" + rng.choice(["", "_scale_inv"]),
    lambda rng: rng.choice([CONFIG, WHOLE, INDEX, *SHARDS, SHARDS[0].upper(), " ", "\n", "~", "$HOME", "%s", "{0}"]),
)


def name(rng: random.Random) -> Any:
    """A name that a file or tensor should not have, as JSON text."""
    return rng.choice(_NAMES)(rng)


_NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 127, 128, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63),
    10**30, 10**400, 0.0, -0.0, 0.5, 1.0, 1.5, -2.5, 5e-324, 1e-30, 1e29, 1e30, 1e308, True, False,
    Raw("1e400"), Raw("-1e400"), Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("9" * 4300), Raw("9" * 4301),
    Raw("1E+2"), Raw("-0"), Raw("01"), Raw("1_000"), Raw("0x10"), Raw("1."), Raw(".5"), Raw("٣"),
)  # fmt: skip


def number(rng: random.Random) -> Any:
    """A number, some of them none that JSON knows."""
    return rng.choice(_NUMBERS)


def _repeated(rng: random.Random, item: str) -> Raw:
    """A list of one thing many times, of a megabyte at most."""
    return Raw("[" + ",".join([item] * min(_size(rng), (1 << 20) // len(item))) + "]")


_JUNK: tuple[Callable[[random.Random], Any], ...] = (
    number,
    number,
    number,
    name,
    nested,
    lambda rng: None,
    lambda rng: rng.choice(["", "x", "1", "true", "default", "yarn", "fp8", "bfloat16", "torch.float8_e4m3fn"]),
    lambda rng: rng.choice([[], Pairs(), [[]], [Pairs()], [None], Pairs([["a", Pairs()]])]),
    lambda rng: [number(rng) for _ in range(rng.randrange(5))],
    lambda rng: [name(rng) for _ in range(rng.randrange(5))],
    lambda rng: _repeated(rng, dumps(number(rng))),
    lambda rng: Raw("[" + ",".join(f'"m{i}"' for i in range(_size(rng))) + "]"),
    lambda rng: Raw("{" + ",".join(f'"k{i}":{i}' for i in range(_size(rng))) + "}"),
    lambda rng: Raw(rng.choice(["", "nul", "tru", "{", "]", "'x'", '"\x00"', '"\\x"', '"\\u12"', "//", ",", "[1,]"])),
)


def junk(rng: random.Random) -> Any:
    """A value of any type."""
    return rng.choice(_JUNK)(rng)


def _places(value: Any) -> list[tuple[list, int]]:
    """Every (container, position) below `value`, where a position of `Pairs` holds a [key, value] of its own."""
    found: list[tuple[list, int]] = []
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            found += [(node, i) for i in range(len(node))]
            waiting += [one[1] for one in node] if isinstance(node, Pairs) else node
    return found


def mutate_json(rng: random.Random, value: Any) -> Any:
    """`value` (lists and `Pairs`, changed in place) after one mutation."""
    places = _places(value)
    if not places or rng.random() < 0.02:
        return junk(rng)
    node, i = rng.choice(places)
    pairs = isinstance(node, Pairs)
    here, at = (node[i], 1) if pairs else (node, i)
    move = rng.randrange(10)
    if move < 4:
        here[at] = junk(rng)
    elif move == 4:
        old = here[at]
        if type(old) in (int, float):
            changes = [old + 1, old - 1, -old, old * 2, str(old), bool(old), [old], old * 2**32]
            if abs(old) < 2**1023:
                changes.append(float(old))
        else:
            changes = [[old], Pairs([["a", old]]), dumps(old), None]
        here[at] = rng.choice(changes)
    elif move == 5:
        del node[i]
    elif move == 6:
        # As many as make a megabyte: what a mutation before this one put in may be large itself.
        count = min(
            rng.choice([1, 1, 1, _size(rng, 2000)]), (1 << 20) // (1 + len(dumps(node[i][1] if pairs else node[i]))) + 1
        )
        node[i:i] = [list(node[i]) if pairs else node[i] for _ in range(count)]
        if pairs and rng.random() < 0.5:
            node[i][1] = junk(rng)
    elif move == 7 and pairs:
        here[0] = name(rng)
    elif move == 8:
        node.insert(i, [name(rng), junk(rng)] if pairs else junk(rng))
    else:
        other = rng.randrange(len(node))
        if pairs:
            node[i][1], node[other][1] = node[other][1], node[i][1]
        else:
            node[i], node[other] = node[other], node[i]
    return value


def json_bytes(rng: random.Random, value: Any) -> tuple[bytes, str]:
    """A JSON file's bytes made of `value`, and what was done to it."""
    value, done = plain(value), []
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        value = mutate_json(rng, value)
        done.append("json")
    try:
        data = dumps(value).encode("utf-8", "surrogatepass")
    except RecursionError:  # of our own writer
        data = b"[]"
    if rng.random() < 0.1:
        data, what = _encoded(rng, data)
        done.append(what)
    if rng.random() < 0.1:
        data = mutate_bytes(rng, data)
        done.append("bytes")
    return data, "+".join(done)


def _encoded(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """The same text in another encoding, or with something around it."""
    text = data.decode("utf-8", "replace")
    choices = {
        "bom": b"\xef\xbb\xbf" + data,
        "utf-16": text.encode("utf-16"),
        "utf-16-le": text.encode("utf-16-le"),
        "utf-32": text.encode("utf-32"),
        "latin": data + b"\xff\xfe\xe9",
        "garbage": data + b" {} x",
        "twice": data + data,
        "nul": data + b"\0" * _size(rng),
        "spaces": data + b" " * _size(rng),
        "newlines": b"\r\n" * _size(rng) + data,
        "empty": b"",
        "huge": data + b" " * rng.choice([1 << 20, 1 << 24, 17 << 20]),
    }
    what = rng.choice(sorted(choices))
    return choices[what], what


# Bytes.


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """`data` after a few flips, insertions, deletions, splices, repetitions and cuts."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        size = len(changed)
        at, to = rng.randrange(size + 1), rng.randrange(size + 1)
        length = rng.choice([1, 1, 2, 8, 64])
        move = rng.randrange(7)
        if move == 0 and at < size:
            changed[at] ^= 1 << rng.randrange(8)
        elif move == 1 and at < size:
            changed[at] = rng.choice(b'\0\xff\x7f\x80{}[]",:0-9eE.\\\n\t*&!%@`#?|><')
        elif move == 2:
            changed[at:at] = rng.randbytes(length)
        elif move == 3:
            del changed[at : at + length]
        elif move == 4:
            changed[to:to] = changed[at : at + length]
        elif move == 5:
            changed[at:at] = changed[at : at + length] * rng.choice([2, 10, 1000])
        elif move == 6:
            del changed[rng.choice([at, size - length, length]) :]
    return bytes(changed)


def _special(rng: random.Random, files: dict[str, Any], file: str) -> Input | None:
    """Now and then, something in place of `file` that is no file."""
    if rng.random() > 0.003:
        return None
    what = rng.choice([FIFO, FOLDER, LOOP, ENDLESS])
    return Input(_KIND_OF.get(file, "safetensors"), what, {**files, file: what})


# safetensors.


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
            Raw("[" + ",".join([str(rng.choice([0, 1, 2, 2**62]))] * _size(rng)) + "]"),
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
    count = _size(rng, rng.choice([100, 1000, 5000, 20_000]))
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
        text, what = _encoded(rng, text)
        done.append(what)
    length = None
    if rng.random() < 0.08:
        length = _length(rng, text)
        done.append("length")
    if rng.random() < 0.08:
        cut = rng.choice([0, 1, len(rest) - 1, rng.randrange(len(rest) + 1)])
        rest = rng.choice([rest[:cut], rest + b"\0", rest + b"\0" * _size(rng), b""])
        done.append("data length")
    return checkpoints.file_bytes(text, rest, length), "+".join(done)


def _safetensors(rng: random.Random) -> Input:
    if rng.random() < 0.01:
        count = rng.randrange(20)
        return Input("safetensors", "short", {**seed_checkpoint(rng), WHOLE: rng.randbytes(count)})
    shards = rng.choice([1, 1, 2])
    files = seed_checkpoint(rng, shards)
    file = WHOLE if shards == 1 else rng.choice(SHARDS)
    if special := _special(rng, files, file):
        return special
    files[file], label = safetensors_file(rng, files[file])
    return Input("safetensors", label, files)


# The index.


def _many_files(rng: random.Random, value: Pairs) -> None:
    """More shards, or more tensors, than the folder has."""
    weights = value[1][1]
    count = _size(rng, 20_000)
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


def _index(rng: random.Random) -> Input:
    files: dict[str, Any] = seed_checkpoint(rng, 2)
    if special := _special(rng, files, INDEX):
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


# config.json and generation_config.json.

_YARN_FIELDS = "attention_factor beta_fast beta_slow factor mscale mscale_all_dim rope_theta truncate".split()
_FIELDS = (
    "model_type hidden_act hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim vocab_size max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters attention_bias "
    "tie_word_embeddings use_sliding_window sliding_window max_window_layers layer_types torch_dtype dtype "
    "eos_token_id pad_token_id quantization_config use_qk_norm architectures id2label unknown_field"
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
        settings = dict(_SMALL["quantization_config"])
    settings = dict(settings)
    field = rng.choice(_QUANTIZATION)
    settings[field] = junk(rng)
    if field == "weight_block_size":
        settings[field] = rng.choice([[number(rng), number(rng)], [4, number(rng)], [2**31, 2**31], [2**62] * 2, [4]])
    elif field == "modules_to_not_convert":
        names = [f"model.layers.{i}.mlp" for i in range(_size(rng))]
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


def _config(rng: random.Random) -> Input:
    files: dict[str, Any] = seed_checkpoint(rng)
    generation = {"eos_token_id": [3, 4], "pad_token_id": 5, "temperature": 0.6}
    if rng.random() < 0.5:
        files[GENERATION] = json.dumps(generation).encode()
    file = rng.choice([CONFIG, CONFIG, CONFIG, CONFIG, GENERATION])
    if special := _special(rng, files, file):
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


# Policies.

_DTYPES = (
    "f32 bf16 f16 f8_e4m3fn f8_e5m2 float8_e4m3 int8 null f64 i32 f8 bool ~ '' 1 1.5 yes 0x10 {} [] *a !!x y".split()
)
_PATTERNS = (
    "kernel", "scale_inv", "default", "bias", "embedding", "kernel?", "layers/*/mlp/*/kernel", "**/kernel", "**",
    "layers/{0,1}/**", "layers/1*/self_attn/{q,k}_proj/kernel", "lm_head/kernel?", "**/*scale_inv", "*/*/*/*/*", "*",
    "norm/scale", "nothing?", "nothing", "/", "//", "a//b", "?", "??", "a?b", "[ab]", "a,b", "{a", "}", "{}", "{,}",
    "{a,{b,c}}", "***", "a**", "default?", "**/**", "<<", "=", "on", "0", "null", "~", "1e3", "2001-01-01",
    "\\d+", "(a+)+$",
)  # fmt: skip


def pattern(rng: random.Random) -> str:
    """A pattern, or what might make matching one exponential."""
    count = _size(rng, 30_000)
    few = rng.choice([1, 2, 5, 6, 7, 20])
    choices: list[Callable[[], str]] = [
        lambda: rng.choice(_PATTERNS),
        lambda: "**/" * count + "x",
        lambda: "**/" * count + "kernel",
        lambda: "/".join(["**"] * count),
        lambda: "**/*/" * (count // 2) + "kernel",
        lambda: "*/" * count + "**",
        lambda: "*a" * count + "*b",
        lambda: "**/" + "*e" * count + "*",
        lambda: "*" * count,
        lambda: "{a,b}" * few,
        lambda: "{a,b}*" * few + "**/" * few,
        lambda: "{" * count + "a" + "}" * count,
        lambda: "{a,{b,c}}" * few,
        lambda: "{" + ",".join(f"a{i}" for i in range(count)) + "}/kernel",
        lambda: "{" + ",".join(f"{i}" for i in range(rng.choice([63, 64, 65]))) + "}" + "a" * count,
        lambda: "{" + "," * count + "}",
        lambda: "{}" * count,
        lambda: "{x}" * count + "/kernel",
        lambda: "**/{" + ",".join(["*a*"] * rng.choice([2, 64])) + "}/" * few + "kernel",
        lambda: "layers/" * count + "kernel",
        lambda: "a" * count,
        lambda: "".join(rng.choice("abcdefghijklmnopqrstuvwxyz_/0123456789") for _ in range(count)) + "x",
        # No character so frequent that difflib leaves it out.
        lambda: ("".join(map(chr, range(0x4E00, 0x4E80))) + "layerskn_pojut0/m") * (count // 140 + 1),
        lambda: "".join(rng.choice("*/{},ab?") for _ in range(rng.randrange(1, 60))),
        lambda: rng.choice(["é", "😀", "\u2028", "\ufeff", "٣", "ﬀ", "İ"]) * rng.randrange(1, 9),
    ]
    return rng.choice(choices)()


def _rule(rng: random.Random, key: str, dtype: str, indent: str = "  ") -> str:
    """A line of a map: its key in one kind of quotes, the other, or none."""
    single = "'" + key.replace("'", "''") + "'"
    written = rng.choice([json.dumps(key, ensure_ascii=False), json.dumps(key), single, key])
    if len(written) < 1000 and rng.random() < 0.95:
        return f"{indent}{written}: {dtype}"
    return f"{indent}? {written}\n{indent}: {dtype}"  # YAML takes no longer key than 1024 characters without `?`


def policy_text(rng: random.Random) -> str:
    """A policy of a few slots and rules, most of which a parser reads."""
    lines = []
    for slot in rng.sample(["params", "compute", "output", "block"], rng.randrange(1, 5)):
        if rng.random() < 0.05:
            slot = rng.choice(
                ["parms", "<<", "on", "null", "0", "PARAMS", "? params", "-", "!!str params", "&a params"]
            )
        if slot == "block":
            blocks = [
                "[128, 128]",
                "[4, 4]",
                "[0, 4]",
                "[4]",
                "4",
                "[999999999, 1]",
                "[1e3, 4]",
                "{a: f32}",
                "[[4], 4]",
            ]
            lines.append(f"block: {rng.choice([*blocks, '[' + '9' * rng.choice([9, 10, 5000]) + ', 1]'])}")
        elif slot == "output" or rng.random() < 0.2:
            lines.append(f"{slot}: {rng.choice(_DTYPES)}")
        else:
            lines.append(f"{slot}:")
            for _ in range(rng.choice([0, 1, 2, 3, 5])):
                dtype = rng.choice(_DTYPES[:8] if rng.random() < 0.8 else _DTYPES)
                lines.append(_rule(rng, pattern(rng), dtype))
            if rng.random() < 0.5:
                lines.append(f"  default: {rng.choice(_DTYPES)}")
    return "\n".join(lines) + "\n"


_SOUND = (
    "kernel", "scale_inv", "bias", "scale", "embedding", "lm_head/kernel", "norm/scale", "**/kernel", "**/*scale_inv",
    "layers/*/mlp/*/kernel", "layers/*/self_attn/{q,k,v,o}_proj/kernel", "layers/{0,1,17}/**", "layers/1*/**", "*/*",
    "embed_tokens/embedding", "**/{gate,up}_proj/*", "layers/*/*_layernorm/scale", "**", "layers/3/**/q_norm/scale",
)  # fmt: skip


def sound_policy(rng: random.Random) -> str:
    """A policy that is read, mostly, and that often resolves: what is odd in it is one pattern."""
    lines = []
    for slot, dtypes in (("params", _DTYPES[:7]), ("compute", ("f32", "bf16", "f16", "null"))):
        patterns = rng.sample(_SOUND, rng.randrange(6))
        if rng.random() < 0.4:
            patterns.insert(rng.randrange(len(patterns) + 1), pattern(rng))
        lines += [f"{slot}:"] if patterns else []
        for one in patterns:
            odd = rng.random() < 0.1
            lines.append(_rule(rng, one + rng.choice(["?", "?", "?", ""]), rng.choice(_DTYPES if odd else dtypes)))
    if rng.random() < 0.3:
        lines.append(f"block: [{rng.choice([1, 4, 128, 999_999_999])}, {rng.choice([1, 3, 128, 999_999_999])}]")
    return "\n".join([*lines, rng.choice(["output: f32", "output:", "#", ""])]) + "\n"


def _laughs(rng: random.Random, last: str) -> str:
    """Lists of lists of lists, each named and used nine times by the next."""
    levels = rng.randrange(2, 12)
    lines = ["params: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"k{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    flow = "&a0 [x, x]"
    for i in range(1, levels * 2):
        flow = f"&a{i} [{flow}, {', '.join([f'*a{i - 1}'] * 8)}]"
    return rng.choice(["\n".join(lines) + f"\n{last}: *a{levels - 1}\n", f"{last}: {flow}\n", f"{last}: [{flow}, 1]\n"])


def crowd(rng: random.Random, slot: str, template: str) -> str:
    """As many rules of one form as a policy's limits let through, or nearly."""
    most = rng.choice([100, 128, 255, 256, 1000, 4000, 10_000])
    lines, size = [f"{slot}:"], 0
    for i in range(most):
        line = f"  '{template.format(i=i)}?': ~"
        size += len(line) + 1
        if size > 65_000:
            break
        lines.append(line)
    return "\n".join(lines) + "\n"


def bomb(rng: random.Random) -> str:
    """YAML made to cost time, memory or the stack, or to run something."""
    count, depth, slot = _size(rng), _depth(rng), rng.choice(["params", "compute", "output", "block"])
    dtype = rng.choice(["f32", "null", "bf16"])
    choices: list[Callable[[], str]] = [
        lambda: _laughs(rng, slot),
        lambda: _laughs(rng, slot),
        lambda: f"{slot}: {nested(rng)}\n",
        lambda: f"{slot}: " + "[" * depth + rng.choice(["]" * depth, ""]) + "\n",
        lambda: f"{slot}: [" + "[" * (depth % 1200) + "]" * (depth % 1200) + ", 4]\n",
        lambda: f"{slot}: " + "{a: " * depth + "1" + rng.choice(["}" * depth, ""]) + "\n",
        lambda: "\n".join(" " * i + "a:" for i in range(min(depth, 1400))) + " f32\n",
        lambda: "- " * depth + "a\n",
        lambda: "? " * depth + "a\n",
        lambda: f"{slot}: " + "? " * depth + "a\n",
        lambda: f"{slot}: &a [*a]\n",
        lambda: f"{slot}: &a {{a: *a}}\n",
        lambda: f"{slot}: &a [*a, *a]\n",
        lambda: f"{slot}: *nothing\n",
        lambda: "&a a: 1\n*a : 2\n",
        lambda: f"base: &b {{kernel: {dtype}}}\n{slot}:\n  <<: *b\n",
        lambda: f"{slot}:\n  <<: [{', '.join(['{}'] * min(count, 3000))}]\n",
        lambda: f"{slot}: !!python/object/apply:os.system ['true']\n",
        lambda: f"{slot}: !!python/name:os.system {dtype}\n",
        lambda: f"!!python/object:object {slot}: {dtype}\n",
        lambda: f"{slot}: !!binary {'A' * count}\n",
        lambda: f"{slot}: !custom {dtype}\n",
        lambda: f"{slot}: !<tag:yaml.org,2002:null> {dtype}\n",
        lambda: f"{slot}: !{'x' * count} {dtype}\n",
        lambda: f"{slot}: !%ff%00 {dtype}\n",
        lambda: (
            f"%YAML {rng.choice(['1.1', '1.' + '9' * 5000, '9' * 5000 + '.1', '2.0', 'x'])}\n---\n{slot}: {dtype}\n"
        ),
        lambda: f"%TAG ! {'x' * min(count, 9999)}\n---\n{slot}: !y {dtype}\n",
        lambda: f"%{'X' * count}\n---\n{slot}: {dtype}\n",
        lambda: f'{slot}: "{chr(92)}{rng.choice(["UFFFFFFFF", "U00110000", "ud800", "x0", "U0000d800"])}"\n',
        lambda: f'"{chr(92)}{rng.choice(["UFFFFFFFF", "U00110000", "ud800", "0", "x1b"])}": {dtype}\n',
        lambda: f"--- \n{slot}: {dtype}\n---\n{slot}: {dtype}\n",
        lambda: "---\n" * min(count, 20_000),
        lambda: "...\n" * min(count, 20_000),
        lambda: f"{slot}:\n\t{dtype}\n",
        lambda: f"{slot}:\n  kernel:\t{dtype}\n\tbias: f32\n",
        lambda: f"{slot}: {dtype}\n{slot}: {dtype}\n",
        lambda: f"{slot}:\n" + f"  a: {dtype}\n" * min(count, 20_000),
        lambda: f"{slot}:\n" + "".join(f"  a{i}?: {dtype}\n" for i in range(min(count, 40_000))),
        lambda: f"{slot}:\n" + "".join(f'  "**/*{i}*/**/k*?": {dtype}\n' for i in range(min(count, 40_000))),
        lambda: crowd(rng, slot, "a/{i}"),
        lambda: crowd(rng, slot, "layers/{i}/mlp/up_proj/kernel"),
        lambda: crowd(rng, slot, "layers/{{" + ",".join(map(str, range(18))) + "}}/mlp/up_proj/x{i}"),
        lambda: crowd(rng, slot, "{{" + ",".join([rng.choice(["**", "*", "*a"])] * 63) + ",{i}}}/zz/*"),
        lambda: crowd(rng, slot, "**/{{" + ",".join(["*"] * 63) + ",{i}}}/*/**/*e*l"),
        lambda: crowd(rng, slot, "**/*/" * rng.choice([1, 2, 5, 40, 90]) + "{i}/*"),
        lambda: crowd(rng, slot, "**/" * rng.choice([1, 2, 5, 40, 90]) + "{i}"),
        lambda: crowd(rng, slot, "**/" + "*e" * rng.choice([1, 5, 20, 200]) + "{i}*/*"),
        lambda: crowd(rng, slot, "*/" * rng.choice([1, 3, 4]) + "**/" + "*e" * 8 + "*{i}*"),
        lambda: f"{slot}: {{" + ", ".join(f"a{i}?: {dtype}" for i in range(min(count, 40_000))) + "}\n",
        lambda: (
            f"{rng.choice(['on', '0', 'null', '~', '1.5', '=', '<<', '2001-01-01', '{}', '[a]', '!!str 1'])}: {dtype}\n"
        ),
        lambda: f"{slot}:\n  {rng.choice(['on', '0', 'null', '1e400', '.nan', '=', '[a]', '{a: b}'])}: {dtype}\n",
        lambda: f"block: [{'9' * min(count, 6000)}, {rng.choice(['0x10', '0o7', '1_0', '+1', '٣', '1:30', 'yes'])}]\n",
        lambda: f"block: {'9' * min(count, 6000)}\n",
        lambda: "{" + " " * count + "\n",
        lambda: "[" + " \t" * (count // 2) + "x\n",
        lambda: f"{slot}: {{a" + " " * count + "\n}:",
        lambda: f"{slot}: {dtype}\n" + "*" + " " * count + "x\n",
        lambda: f"{slot}: " + "&" * count + "\n",
        lambda: " " * count + f"{slot}: {dtype}\n",
        lambda: "\n" * count + f"{slot}: {dtype}\n",
        lambda: "#" * count + f"\n{slot}: {dtype}\n",
        lambda: "#\n" * count + f"{slot}: {dtype}\n",
        lambda: f"{slot}: '" + "''" * count + "'\n",
        lambda: f'{slot}: "' + "\\x41" * count + '"\n',
        lambda: f'{slot}: "' + "\\\n" * count + '"\n',
        lambda: f"{slot}: |\n" + "  x\n" * min(count, 40_000),
        lambda: f"{slot}: >{rng.choice(['9', '0', '99', '-9', '+'])}\n" + "  x\n\n" * min(count, 40_000),
        lambda: f"{slot}: " + "x\n  " * min(count, 40_000) + "\n",
        lambda: "x" * rng.choice([count, (1 << 20) - 1, 1 << 20, (1 << 20) + 1]),
        lambda: f"{slot}: {dtype}\0\n",
        lambda: f"{slot}: \x07\x1b{dtype}\n",
        lambda: f"\ufeff{slot}: {dtype}\n",
        lambda: f"{slot}: {dtype}\x85\u2028{slot}: {dtype}\n",
        lambda: f"{slot}: {dtype}\x0b\x0c\x1c\n\x0c{{\n",
        lambda: f"{slot}: {'k' * count}\n",
        lambda: f"{'k' * count}: {dtype}\n",
        lambda: f"{slot}:\n  {'k' * min(count, 1000)}: {'k' * count}\n",
        lambda: f"{slot}:\n{_rule(rng, pattern(rng), dtype)}\n",
        lambda: f"{slot}:\n{_rule(rng, pattern(rng), dtype)}\n",
        lambda: f"{slot}:\n{_rule(rng, pattern(rng) + '?', dtype)}\n",
        lambda: f"{slot}:\n  ? {json.dumps(pattern(rng) + '?')}\n  : {dtype}\n",
        lambda: f"{slot}:\n" + "\n".join(_rule(rng, pattern(rng)[:99], dtype) for _ in range(min(count, 300))) + "\n",
    ]
    return rng.choice(choices)()


def _policy(rng: random.Random) -> Input:
    way = rng.randrange(10)
    if special := _special(rng, {}, POLICY):
        return special
    writer = sound_policy if way < 3 else policy_text if way < 6 else bomb
    text, label = writer(rng), writer.__name__
    data = text.encode("utf-8", "surrogatepass")
    if way in (2, 5, 9) and len(data) < 10_000:
        data, label = mutate_bytes(rng, data), f"{label}+bytes"
    if rng.random() < 0.03:
        data, what = _encoded(rng, data)
        label = f"{label}+{what}"
    return Input("policy", label, {POLICY: data})


_KINDS: dict[str, Callable[[random.Random], Input]] = {
    "safetensors": _safetensors,
    "index": _index,
    "config": _config,
    "policy": _policy,
}
_KIND_OF = {CONFIG: "config", GENERATION: "config", INDEX: "index", POLICY: "policy"}
KINDS = tuple(_KINDS)
