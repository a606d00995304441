"""Measures training steps by policy: their time, and their memory, compared with plain optax and with qwix.

    python benchmarks/train.py [--size small|toy] [--rounds 7] [--only NAMES] [--out FOLDER]

A small decoder (`train_models.py`) is trained with AdamW on one batch of random tokens, by each of the contenders in
`trainers.py`.  qwix takes part if it is installed (`pip install qwix`); contenders that do not run are listed with
their error.  Each contender runs in its own process, and all of them wait while one works.  In each round every
contender takes one step, in shuffled order, so that changes in the speed of the machine affect all of them.  Ratios are
computed within a round; their median and quartiles are reported.  The script needs 12 GiB of memory.

    step       seconds of a step: loss, gradients and update, as one compiled program that donates parameters and state
    update     seconds of the optimizer's update alone, with constant gradients
    planned    bytes of parameters and of the optimizer's state, masters included, as `Policy.explain` has them
    live       the same of the arrays that are allocated
    arguments  bytes of the arguments of the compiled step: the live ones, frozen parameters and the batch
    temporary  bytes of the compiled step's temporary arrays, gradients and activations included
    peak       bytes of all arrays before a step, and by how much the resident memory of the process grew during it

Two comparisons, the gates, are repeated in more rounds: perparam and plain optax, with bfloat16 parameters and float32
state; and this contender of optax with itself in another process, which shows the noise.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Report = dict[str, Any]

MIB = 2**20
SEED = 0
GATE_ROUNDS = 15
AGAIN = "optax bf16, f32 state, again"
GATED, BASELINE = "perparam bf16, f32 state", "optax bf16, f32 state"


class Worker:
    """The process of a contender: `memory` has its memory, or its error."""

    def __init__(self, name: str, size: str, folder: str):
        self._name, self._errors = name, pathlib.Path(folder, f"{len(os.listdir(folder))}.txt")
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(pathlib.Path(__file__).with_name("train_worker.py")), name, size],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
        self.memory: Report = self._answer()

    def sample(self, what: str) -> Report:
        """Returns a sample of "step" or "update"."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        if "error" in (answer := self._answer()):
            raise RuntimeError(f"{self._name}: {answer['error']}")
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None and self._process.stdout is not None  # noqa: PT018
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> Report:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        said = self._errors.read_text().strip().splitlines()
        return {"error": f"exit code {self._process.wait()}: {said[-1] if said else 'no output'}"}


def compare(names: Sequence[str], size: str, rounds: int, say: Callable[[str], None]) -> Report:
    """Returns the results of the contenders, and those of the gates if their contenders are among them."""
    import trainers

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name in names:
            say(f"compiling {name}")
            workers[name] = Worker(name, size, folder)
            stack.callback(workers[name].close)
        failed = {name: worker.memory["error"] for name, worker in workers.items() if "error" in worker.memory}
        running = {name: worker for name, worker in workers.items() if name not in failed}
        order, shuffle = list(running), random.Random(SEED).shuffle
        samples: dict[str, dict[str, list[Report]]] = {name: {"step": [], "update": []} for name in running}
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            shuffle(order)
            for name in order:
                for what, taken in samples[name].items():
                    taken.append(running[name].sample(what))
        results = {
            name: running[name].memory
            | {what: [sample["seconds"] for sample in taken] for what, taken in samples[name].items()}
            | {"last loss": samples[name]["step"][-1]["loss"]}
            for name in running
        }
        for name, result in results.items():
            baseline = baseline_of(name, trainers.BASELINES)
            result["baseline"] = baseline
            if baseline in results:
                ratio = functools.partial(_ratios, result, results[baseline])
                result["ratios"] = {what: spread(ratio(what)) for what in ("step", "update")}
        gates = {}
        for name in (GATED, AGAIN):
            if name in running and BASELINE in running:
                gates[name] = _gate(running[name], running[BASELINE], GATE_ROUNDS if rounds > 1 else 1)
    return {"contenders": results, "gates": gates, "failed": failed, "faults": faults(results)}


def baseline_of(name: str, baselines: dict[str, str]) -> str:
    """Returns the contender with whose times those of `name` are compared."""
    return baselines.get(name.partition(",")[0], baselines[""])


def _ratios(result: Report, other: Report, what: str) -> np.ndarray:
    return np.array(result[what]) / np.array(other[what])


