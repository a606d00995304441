"""Measures all implementations of the block-scaled matmul on this machine, and the usual alternatives.

    python benchmarks/matmul.py                      # the default shapes: minutes on a CPU, longer on a GPU
    python benchmarks/matmul.py --quick              # three rounds of one small shape, to test the script
    python benchmarks/matmul.py --shapes 4096x4096,1024x3072 --rows 1,16 --modes W8A16

x is bfloat16, kernels are f8_e4m3fn in blocks of 128×128; shapes are OUT×IN, the layout of checkpoints.  Ratios are
computed within a round; their medians and quartiles are reported.  The baselines:

    bf16 dot     XLA's product of x and the kernel in bfloat16; on NVIDIA GPUs with cuBLAS or Triton, as in the table
    f32 dot      the same with x and kernel in float32, in JAX's default precision: on NVIDIA GPUs that is TF32
    naive        the kernel times its repeated scales, rounded to bfloat16 (on a CPU: in float32), then a dot
    torch …      if torch is installed with CUDA: cuBLAS in bfloat16, and in float8 with one scale per tensor

Contenders have the names in `perparam.policies.matmul.IMPLEMENTATIONS`; a star marks the choice of perparam.  W8A8 is
timed as a whole, with the quantisation of x, and in parts.  Errors are relative to the float32 product with the weight
before it was rounded.  Results are written as JSON after each shape, and drawn at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import report
import timing
import torch_cuda
from shapes import ROWS, SHAPES, linears

from perparam.policies import matmul_override, matmul_plan, quantize, scaled_matmul
from perparam.policies.formats import Format
from perparam.policies.matmul import cpu, dispatch, oracle, quantize_rows
from perparam.policies.scaled_array import ScaledArray
from perparam.policies.targets import HOPPER, here, multiprocessors

BF16, E4M3 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float8_e4m3fn)

BLOCK = (128, 128)
"""The block of published FP8 checkpoints."""

MODES = {"W8A16": None, "W8A8": E4M3, "plain": None}
"""The argument `compute` of `scaled_matmul` in each mode; in the mode "plain" the kernel is bfloat16."""

ROUNDS, QUICK_ROUNDS = 15, 3
"""Rounds by default, which are enough for quartiles, and with `--quick`."""

QUICK_CASES = ((1, (2048, 1024)), (64, (2048, 1024)))

LARGE_CASES = ((4096, (7168, 16384)), (4096, (24576, 7168)))
"""Cases with published measurements of other FP8 kernels on Hopper, by DeepGEMM and sglang."""

Shape = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Contender:
    """One function that is measured in a case.

    name    its name, unique in the case
    mode    one of MODES; None for a baseline
    build   compiles it
    chosen  whether perparam chooses this implementation for the call
    """

    name: str
    mode: str | None
    build: Callable[[], timing.Timed]
    chosen: bool = False


class Case:
    """A product of `rows` rows of x with a kernel of `shape` (out, in), with copies of the operands that exceed caches.

    x          (rows, in) each           bfloat16
    kernel     (out, in) each            f8_e4m3fn
    scale_inv  (out/128, in/128) each    float32
    weight     (out, in) each            bfloat16, the weight before quantisation
    exact      (rows, out)               float32, the product with the weight before it was rounded or quantised
    """

    def __init__(self, rows: int, shape: Shape, rotated: int):
        self.rows, self.shape = rows, shape
        self.operations = 2 * rows * shape[0] * shape[1]
        keys = jax.random.split(jax.random.key(timing.SEED))
        weight = jax.random.normal(keys[0], shape) / np.sqrt(shape[1])
        x = jax.random.normal(keys[1], (rows, shape[1]), BF16)
        kernel, scale_inv = quantize(weight, E4M3, BLOCK)
        self.copies = max(2, -(-rotated // (kernel.nbytes + scale_inv.nbytes + x.nbytes)))
        self.x, self.kernel, self.scale_inv = self.copied(x), self.copied(kernel), self.copied(scale_inv)
        self.weight = self.copied(weight.astype(BF16))
        self.exact = oracle.dot(x.astype(jnp.float32), weight)

    def copied(self, array: jax.Array) -> list[jax.Array]:
        """Returns copies of an array in separate memory."""
        return [jnp.array(array, copy=True) for _ in range(self.copies)]

    def product(
        self, name: str, mode: str | None, function: Callable[..., Any], *operands: list[jax.Array]
    ) -> Contender:
        """Returns a contender that computes the product, for lists of copies of its operands."""
        copies = list(zip(*operands, strict=True))
        return Contender(name, mode, functools.partial(timing.timed, function, copies, self.operations))

    def contenders(self, modes: Sequence[str]) -> Iterator[Contender]:
        """Yields the contenders of the case."""
        yield self.product("bf16 dot", None, timing.dot, self.x, self.weight)
        wide = [[array.astype(jnp.float32) for array in copies] for copies in (self.x, self.weight)]
        yield self.product("f32 dot", None, timing.dot, *wide)
        yield self.product("naive", None, naive, self.x, self.kernel, self.scale_inv)
        for mode in modes:
            operands = (self.x, self.weight) if mode == "plain" else (self.x, self.kernel, self.scale_inv)
            dtype, compute = operands[1][0].dtype, MODES[mode]
            plan = matmul_plan(self.rows, self.shape, kernel=dtype, block=BLOCK, compute=compute)
            for name in implementations(self.rows, self.shape, dtype, compute):
                contender = self.product(f"{mode} {name}", mode, with_implementation(name, compute), *operands)
                yield dataclasses.replace(contender, chosen=name == plan.implementation)
        if "W8A8" in modes:
            yield from self.parts()
        for name, mode, build in torch_cuda.products(self.rows, *self.shape, self.copies):
            if mode is None or mode in modes:
                yield Contender(name, mode, build)

    def parts(self) -> Iterator[Contender]:
        """Yields the parts of W8A8: the quantisation of x, and on Hopper its kernels, for shapes without padding."""

        def quantized(name: str, function: Callable[..., Any]) -> Contender:
            return Contender(name, "W8A8", functools.partial(timing.timed, function, [(x,) for x in self.x]))

        yield quantized("quantize_rows alone", lambda x: quantize_rows(x, E4M3))
        if here().capability != HOPPER or any(side % 128 for side in self.shape):
            return
        from perparam.policies.matmul import hopper_quantize, hopper_rows

        if self.rows % hopper_quantize.ROWS == 0:
            yield quantized("hopper_quantize alone", hopper_quantize.quantize)
        if self.rows % hopper_rows.TILE == 0:
            values, scales = quantize_rows(self.x[0], E4M3)
            operands = self.copied(values), self.copied(scales.T), self.kernel, self.scale_inv
            run = functools.partial(hopper_rows.product, block=BLOCK, result=BF16, processors=multiprocessors())
            yield self.product("hopper_rows alone", "W8A8", run, *operands)

    def error(self, result: Any) -> float | None:
        """Returns the norm of the error divided by the norm of the exact product; None for a part of a product."""
        if isinstance(result, ScaledArray) or getattr(result, "shape", None) != self.exact.shape:
            return None  # quantised activations have the shape of the product if the kernel is square
        return float(jnp.linalg.norm(result.astype(jnp.float32) - self.exact) / jnp.linalg.norm(self.exact))

    def measured(self, modes: Sequence[str], rounds: int, yardsticks: dict[str, timing.Timed]) -> dict[str, Any]:
        """Returns the results of the case for the JSON file."""
        contenders, ready, failed = {}, {}, {}
        for contender in self.contenders(modes):
            try:
                ready[contender.name], contenders[contender.name] = contender.build(), contender
            except Exception as error:  # the other contenders still run, and the error is part of the results
                failed[contender.name] = f"{type(error).__name__}: {error}"
        seconds = timing.race(ready | yardsticks, rounds)
        copy = yardsticks["copy"].moved / seconds["copy"]
        peak = yardsticks["large bf16 dot"].operations / seconds["large bf16 dot"]
        results = [
            {
                "name": name,
                "mode": contenders[name].mode,
                "chosen": contenders[name].chosen,
                "kernels": timed.kernels,
                "bytes": timed.moved,
                "operations": timed.operations,
                "error": self.error(timed.result),
                "seconds": timing.spread(seconds[name]),
                "bytes per second": timing.spread(timed.moved / seconds[name]),
                "of copy": timing.spread(timed.moved / seconds[name] / copy),
                "operations per second": timing.spread(timed.operations / seconds[name]),
                "of peak": timing.spread(timed.operations / seconds[name] / peak),
                "ratios": {
                    base: timing.spread(seconds[name] / seconds[base]) for base in report.BASELINES if base in ready
                },
                "samples": seconds[name].tolist(),
            }
            for name, timed in ready.items()
        ]
        return {
            "rows": self.rows,
            "shape": self.shape,
            "copies": self.copies,
            "copy, bytes per second": timing.spread(copy),
            "large bf16 dot, operations per second": timing.spread(peak),
            "smallest program, seconds": timing.spread(seconds["smallest program"]),
            "contenders": results,
            "failed": failed,
        }


def implementations(rows: int, shape: Shape, kernel: np.dtype, compute: np.dtype | None) -> list[str]:
    """Returns the names of the implementations for this device that accept the call, including the oracle.

    For a plain call, returns only the name of the one that perparam chooses.
    """
    compute_format = None if compute is None else Format(compute)
    call = dispatch.describe(rows, shape, BF16, Format(kernel).completed(BLOCK), compute_format)
    if call.mode == "plain":
        return [dispatch.choose(call, here())[0].name]
    candidates = (*dispatch.candidates(here()), oracle.ORACLE)
    return [candidate.name for candidate in candidates if candidate.refuses(call) is None]


def with_implementation(implementation: str, compute: np.dtype | None) -> Callable[..., jax.Array]:
    """Returns `scaled_matmul` restricted to one implementation."""

    def run(x: jax.Array, kernel: jax.Array, scale_inv: jax.Array | None = None) -> jax.Array:
        with matmul_override(implementation):
            return scaled_matmul(x, kernel, scale_inv, block=BLOCK, compute=compute)

    return run


def naive(x: jax.Array, kernel: jax.Array, scale_inv: jax.Array) -> jax.Array:
    """Returns the product in its simplest form: widens the whole kernel, then one dot."""
    scales = jnp.repeat(jnp.repeat(scale_inv, BLOCK[0], axis=0), BLOCK[1], axis=1)[: kernel.shape[0], : kernel.shape[1]]
    dtype = BF16 if timing.on_gpu() else jnp.float32
    weight = (kernel.astype(jnp.float32) * scales).astype(dtype)
    return timing.dot(x.astype(dtype), weight).astype(x.dtype)


def default_cases() -> list[tuple[int, Shape]]:
    """Returns rows and shape of each default case for this device."""
    if timing.on_gpu():
        return [*itertools.product(ROWS, SHAPES), *LARGE_CASES]
    small = sorted(set(linears("0.6B").values()))
    return [*((rows, (4096, 4096)) for rows in (1, 16, 512)), *itertools.product((1, 512), small)]


def parse() -> argparse.Namespace:
    """Returns the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes",
        type=lambda text: [tuple(map(int, shape.split("x"))) for shape in text.split(",")],
        metavar="OUTxIN,…",
        help="shapes of kernels, instead of the default shapes",
    )
    parser.add_argument(
        "--rows", type=lambda text: list(map(int, text.split(","))), metavar="ROWS,…", help="rows of x, for every shape"
    )
    parser.add_argument(
        "--modes", type=lambda text: text.split(","), default=list(MODES), metavar="MODE,…", help=", ".join(MODES)
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds, of one small shape")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="no case begins later than this many seconds after the start"
    )
    parser.add_argument(
        "--rotated", type=int, metavar="BYTES", help="of operands that calls cycle through; default: above all caches"
    )
    parser.add_argument(
        "--results", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results", help="folder to write to"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.modes) - set(MODES):
        parser.error(f"unknown mode {', '.join(unknown)}, expected one of {', '.join(MODES)}")
    return arguments


def main() -> int:
    """Measures all cases, prints and writes their results, and draws the picture."""
    arguments, start = parse(), time.monotonic()
    rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    cases = list(QUICK_CASES) if arguments.quick else default_cases()
    if arguments.shapes or arguments.rows:
        rows, shapes = zip(*cases, strict=True)
        cases = list(itertools.product(arguments.rows or sorted(set(rows)), arguments.shapes or sorted(set(shapes))))
    rotated = arguments.rotated or timing.rotated_bytes()
    results = timing.machine() | {
        "target": str(here()),
        "instructions for bfloat16": cpu.multiplies_bfloat16(),
        "rounds": rounds,
        "rotated bytes": rotated,
        "cases": [],
        "not measured": [],
    }
    name = f"matmul-{timing.slug(results['device'])}{'-quick' if arguments.quick else ''}.json"
    path = arguments.results / name
    path.parent.mkdir(parents=True, exist_ok=True)
    yardsticks = timing.yardsticks(rotated)
    for i, (rows, shape) in enumerate(cases):
        if time.monotonic() - start > arguments.seconds:
            results["not measured"] = cases[i:]
            path.write_text(json.dumps(results, indent=1) + "\n")
            print(f"\n{len(cases) - i} of {len(cases)} cases not measured after {arguments.seconds:.0f} s")
            break
        results["cases"].append(Case(rows, shape, rotated).measured(arguments.modes, rounds, yardsticks))
        print(report.table(results["cases"][-1]), flush=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten to {path}\n{report.draw(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
