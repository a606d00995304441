"""Policies as somebody might write them, with patterns and dtypes that nobody would."""

from __future__ import annotations

import random

from .in_bytes import in_another_encoding, mutate_bytes
from .inputs import POLICY, Input, something_else
from .patterns import pattern, rule_line
from .yaml_bombs import bomb

_DTYPES = (
    "f32 bf16 f16 f8_e4m3fn f8_e5m2 float8_e4m3 int8 null f64 i32 f8 bool ~ '' 1 1.5 yes 0x10 {} [] *a !!x y".split()
)


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
                lines.append(rule_line(rng, pattern(rng), dtype))
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
            lines.append(rule_line(rng, one + rng.choice(["?", "?", "?", ""]), rng.choice(_DTYPES if odd else dtypes)))
    if rng.random() < 0.3:
        lines.append(f"block: [{rng.choice([1, 4, 128, 999_999_999])}, {rng.choice([1, 3, 128, 999_999_999])}]")
    return "\n".join([*lines, rng.choice(["output: f32", "output:", "#", ""])]) + "\n"


def policy_input(rng: random.Random) -> Input:
    way = rng.randrange(10)
    if special := something_else(rng, {}, POLICY):
        return special
    writer = sound_policy if way < 3 else policy_text if way < 6 else bomb
    text, label = writer(rng), writer.__name__
    data = text.encode("utf-8", "surrogatepass")
    if way in (2, 5, 9) and len(data) < 10_000:
        data, label = mutate_bytes(rng, data), f"{label}+bytes"
    if rng.random() < 0.03:
        data, what = in_another_encoding(rng, data)
        label = f"{label}+{what}"
    return Input("policy", label, {POLICY: data})
