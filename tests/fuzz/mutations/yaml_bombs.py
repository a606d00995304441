"""YAML made to cost time, memory or the stack, or to run something."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from .in_bytes import random_count
from .in_json import nested, random_depth
from .patterns import pattern, rule_line


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
    count, depth, slot = random_count(rng), random_depth(rng), rng.choice(["params", "compute", "output", "block"])
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
        lambda: f"{slot}:\n{rule_line(rng, pattern(rng), dtype)}\n",
        lambda: f"{slot}:\n{rule_line(rng, pattern(rng), dtype)}\n",
        lambda: f"{slot}:\n{rule_line(rng, pattern(rng) + '?', dtype)}\n",
        lambda: f"{slot}:\n  ? {json.dumps(pattern(rng) + '?')}\n  : {dtype}\n",
        lambda: (
            f"{slot}:\n" + "\n".join(rule_line(rng, pattern(rng)[:99], dtype) for _ in range(min(count, 300))) + "\n"
        ),
    ]
    return rng.choice(choices)()
