"""Whether the readers of perparam keep their promise with one input.

For any input, each reader either succeeds or raises a PerparamError: within a second, in bounded memory, with a message
that a terminal can show, and without any warning but `CheckpointWarning`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import checkpoints
import numpy as np
from fuzz import mutations
from fuzz.tokenizer_readers import read_tokenizer

import perparam
from perparam.loaders import CheckpointWarning, open_checkpoint, open_config
from perparam.loaders.families import read_config
from perparam.loaders.safetensors.reader import read_header
from perparam.policies import ArrayInfo, Format

_HERE = pathlib.Path(__file__).resolve().parent

SLOW, HUNG = 1.0, 5.0
"""Seconds of the processor that a reader may take, and after which it is interrupted."""
MOST_MEMORY = 256 << 20
"""Bytes by which one input may make the process grow at its peak."""
LONGEST_MESSAGE = 10_000
"""Characters of an error's message; some twenty problems are listed at once."""


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
    elif one.kind in ("tokenizer", "template"):
        read_tokenizer(folder, readers, only_template=one.kind == "template")
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


# The readers of each kind of input.


def _read_checkpoint(one: mutations.Input, folder: pathlib.Path, readers: _Readers, load: bool) -> None:
    if one.kind == "config":
        for name in (mutations.CONFIG, mutations.GENERATION):
            readers.call(f"read_config({name})", read_config, folder / name)
        readers.call("open_config", open_config, folder / mutations.CONFIG)
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


# What one reader does.


class _Hung(BaseException):
    """No Exception, so that nothing on the way catches it."""


@contextlib.contextmanager
def _watchdog() -> Iterator[None]:
    def interrupt(*_: Any) -> None:
        raise _Hung

    before = signal.signal(signal.SIGPROF, interrupt)
    # Again each second: the first may come inside a destructor, which swallows what is raised.  The seconds are the
    # processor's; a reader that waits without using it is given up by the process that started this one.
    signal.setitimer(signal.ITIMER_PROF, HUNG, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


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


# Memory.


def process_bytes(field: str) -> int | None:
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:")), None)


def _begin_peak() -> int:
    """Bytes in memory now, from which on the peak is measured."""
    with contextlib.suppress(OSError):  # Linux's way to forget the peak so far; elsewhere it stays that of all time
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    return process_bytes("VmRSS") or _peak()


def _peak() -> int:
    return process_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
