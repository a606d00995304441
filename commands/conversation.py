"""`perparam chat`: a conversation on a terminal; answers are streamed, and the model's thinking is dimmed."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

from ..loaders import Completion, Tokenizer, stream_text
from ..models import CausalLM, Prefix, Sampling, extend_prefix, prefill
from ..policies import PerparamError
from ..policies.targets import peak_memory

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""Control characters and their replacement; a model may write them, and a terminal would obey."""

_THINK, _THOUGHT = "<think>", "</think>"
HELP = "/reset clears the conversation, /policy POLICY changes the policy, /help prints this, /quit ends."


class Chat:
    """A conversation with a model on a terminal.

    system           text of the system message; None: no such message
    enable_thinking  argument of the chat template; None leaves it unset
    """

    def __init__(
        self,
        model: CausalLM,
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
        self._loaded, self._sampling, self._most, self._seed = model, sampling, max_new_tokens, seed
        self._out = sys.stdout if out is None else out
        self._colour = self._out.isatty() and not os.environ.get("NO_COLOR")
        self.messages: list[dict[str, Any]] = []
        self.reset()

    def reset(self) -> None:
        """Clears the conversation."""
        self._prefix: Prefix | None = None
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def run(self) -> None:
        """Reads and answers lines until the input ends; Ctrl-C ends an answer, or the line at the prompt."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives `input` line editing and a history
        print(HELP, file=self._out)
        while True:
            try:
                line = input("> ").strip()
            except KeyboardInterrupt:
                print(file=self._out)
                continue
            except UnicodeDecodeError as error:
                print(f"perparam: the line is not UTF-8 text: {error}", file=self._out)
                continue
            except EOFError:
                print(file=self._out)
                return
            if line in ("/quit", "/exit"):
                return
            if line:
                self.take(line)

    def take(self, line: str) -> None:
        """Runs a command such as `/reset`, or answers a message."""
        try:
            if line == "/reset":
                self.reset()
                print("Conversation cleared.", file=self._out)
            elif line.startswith("/policy"):
                # From the parameters as loaded, so that a second change does not build on the first.
                self.model = self._loaded.with_policy(line.removeprefix("/policy").strip() or None)
                self._prefix = None
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
        """The answer to `text`, printed piece by piece; None if it was interrupted."""
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._tokenizer.apply_chat_template(messages, enable_thinking=self._thinking)
        watch, output, completion = Stopwatch(), "", None
        with _interruptions() as interrupts:
            prefix = self._prefill(prompt)
            if interrupts:
                raise KeyboardInterrupt
            pieces = stream_text(
                self.model, self._tokenizer, prefix, self._most, sampling=self._sampling, key=self._seed
            )
            printer = _AnswerPrinter(self._out, self._colour, prompt.rstrip().endswith(_THINK))
            try:
                while not interrupts:
                    piece = next(pieces)
                    output += piece
                    printer.add(piece)
            except StopIteration as end:
                completion = end.value
            except KeyboardInterrupt:
                pass  # it ends the answer, and what there is of it counts
            finally:
                pieces.close()
                printer.end()
        _, answer = self._tokenizer.split_thinking(output, opened=printer.opened)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self._seed += 1
        if completion is None:
            print("(stopped)", file=self._out)
        else:
            print(self._dimmed(watch.summary(completion)), file=self._out)
        return completion

    def _prefill(self, prompt: str) -> Prefix:
        """The prompt as the model has processed it; only tokens after the previous prompt's are processed."""
        ids = [self._tokenizer.encode_prompt(prompt)]
        if self._prefix is None:
            self._prefix = prefill(self.model, ids, max_new_tokens=self._most)
        else:
            self._prefix = extend_prefix(self.model, self._prefix, ids, max_new_tokens=self._most)
        return self._prefix

    def _dimmed(self, text: str) -> str:
        return f"{_DIM}{text}{_PLAIN}" if self._colour else text


class _AnswerPrinter:
    """Writes an answer to the terminal, with the thinking dimmed.

    As in `Tokenizer.split_thinking`, `<think>` begins the thinking if only blanks come before it, the first `</think>`
    ends it, and later marks are ordinary text.
    """

    def __init__(self, out: TextIO, colour: bool, opened: bool):
        self._out, self._colour, self.opened, self._pending = out, colour, opened, ""
        self._mark: str | None = _THOUGHT if opened else _THINK
        self._dim(opened)

    def add(self, piece: str) -> None:
        """Writes a piece; text that may begin a mark is held back until that is certain."""
        text, self._pending = self._pending + piece, ""
        if self._mark == _THINK:
            blank = text[: len(text) - len(text.lstrip())]
            if text.lstrip().startswith(_THINK):
                self._write(blank)
                self._dim(True)
                self._write(_THINK)
                self._mark, text = _THOUGHT, text.lstrip().removeprefix(_THINK)
            elif _THINK.startswith(text.lstrip()):
                self._pending = text
                return
            else:
                self._mark = None
        if self._mark == _THOUGHT:
            before, mark, after = text.partition(_THOUGHT)
            if mark:
                self._write(before + mark)
                self._dim(False)
                self._mark, text = None, after
            else:
                count = next((n for n in range(len(_THOUGHT) - 1, 0, -1) if text.endswith(_THOUGHT[:n])), 0)
                text, self._pending = text[: len(text) - count], text[len(text) - count :]
        self._write(text)

    def end(self) -> None:
        """Writes text that is still held back, and ends the line."""
        self._write(self._pending)
        if self._mark == _THOUGHT:
            self._dim(False)
        self._write("\n")

    def _dim(self, dim: bool) -> None:
        if self._colour:
            self._out.write(_DIM if dim else _PLAIN)

    def _write(self, text: str) -> None:
        self._out.write(text.translate(_CONTROLS))
        self._out.flush()


@contextlib.contextmanager
def _interruptions() -> Iterator[list[int]]:
    """A context in which Ctrl-C adds to the list instead of raising.

    Raised inside one of JAX's comparisons, KeyboardInterrupt would be replaced by another error.
    """
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = signal.signal(signal.SIGINT, lambda number, _: signals.append(number))
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, before)


class Stopwatch:
    """Measures the time that an answer takes."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def summary(self, answer: Completion) -> str:
        """Number of tokens, time to the first one, rate of the others, peak memory."""
        (first, last), others = answer.arrived, len(answer.tokens) - 1
        rate = f", then {others / (last - first):.1f} tokens/s" if others > 0 and last > first else ""
        wait = max(first - self._start, 0.0)
        count = "1 token" if len(answer.tokens) == 1 else f"{len(answer.tokens)} tokens"
        size, where = peak_memory()
        return f"{count}, the first after {wait:.2f} s{rate}, {size / 2**30:.2f} GiB on the {where}"
