"""Runs hostile inputs through everything in perparam that reads files, and holds it to its promise.

    python tests/fuzz/run.py --inputs 20000 --seed 0 --keep DIR

For any input, each reader either succeeds or raises a PerparamError: within a second, in bounded memory, with a message
that a terminal can show, and without any warning but `CheckpointWarning`.  Exits 1 where one does not; the files of
such inputs are then in DIR, and `--only KIND/NUMBER` runs one again.

Inputs run in processes of their own, so that one that kills the interpreter is found out as well.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_HERE = pathlib.Path(__file__).resolve().parent
for _folder in (_HERE, _HERE.parent):  # `mutations` and `checkpoints`, as pytest and as a program
    if str(_folder) not in sys.path:
        sys.path.append(str(_folder))

import checkpoints  # noqa: E402
import mutations  # noqa: E402
import numpy as np  # noqa: E402

import perparam  # noqa: E402
from perparam.loaders import CheckpointWarning, open_checkpoint  # noqa: E402
from perparam.loaders.families import read_config  # noqa: E402
from perparam.loaders.safetensors.reader import read_header  # noqa: E402
from perparam.policies import ArrayInfo, Format  # noqa: E402

SLOW, HUNG = 1.0, 5.0
"""Seconds of the processor that a reader may take, and seconds on the clock after which it is interrupted."""
MOST_MEMORY = 256 << 20
"""Bytes by which one input may make the process grow at its peak."""
LONGEST_MESSAGE = 10_000
"""Characters of an error's message; some twenty problems are listed at once."""
_LIMIT = 6 << 30  # bytes of address space beyond those of a fresh process, so that a memory bomb ends in MemoryError
_STUCK = 90.0  # seconds without a finished input after which a process is given up
_EVERY = 20  # of so many checkpoints, one that is accepted is read into a model as well


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one input.

    refused   the error's type, None where the readers accepted it
    seconds   what the slowest reader took
    growth    bytes by which the process grew at its peak
    failures  how the promise was broken, one line each
    """

    refused: str | None
    seconds: float
    growth: int
    failures: tuple[str, ...] = ()


# One input.


class _Hung(BaseException):
    """No Exception, so that nothing on the way catches it."""


@contextlib.contextmanager
def _watchdog() -> Iterator[None]:
    def interrupt(*_: Any) -> None:
        raise _Hung

    before = signal.signal(signal.SIGALRM, interrupt)
    # Again each second: the first may come inside a destructor, which swallows what is raised.
    signal.setitimer(signal.ITIMER_REAL, HUNG, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _Readers:
    """Calls readers one by one, and notes what each did."""

    def __init__(self) -> None:
        self.refused: str | None = None
        self.seconds = 0.0
        self.hung = False
        self.failures: list[str] = []

    def call(self, what: str, reader: Callable[..., Any], *arguments: Any, timed: bool = True) -> Any:
        """What the reader returns; None where it refuses."""
        seconds, result = self._once(what, reader, *arguments)
        if timed and seconds > SLOW and not self.hung:  # the garbage of all inputs before may have been collected
            again = time.process_time()
            with contextlib.suppress(BaseException), warnings.catch_warnings(), _watchdog():
                warnings.simplefilter("ignore")
                reader(*arguments)
            seconds = min(seconds, time.process_time() - again)
            if seconds > SLOW:
                self.failures.append(f"{what}: took {seconds:.1f} s")
        if timed:
            self.seconds = max(self.seconds, seconds)
        return result

    def _once(self, what: str, reader: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
        result, self.hung = None, False
        begin = time.process_time()  # of the processor: on a busy machine the clock says little
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with _watchdog():
                    result = reader(*arguments)
            except perparam.PerparamError as error:
                self.refused = type(error).__name__
                if problem := _message_problem(str(error)):
                    self.failures.append(f"{what}: {type(error).__name__} {problem}")
            except _Hung:
                self.hung = True
                self.failures.append(f"{what}: still running after {HUNG:.0f} s{_where(sys.exc_info()[2])}")
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:
                text = f"{type(error).__name__}: {error!s:.200}"
                self.failures.append(f"{what}: {text!a}{_where(error.__traceback__)}")
        for warning in caught:
            if not issubclass(warning.category, CheckpointWarning):
                text = f"{warning.category.__name__}: {warning.message!s:.200}"
                self.failures.append(f"{what}: warned {text!a}")
            elif problem := _message_problem(str(warning.message)):
                self.failures.append(f"{what}: CheckpointWarning {problem}")
        return time.process_time() - begin, result


def _where(trace: Any) -> str:
    """The innermost line of perparam that an error passed through."""
    root = pathlib.Path(perparam.__file__).resolve().parent
    frames = [
        frame for frame in traceback.extract_tb(trace) if pathlib.Path(frame.filename).resolve().is_relative_to(root)
    ]
    frames = [frame for frame in frames if not pathlib.Path(frame.filename).resolve().is_relative_to(_HERE)]
    if not frames:
        return ""
    return f" at {pathlib.Path(frames[-1].filename).resolve().relative_to(root)}:{frames[-1].lineno}"


def _message_problem(text: str) -> str | None:
    """Why a terminal cannot show the message of an error, or should not."""
    if len(text) > LONGEST_MESSAGE:
        return f"with a message of {len(text)} characters, which begins {text[:80]!a}"
    if wrong := next((character for character in text if character != "\n" and not character.isprintable()), None):
        return f"with {wrong!a} raw in its message"
    return None


def write(one: mutations.Input, folder: pathlib.Path) -> None:
    """Puts the files of an input in a folder of their own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in one.files.items():
        file = folder / name
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif content == mutations.FIFO:
            os.mkfifo(file)
        elif content == mutations.FOLDER:
            file.mkdir()
        else:
            file.symlink_to(file.name if content == mutations.LOOP else "/dev/zero")