def _gate(worker: Worker, other: Worker, rounds: int) -> Report:
    """Returns the ratios of times of two contenders that work in turn; which of them is first alternates."""
    times: dict[str, list[list[float]]] = {"step": [], "update": []}
    for number in range(rounds):
        for what, pairs in times.items():
            first, second = (worker, other) if number % 2 else (other, worker)
            one, two = first.sample(what)["seconds"], second.sample(what)["seconds"]
            pairs.append([one, two] if number % 2 else [two, one])
    return {what: spread(np.array(pairs)[:, 0] / np.array(pairs)[:, 1]) for what, pairs in times.items()}


def spread(values: np.ndarray) -> dict[str, float]:
    """Returns the median and the quartiles of `values`."""
    lower, median, upper = np.percentile(values, (25, 50, 75))
    return {"lower": float(lower), "median": float(median), "upper": float(upper)}


def faults(results: Report) -> list[str]:
    """Returns where memory is not what the plan said, to the byte, and whose loss did not fall, as sentences."""
    found = []
    for name, result in results.items():
        live, planned = result["live"], result["planned"]
        for what in ("parameters", "optimizer"):
            if planned and planned[what] != live[what]:
                found.append(f"{name}: {planned[what]} bytes of {what} were planned, and {live[what]} are allocated.")
        expected = sum(live.values()) + result["batch"]
        arguments = result["arguments"]
        if planned and arguments != expected:
            found.append(f"{name}: the compiled step has {arguments} bytes of arguments, expected {expected}.")
        if not result["last loss"] < result["loss"]:
            found.append(f"{name}: the loss was {result['loss']:.4g} and became {result['last loss']:.4g}.")
    return found


def table(results: Report) -> str:
    """Returns the results as text, with a line for each contender."""
    title = ["contender", "step", "/ baseline", "update", "/ baseline", "params", "state", "planned", "temporary"]
    lines = [[*title, "peak", "loss"]]
    for name, result in results["contenders"].items():
        live, planned = result["live"], result["planned"]
        as_planned = planned and all(planned[what] == live[what] for what in ("parameters", "optimizer"))
        line = [name]
        for what in ("step", "update"):
            ratio = result.get("ratios", {}).get(what)
            line += [f"{1000 * np.median(result[what]):.0f} ms", shown(ratio) if ratio else ""]
        sizes = live["parameters"] + live["frozen"], live["optimizer"]
        line += [*map(_mib, sizes), {None: "", True: "to the byte", False: "differs"}[as_planned]]
        line += [_mib(result["temporary"]), _mib(result["peak"]), f"{result['loss']:.2f} → {result['last loss']:.2f}"]
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    for name, gate in results["gates"].items():
        ratios = ", ".join(f"{what} {shown(ratio)}" for what, ratio in gate.items())
        text.append(f"{name} / {BASELINE}, in turn: {ratios}")
    text += [f"does not run: {name}: {error}" for name, error in results["failed"].items()]
    return "\n".join([*text, *results["faults"]])


def _mib(size: float) -> str:
    return f"{size / MIB:.1f} MiB"


def shown(values: dict[str, float]) -> str:
    """Returns `median (lower–upper)` as text."""
    return f"{values['median']:.3g} ({values['lower']:.3g}–{values['upper']:.3g})"


def main() -> int:
    """Runs the contenders, prints a table and writes JSON; returns 1 if memory is not as planned, or a loss rises."""
    import timing
    import train_models
    import trainers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=train_models.SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", help="contenders, separated by semicolons", metavar="NAMES")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args()
    everything = [*trainers.CONTENDERS, AGAIN]
    names = arguments.only.split(";") if arguments.only else everything
    if unknown := [name for name in names if name not in everything]:
        parser.error(f"no contender {unknown[0]!r}; they are: {'; '.join(everything)}")
    load = os.getloadavg()[0]
    results = compare(names, arguments.size, arguments.rounds, functools.partial(print, file=sys.stderr, flush=True))
    print(table(results))
    machine = timing.machine()
    machine["versions"] |= trainers.versions()
    shape = train_models.SIZES[arguments.size]
    report = {"machine": machine, "load before": load, "size": vars(shape), "rounds": arguments.rounds, **results}
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"train-{timing.slug(machine['device'])}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}")
    return 1 if results["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
