"""Patterns of a policy, among them such as could make matching them exponential."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from .in_bytes import random_count

_PATTERNS = (
    "kernel", "scale_inv", "default", "bias", "embedding", "kernel?", "layers/*/mlp/*/kernel", "**/kernel", "**",
    "layers/{0,1}/**", "layers/1*/self_attn/{q,k}_proj/kernel", "lm_head/kernel?", "**/*scale_inv", "*/*/*/*/*", "*",
    "norm/scale", "nothing?", "nothing", "/", "//", "a//b", "?", "??", "a?b", "[ab]", "a,b", "{a", "}", "{}", "{,}",
    "{a,{b,c}}", "***", "a**", "default?", "**/**", "<<", "=", "on", "0", "null", "~", "1e3", "2001-01-01",
    "\\d+", "(a+)+$",
)  # fmt: skip


def pattern(rng: random.Random) -> str:
    """A pattern, or what might make matching one exponential."""
    count = random_count(rng, 30_000)
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


def rule_line(rng: random.Random, key: str, dtype: str, indent: str = "  ") -> str:
    """A line of a map: its key in one kind of quotes, the other, or none."""
    single = "'" + key.replace("'", "''") + "'"
    written = rng.choice([json.dumps(key, ensure_ascii=False), json.dumps(key), single, key])
    if len(written) < 1000 and rng.random() < 0.95:
        return f"{indent}{written}: {dtype}"
    return f"{indent}? {written}\n{indent}: {dtype}"  # YAML takes no longer key than 1024 characters without `?`
