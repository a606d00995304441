"""Measures attention: cuDNN's flash attention of prompts, and XLA's attention of prompts and in decoding.

    python benchmarks/attention.py [--dry] [--rounds 15] [--out FOLDER]

Heads are those of Qwen3-8B: 32 for queries, 8 for keys and values, 128 wide, in bfloat16.  Every contender runs once in
each round; ratios are computed within a round, and their medians and quartiles are reported.

    flash                 cuDNN, for a prompt without padding and with padding at the end; on NVIDIA GPUs
    flash, mask           cuDNN with a mask in memory, as for prompts after a prefix
    plain                 XLA, with scores in memory, in chunks
    decode N of S slots   XLA, one token after N tokens in a cache of S slots

`--dry` measures small arrays, with JAX's plain implementation in place of cuDNN's, to test the script.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import report
import timing

from perparam.models import attention, flash
from perparam.models.kv_cache import EMPTY, LayerCache, token_positions

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
PROMPTS = ((1, 512), (1, 2048), (1, 8192), (8, 1024))
"""Rows and tokens of each prompt."""

CACHES = ((1, 128, 4096), (1, 4095, 4096), (8, 512, 4096))
"""Rows, tokens and slots of each cache."""

MAX_COPIES = 16
"""Of a cache, so that a small one does not make a program of hundreds of calls."""

BF16 = jnp.dtype(jnp.bfloat16)


def arrays(rows: int, *tokens: int) -> list[jax.Array]:
    """Returns queries, keys and values (rows, tokens, heads, width), random."""
    heads = (HEADS, KV_HEADS, KV_HEADS)
    keys = jax.random.split(jax.random.key(timing.SEED), 3)
    return [jax.random.normal(key, (rows, t, h, HEAD_DIM), BF16) for key, t, h in zip(keys, tokens, heads, strict=True)]


def prompt(rows: int, tokens: int) -> dict[str, Callable[[], timing.Timed]]:
    """Returns builders of the contenders for a prompt."""
    operands = arrays(rows, tokens, tokens, tokens)
    real = jnp.ones((rows, tokens), bool)
    padded = real.at[:, -(tokens // 8) :].set(False)
    operations = 2 * rows * HEADS * tokens * tokens * HEAD_DIM  # half of all pairs, in two products

    def plain(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        queries, slots = token_positions(mask, jnp.zeros(rows, jnp.int32))
        return attention.attend(q, LayerCache.of(k, v, BF16), queries, slots, None)[0]

    def by_flash(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        return flash.attend(q, k, v, mask, None, "cudnn" if timing.on_gpu() else "xla")

    def build(function: Callable[..., Any], mask: jax.Array) -> Callable[[], timing.Timed]:
        return functools.partial(timing.timed, function, [(*operands, mask)] * 2, operations)

    def masked(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        seen = jnp.tril(jnp.ones((tokens, tokens), bool)) & mask[:, None]
        return flash.attend_masked(q, k, v, seen, "cudnn" if timing.on_gpu() else "xla")

    return {
        "plain": build(plain, real),
        "flash": build(by_flash, real),
        "flash, padded": build(by_flash, padded),
        "flash, mask": build(masked, real),
    }


def decoding(rows: int, tokens: int, slots: int) -> dict[str, Callable[[], timing.Timed]]:
    """Returns the builder of attention for one more token in a cache, in copies that exceed caches."""
    q, k, v = arrays(rows, 1, slots, slots)
    cache = LayerCache.of(k, v, BF16)
    positions = jnp.tile(jnp.where(jnp.arange(slots) < tokens, jnp.arange(slots), EMPTY), (rows, 1))
    queries = jnp.full((rows, 1), tokens, jnp.int32)
    copies = [
        (q, jax.tree.map(lambda x: jnp.array(x, copy=True), cache), queries, positions)
        for _ in range(max(2, min(-(-timing.rotated_bytes() // (2 * k.nbytes)), MAX_COPIES)))
    ]

    def attend(q: jax.Array, cache: LayerCache, queries: jax.Array, positions: jax.Array) -> jax.Array:
        return attention.attend(q, cache, queries, positions, None)[0]

    return {f"decode {tokens} of {slots} slots": functools.partial(timing.timed, attend, copies)}


def measured(case: str, builders: dict[str, Callable[[], timing.Timed]], rounds: int) -> dict[str, Any]:
    """Returns the results of a case: seconds, ratios to the first contender, and errors of those that failed."""
    ready, failed = {}, {}
    for name, build in builders.items():
        try:
            ready[name] = build()
        except Exception as error:  # the others still run
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    seconds = timing.race(ready, rounds)
    base = next(iter(builders))
    return {
        "case": case,
        "contenders": [
            {
                "name": name,
                "kernels": one.kernels,
                "seconds": timing.spread(seconds[name]),
                "operations per second": one.operations / timing.spread(seconds[name])["median"],
                "bytes per second": one.moved / timing.spread(seconds[name])["median"],
                "ratio": timing.spread(seconds[name] / seconds[base]) if base in ready else None,
            }
            for name, one in ready.items()
        ],
        "failed": failed,
    }


def table(cases: list[dict[str, Any]]) -> str:
    """Returns the results as a Markdown table."""
    lines = ["| case | | µs | / the first | TFLOP/s | GB/s | kernels |", "|---|---|---|---|---|---|---|"]
    for case in cases:
        for one in case["contenders"]:
            ratio = "" if one["ratio"] is None else report.between(one["ratio"])
            flops = f"{one['operations per second'] / 1e12:.3g}" if one["operations per second"] else ""
            lines.append(
                f"| {case['case']} | {one['name']} | {report.between(one['seconds'], 1e6)} | {ratio} | {flops} "
                f"| {one['bytes per second'] / 1e9:.4g} | {', '.join(one['kernels'])} |"
            )
        lines += [f"| {case['case']} | {name} | failed: {why} | | | | |" for name, why in case["failed"].items()]
    return "\n".join(lines)


def main() -> int:
    """Measures all cases, prints a table and writes the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="small arrays, two rounds")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args()
    rounds = 2 if arguments.dry else arguments.rounds
    results = timing.machine() | {"rounds": rounds, "cases": []}
    path = arguments.out / f"attention-{timing.slug(results['device'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    cases = [(f"{r} × {t} tokens", prompt, (r, t)) for r, t in (((1, 32),) if arguments.dry else PROMPTS)]
    cases += [(f"{c[0]} rows", decoding, c) for c in (((1, 20, 64),) if arguments.dry else CACHES)]
    for name, builders, shape in cases:
        results["cases"].append(measured(name, builders(*shape), rounds))
        path.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results["cases"]))
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
