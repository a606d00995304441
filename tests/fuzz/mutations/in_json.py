"""Mutations of JSON, and text that looks like JSON and that Python's own encoder would not write."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from .in_bytes import in_another_encoding, mutate_bytes, random_count
from .inputs import CONFIG, INDEX, SHARDS, WHOLE

# JSON as it is written.


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


# Values.


def random_depth(rng: random.Random) -> int:
    """How deep to nest: often close to the interpreter's limit, where parsing works and printing fails."""
    return rng.choice([rng.randrange(1, 200), rng.randrange(880, 1010), rng.randrange(880, 1010), random_count(rng)])


def nested(rng: random.Random) -> Raw:
    """Brackets or braces within each other, closed or not."""
    depth = random_depth(rng)
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
    lambda rng: rng.choice(["a", "é", "😀", "\x01", "/", "../"]) * random_count(rng),
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
    return Raw("[" + ",".join([item] * min(random_count(rng), (1 << 20) // len(item))) + "]")


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
    lambda rng: Raw("[" + ",".join(f'"m{i}"' for i in range(random_count(rng))) + "]"),
    lambda rng: Raw("{" + ",".join(f'"k{i}":{i}' for i in range(random_count(rng))) + "}"),
    lambda rng: Raw(rng.choice(["", "nul", "tru", "{", "]", "'x'", '"\x00"', '"\\x"', '"\\u12"', "//", ",", "[1,]"])),
)


def junk(rng: random.Random) -> Any:
    """A value of any type."""
    return rng.choice(_JUNK)(rng)


# Mutations.


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
            rng.choice([1, 1, 1, random_count(rng, 2000)]),
            (1 << 20) // (1 + len(dumps(node[i][1] if pairs else node[i]))) + 1,
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
        data, what = in_another_encoding(rng, data)
        done.append(what)
    if rng.random() < 0.1:
        data = mutate_bytes(rng, data)
        done.append("bytes")
    return data, "+".join(done)
