"""`perparam chat`: a conversation on a terminal, answers as they come, thinking dimmed."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

import jax

from .loaders import Completion, Tokenizer, stream
from .models import Prefix, Qwen3, Sampling, prefill, reread
from .policies import PerparamError

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_OBEYED = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""Control characters, which a model may write and a terminal would obey."""

_THINK, _THOUGHT = "<think>", "</think>"
HELP = "/reset begins anew, /policy FILE changes the policy (a preset or dtype too), /help says this, /quit ends."


class Chat:
    """A conversation.

    system           what the system message says; None: there is none
    enable_thinking  as the chat template reads it; None leaves it unset
    """

    def __init__(
        self,
        model: Qwen3,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        enable_thinking: bool | None = None,
        sampling: Sampling,
        max_new_tokens: int = 2048,
        seed: int = 0,
        out: TextIO | None = None,
    ):
        self.model, self._tokenizer, self._system, self._thinking = model, tokenizer, system, enable_thinking
        self._found, self._sampling, self._most, self._seed = model, sampling, max_new_tokens, seed
        self._out = sys.stdout if out is None else out
        self._colour = self._out.isatty() and not os.environ.get("NO_COLOR")
        self.messages: list[dict[str, Any]] = []
        self.reset()

    def reset(self) -> None:
        """Forgets what was said."""
        self._read: Prefix | None = None
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def run(self) -> None:
        """Reads lines until there are no more; Ctrl-C ends an answer, and at the prompt a line."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # which gives `input` editing and a history
        print(HELP, file=self._out)
        while True:
            try:
                line = input("> ").strip()
            except KeyboardInterrupt:
                print(file=self._out)
                continue
            except UnicodeDecodeError as error:
                print(f"perparam: this is no UTF-8 text: {error}", file=self._out)
                continue
            except EOFError:
                print(file=self._out)
                return
            if line in ("/quit", "/exit"):
                return
            if line:
                self.take(line)

    def take(self, line: str) -> None:
        """Does what a line says: a command, or something to answer."""
        try:
            if line == "/reset":
                self.reset()
                print("Forgotten.", file=self._out)
            elif line.startswith("/policy"):
                # Of the parameters as they were loaded: a second change is not made of the first.
                self.model = self._found.with_policy(line.removeprefix("/policy").strip() or None)
                self._read = None
                print(f"{self.model.policy!r}", file=self._out)
            elif line.startswith("/"):
                print(HELP, file=self._out)
            else:
                self.answer(line)
        except PerparamError as error:
            print(f"perparam: {error}", file=self._out)
        except KeyboardInterrupt:
            print("(stopped)", file=self._out)

    def answer(self, text: str) -> Completion | None:
        """The answer to `text`, printed as it comes; None where it was interrupted."""
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self._tokenizer.apply_chat_template(asked, enable_thinking=self._thinking)
        watch, said, completion = Stopwatch(), "", None
        with _interruptions() as interrupted:
            read = self._read_prompt(prompt)
            if interrupted:
                raise KeyboardInterrupt
            pieces = stream(self.model, self._tokenizer, read, self._most, sampling=self._sampling, seed=self._seed)
            shown = _Shown(self._out, self._colour, prompt.rstrip().endswith(_THINK))
            try:
                while not interrupted:
                    piece = next(pieces)
                    said += piece
                    shown.add(piece)
            except StopIteration as end:
                completion = end.value
            except KeyboardInterrupt:
                pass
            finally:
                pieces.close()
                shown.end()
        _, answered = self._tokenizer.split_thinking(said, opened=shown.opened)
        self.messages = [*asked, {"role": "assistant", "content": answered}]
        self._seed += 1
        if completion is None:
            print("(stopped)", file=self._out)
        else:
            print(self._dimmed(watch.summary(completion)), file=self._out)
        return completion

    def _read_prompt(self, prompt: str) -> Prefix:
        """The prompt as the model has read it: of a conversation only what is new since the last time."""
        ids = [self._tokenizer.encode_prompt(prompt)]
        if self._read is None:
            self._read = prefill(self.model, ids, room=self._most)
        else:
            self._read = reread(self.model, ids, self._read, room=self._most)
        return self._read

    def _dimmed(self, text: str) -> str:
        return f"{_DIM}{text}{_PLAIN}" if self._colour else text


class _Shown:
    """Text on its way to the terminal; what is thought is dimmed.

    As `Tokenizer.split_thinking` has it: `<think>` counts where only blanks came before it, the first `</think>` ends
    the thought, and then nothing is a mark any more.
    """

    def __init__(self, out: TextIO, colour: bool, opened: bool):
        self._out, self._colour, self.opened, self._held = out, colour, opened, ""
        self._mark: str | None = _THOUGHT if opened else _THINK
        self._dim(opened)

    def add(self, piece: str) -> None:
        """Writes a piece; a mark that may only have begun waits for its end."""
        text, self._held = self._held + piece, ""
        if self._mark == _THINK:
            blank = text[: len(text) - len(text.lstrip())]
            if text.lstrip().startswith(_THINK):
                self._write(blank)
                self._dim(True)
                self._write(_THINK)
                self._mark, text = _THOUGHT, text.lstrip().removeprefix(_THINK)
            elif _THINK.startswith(text.lstrip()):
                self._held = text
                return
            else:
                self._mark = None
        if self._mark == _THOUGHT:
            before, found, after = text.partition(_THOUGHT)
            if found:
                self._write(before + found)
                self._dim(False)
                self._mark, text = None, after
            else:
                begun = next((n for n in range(len(_THOUGHT) - 1, 0, -1) if text.endswith(_THOUGHT[:n])), 0)
                text, self._held = text[: len(text) - begun], text[len(text) - begun :]
        self._write(text)

    def end(self) -> None:
        """Writes what is held back, and ends the line."""
        self._write(self._held)
        if self._mark == _THOUGHT:
            self._dim(False)
        self._write("\n")

    def _dim(self, dim: bool) -> None:
        if self._colour:
            self._out.write(_DIM if dim else _PLAIN)

    def _write(self, text: str) -> None:
        self._out.write(text.translate(_OBEYED))
        self._out.flush()


@contextlib.contextmanager
def _interruptions() -> Iterator[list[int]]:
    """Ctrl-C is noted in the list, not raised: in the middle of what JAX compares it would become another error."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


class Stopwatch:
    """How long an answer takes, from now on."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def summary(self, answer: Completion) -> str:
        """Tokens, the time to the first one, the rate of the others, and memory."""
        (first, last), others = answer.arrived, len(answer.tokens) - 1
        rate = f", then {others / (last - first):.1f} tokens/s" if others > 0 and last > first else ""
        waited = max(first - self._start, 0.0)
        return f"{len(answer.tokens)} tokens, the first after {waited:.2f} s{rate}, {memory()}"


def memory() -> str:
    """The most that was in use so far: on the device where it says so, else resident on the host."""
    found = jax.local_devices()[0].memory_stats() or {}
    if peak := found.get("peak_bytes_in_use"):
        return f"{peak / 2**30:.2f} GiB on the device"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB"
