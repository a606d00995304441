"""Runs hostile inputs through everything in perparam that reads files, and holds it to its promise.

    python tests/fuzz/run.py --inputs 20000 --seed 0 --keep DIR

The promise is in `promise.py`. Exits 1 where a reader breaks it; the files of such inputs are then in DIR, and
`--only KIND/NUMBER` runs one again.

Inputs run in processes of their own, so that one that kills the interpreter is found out as well.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence

_HERE = pathlib.Path(__file__).resolve().parent
if str(_HERE.parent) not in sys.path:  # where `fuzz` and `checkpoints` are: pytest knows, a program does not
    sys.path.append(str(_HERE.parent))

from fuzz import mutations  # noqa: E402
from fuzz.promise import Outcome, check, process_bytes, write  # noqa: E402

_LIMIT = 6 << 30  # bytes of address space beyond those of a fresh process, so that a memory bomb ends in MemoryError
_STUCK = 90.0  # seconds without a finished input after which a process is given up
_EVERY = 20  # of so many checkpoints, one that is accepted is read into a model as well


def kind_of(number: int, kinds: Sequence[str] = mutations.KINDS) -> str:
    """The kind of an input: those of `kinds` in turn."""
    return kinds[number % len(kinds)]


def _work(seed: int, numbers: range, folder: pathlib.Path, kinds: Sequence[str]) -> None:
    """Runs inputs one after the other, and prints a line of JSON before and after each."""
    for variant in range(2):  # what compiles, compiles before anything is measured
        rng = random.Random(variant)
        check(mutations.Input("safetensors", "sound", mutations.seed_checkpoint(rng)), folder, load=True)
        check(mutations.Input("policy", "sound", {mutations.POLICY: b"params: {kernel: bf16}"}), folder)
    if size := process_bytes("VmSize"):
        resource.setrlimit(resource.RLIMIT_AS, (size + _LIMIT, resource.RLIM_INFINITY))
    begin = process_bytes("VmRSS") or 0
    for number in numbers:
        print(json.dumps({"begin": number}), flush=True)
        one = mutations.make(kind_of(number, kinds), seed, number)
        outcome = check(one, folder, load=number // len(kinds) % _EVERY == 0)
        kept = (process_bytes("VmRSS") or 0) - begin
        print(json.dumps({"end": number, "label": one.label, "kept": kept, **dataclasses.asdict(outcome)}), flush=True)


@dataclasses.dataclass
class Tally:
    """What became of the inputs of one kind."""

    inputs: int = 0
    accepted: int = 0
    refused: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    slowest: float = 0.0
    at: int = 0  # the number of the slowest
    growth: int = 0
    broken: int = 0


@dataclasses.dataclass
class Report:
    """What became of all inputs.

    tallies   by kind
    failures  (kind, number, mutations, what happened) of every input that broke the promise
    kept      bytes that the largest process had grown by at its end: caches, and leaks if there are any
    """

    tallies: dict[str, Tally]
    failures: list[tuple[str, int, str, str]]
    kept: int = 0

    def __str__(self) -> str:
        columns = f"{'kind':<12}{'inputs':>8}{'accepted':>10}{'broken':>8}{'slowest ms':>12}{'(number)':>10}"
        lines = [f"{columns}{'growth MiB':>12}  refused"]
        for kind, tally in self.tallies.items():
            refused = ", ".join(f"{name} {count}" for name, count in tally.refused.most_common())
            numbers = (
                f"{tally.inputs:>8}{tally.accepted:>10}{tally.broken:>8}{tally.slowest * 1e3:>12.0f}{tally.at:>10}"
            )
            lines.append(f"{kind:<12}{numbers}{tally.growth / 2**20:>12.0f}  {refused}")
        lines.append(f"grown in all, at the end: {self.kept / 2**20:.0f} MiB")
        return "\n".join(lines)

    def add(self, number: int, label: str, outcome: Outcome) -> None:
        """Counts one input."""
        kind = kind_of(number, [*self.tallies])
        tally = self.tallies[kind]
        tally.inputs += 1
        tally.slowest, tally.at = max((tally.slowest, tally.at), (outcome.seconds, number))
        tally.growth = max(tally.growth, outcome.growth)
        if outcome.failures:
            tally.broken += 1
            self.failures += [(kind, number, label, failure) for failure in outcome.failures]
        elif outcome.refused:
            tally.refused[outcome.refused] += 1
        else:
            tally.accepted += 1


def run(
    inputs: int,
    seed: int = 0,
    keep: pathlib.Path | None = None,
    jobs: int | None = None,
    kinds: Sequence[str] = mutations.KINDS,
) -> Report:
    """Runs that many inputs in `jobs` processes (as many as there are cores), and says what became of them.

    keep   a folder for the files of those that broke the promise
    kinds  the kinds of inputs, in turn
    """
    jobs = jobs or os.cpu_count() or 1
    report = Report({kind: Tally() for kind in kinds}, [])
    lock = threading.Lock()
    with tempfile.TemporaryDirectory(dir=_memory_folder()) as scratch:
        bounds = [inputs * i // jobs for i in range(jobs + 1)]
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            tasks = [
                pool.submit(_supervise, seed, range(*bounds[i : i + 2]), pathlib.Path(scratch, str(i)), report, lock)
                for i in range(jobs)
            ]
            for task in tasks:
                task.result()
        report.failures.sort(key=lambda failure: failure[1])
        for kind, number in {failure[:2]: None for failure in report.failures} if keep else ():
            write(mutations.make(kind, seed, number), pathlib.Path(keep, f"{kind}-{seed}-{number}"))
    return report


def _supervise(seed: int, numbers: range, folder: pathlib.Path, report: Report, lock: threading.Lock) -> None:
    """Has `numbers` run in one process, and in another from the next on where one dies."""
    while numbers:
        command = [sys.executable, os.fspath(_HERE / "run.py"), "--work", f"{numbers.start}:{numbers.stop}"]
        command += ["--seed", str(seed), "--scratch", os.fspath(folder), "--kinds", ",".join(report.tallies)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        timer, began, done = _Patience(process), None, numbers.start
        for line in process.stdout:
            timer.again()
            fields = json.loads(line)
            if (began := fields.pop("begin", began)) is None or "end" not in fields:
                continue
            number, label, kept = fields.pop("end"), fields.pop("label"), fields.pop("kept")
            done = number + 1
            with lock:
                report.add(number, label, Outcome(**fields))
                report.kept = max(report.kept, kept)
        timer.stop()
        process.stdout.close()
        code = process.wait()
        if done < numbers.stop:
            if began is None:
                raise RuntimeError(f"a process of the fuzzer ended with {code} before its first input")
            why = f"the process ended with {code}" + (f", after {_STUCK:.0f} s" if timer.out else "")
            with lock:
                report.add(began, "?", Outcome(None, 0.0, 0, (why,)))
            done = began + 1
        numbers = range(done, numbers.stop)


class _Patience:
    """Kills a process that is silent for too long."""

    def __init__(self, process: subprocess.Popen[str]):
        self.process, self.out = process, False
        self.again()

    def _give_up(self) -> None:
        self.out = True
        self.process.kill()

    def again(self) -> None:
        """Begins to wait anew."""
        self.stop()
        self.timer = threading.Timer(_STUCK, self._give_up)
        self.timer.daemon = True
        self.timer.start()

    def stop(self) -> None:
        """Waits no longer."""
        if timer := getattr(self, "timer", None):
            timer.cancel()


def _memory_folder() -> str | None:
    """Where files cost no disk, if there is such a place."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, help="processes; as many as there are cores")
    parser.add_argument("--keep", type=pathlib.Path, help="a folder for inputs that broke the promise")
    parser.add_argument("--kinds", default=",".join(mutations.KINDS), help="kinds of inputs; all without it")
    parser.add_argument("--only", help="one input, such as policy/17")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    kinds = options.kinds.split(",")
    if options.work:
        _work(options.seed, range(*map(int, options.work.split(":"))), options.scratch, kinds)
        return 0
    if options.only:
        kind, _, number = options.only.partition("/")
        one = mutations.make(kind, options.seed, int(number))
        with tempfile.TemporaryDirectory(dir=_memory_folder()) as scratch:
            outcome = check(one, pathlib.Path(scratch, "one"), load=True)
        print(one.label, outcome, sep="\n")
        return bool(outcome.failures)
    begin = time.monotonic()
    report = run(options.inputs, options.seed, options.keep, options.jobs, kinds)
    print(report)
    for kind, number, label, failure in report.failures:
        print(f"{kind}/{number} ({label}): {failure}")
    print(f"{len(report.failures)} failures, {time.monotonic() - begin:.0f} s")
    return bool(report.failures)


if __name__ == "__main__":
    sys.exit(main())