def check(one: mutations.Input, folder: pathlib.Path, load: bool = False) -> Outcome:
    """Writes an input into `folder` and hands it to the readers of its kind; `load` makes models of checkpoints too."""
    write(one, folder)
    readers = _Readers()
    before = _begin_peak()
    if one.kind == "policy":
        _read_policy(one, folder, readers)
    else:
        _read_checkpoint(one, folder, readers, load)
    growth = max(0, _peak() - before)
    if growth > MOST_MEMORY:
        readers.failures.append(f"grew by {growth >> 20} MiB")
    return Outcome(readers.refused, readers.seconds, growth, tuple(dict.fromkeys(readers.failures)))


def failures_of(reader: Callable[[], Any]) -> list[str]:
    """How a reader without arguments breaks the promise."""
    readers = _Readers()
    readers.call("reader", reader)
    return readers.failures


def _read_checkpoint(one: mutations.Input, folder: pathlib.Path, readers: _Readers, load: bool) -> None:
    if one.kind == "config":
        for name in (mutations.CONFIG, mutations.GENERATION):
            readers.call(f"read_config({name})", read_config, folder / name)
    if one.kind == "safetensors":
        for file in one.files:
            if file.endswith(".safetensors"):
                tensors = readers.call(f"read_header({file})", read_header, folder / file)
                for tensor in list((tensors or {}).values())[:64]:
                    readers.call("Tensor.read", tensor.read)
    readers.refused = None  # what the folder comes to is what counts
    checkpoint = readers.call("open_checkpoint", open_checkpoint, folder)
    if checkpoint is None:
        return
    readers.call("checkpoint_tree", perparam.checkpoint_tree, folder)
    policy = readers.call("infer_policy", perparam.infer_policy, folder)
    if policy is not None:
        readers.call("explain", lambda: str(policy.explain(checkpoint.tree)))
    if load:  # compiled for every shape anew, hence not timed
        for name in (None, "bf16"):
            readers.call(f"load_model({name})", perparam.load_model, folder, name, timed=False)


def _read_policy(one: mutations.Input, folder: pathlib.Path, readers: _Readers) -> None:
    file, content = folder / mutations.POLICY, one.files[mutations.POLICY]
    if len(content) % 2:  # the one calls the other
        readers.call("Policy.load", perparam.Policy.load, file)
    else:
        readers.call("get_policy", perparam.get_policy, os.fspath(file))
    if not isinstance(content, bytes):
        return
    readers.refused = None
    try:
        text = content.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        text = content.decode("utf-8", "replace")
    policy = readers.call("Policy.loads", perparam.Policy.loads, text)
    if policy is None:
        return
    plan = readers.call("explain", policy.explain, tree())
    if plan is not None:
        readers.call("str(plan)", lambda: (str(plan), plan.to_json()))
    # Where there is little of it: what is accepted can be written, and says the same.
    if len(text) < 20_000:
        written = readers.call("dumps", policy.dumps)
        if written is not None and readers.call("loads(dumps)", perparam.Policy.loads, written) != policy:
            readers.failures.append("dumps: loads reads another policy back")


@functools.cache
def tree() -> dict[str, Any]:
    """The shapes of a Qwen3 of 18 layers, FP8 and about 400 paths, as nested mappings."""
    narrow, wide = Format(np.dtype(checkpoints.F8), (128, 128)), Format(np.dtype(np.float32))

    def pair(rows: int, columns: int) -> dict[str, ArrayInfo]:
        grid = checkpoints.grid((rows, columns), (128, 128))
        return {"kernel": ArrayInfo((rows, columns), narrow), "scale_inv": ArrayInfo(grid, wide)}

    def norm(size: int) -> dict[str, ArrayInfo]:
        return {"scale": ArrayInfo((size,), wide)}

    attention = {f"{one}_proj": pair(256, 256) for one in "qkvo"} | {"q_norm": norm(64), "k_norm": norm(64)}
    mlp = {"gate_proj": pair(512, 256), "up_proj": pair(512, 256), "down_proj": pair(256, 512)}
    layer = {
        "input_layernorm": norm(256), "self_attn": attention, "post_attention_layernorm": norm(256), "mlp": mlp,
    }  # fmt: skip
    return {
        "embed_tokens": {"embedding": ArrayInfo((1000, 256), wide)},
        "layers": {str(i): layer for i in range(18)},
        "norm": norm(256),
        "lm_head": {"kernel": ArrayInfo((1000, 256), wide)},
    }


# Memory.


def _status(field: str) -> int | None:
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:")), None)


def _begin_peak() -> int:
    """Bytes in memory now, from which on the peak is measured."""
    with contextlib.suppress(OSError):  # Linux's way to forget the peak so far; elsewhere it stays that of all time
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS") or _peak()


def _peak() -> int:
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


# Many inputs.


def kind_of(number: int) -> str:
    """The kind of an input: all in turn."""
    return mutations.KINDS[number % len(mutations.KINDS)]


def _work(seed: int, numbers: range, folder: pathlib.Path) -> None:
    """Runs inputs one after the other, and prints a line of JSON before and after each."""
    for variant in range(2):  # what compiles, compiles before anything is measured
        rng = random.Random(variant)
        check(mutations.Input("safetensors", "sound", mutations.seed_checkpoint(rng)), folder, load=True)
        check(mutations.Input("policy", "sound", {mutations.POLICY: b"params: {kernel: bf16}"}), folder)
    if size := _status("VmSize"):
        resource.setrlimit(resource.RLIMIT_AS, (size + _LIMIT, resource.RLIM_INFINITY))
    begin = _status("VmRSS") or 0
    for number in numbers:
        print(json.dumps({"begin": number}), flush=True)
        one = mutations.make(kind_of(number), seed, number)
        outcome = check(one, folder, load=number // len(mutations.KINDS) % _EVERY == 0)
        kept = (_status("VmRSS") or 0) - begin
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
        tally = self.tallies[kind_of(number)]
        tally.inputs += 1
        tally.slowest, tally.at = max((tally.slowest, tally.at), (outcome.seconds, number))
        tally.growth = max(tally.growth, outcome.growth)
        if outcome.failures:
            tally.broken += 1
            self.failures += [(kind_of(number), number, label, failure) for failure in outcome.failures]
        elif outcome.refused:
            tally.refused[outcome.refused] += 1
        else:
            tally.accepted += 1


def run(inputs: int, seed: int = 0, keep: pathlib.Path | None = None, jobs: int | None = None) -> Report:
    """Runs that many inputs in `jobs` processes (as many as there are cores), and says what became of them.

    keep  a folder for the files of those that broke the promise
    """
    jobs = jobs or os.cpu_count() or 1
    report = Report({kind: Tally() for kind in mutations.KINDS}, [])
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
        process = subprocess.Popen(
            [*command, "--seed", str(seed), "--scratch", os.fspath(folder)], stdout=subprocess.PIPE, text=True
        )
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
    parser.add_argument("--only", help="one input, such as policy/17")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        _work(options.seed, range(*map(int, options.work.split(":"))), options.scratch)
        return 0
    if options.only:
        kind, _, number = options.only.partition("/")
        one = mutations.make(kind, options.seed, int(number))
        with tempfile.TemporaryDirectory(dir=_memory_folder()) as scratch:
            outcome = check(one, pathlib.Path(scratch, "one"), load=True)
        print(one.label, outcome, sep="\n")
        return bool(outcome.failures)
    begin = time.monotonic()
    report = run(options.inputs, options.seed, options.keep, options.jobs)
    print(report)
    for kind, number, label, failure in report.failures:
        print(f"{kind}/{number} ({label}): {failure}")
    print(f"{len(report.failures)} failures, {time.monotonic() - begin:.0f} s")
    return bool(report.failures)


if __name__ == "__main__":
    sys.exit(main())
