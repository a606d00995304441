"""Generation from text to text: `generate_text` and `stream_text`."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np

from ..models.decoder import CausalLM
from ..models.generation import CHUNK, GREEDY, Generated, GenerationConfig, Prefix, Sampling, decode
from ..policies.errors import InvalidCheckpoint, InvalidText
from .hub import local_folder
from .json_file import read_json
from .layout import GENERATION
from .tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Completion:
    """The answer to a prompt.

    text           the text, without the token or the stop string that ended it
    tokens         ids of the tokens, the one that ended the answer included
    finish_reason  "stop": a token or a stop string ended the answer; "length": it was cut off
    logprobs       log-probability of each token before any processing of the logits; None unless requested
    arrived        times of the first and of the last token, by `time.perf_counter`
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[float, ...] | None = None
    arrived: tuple[float, float] = dataclasses.field(default=(0.0, 0.0), compare=False)


def sampling_defaults(path: str | os.PathLike[str], *, revision: str | None = None) -> Sampling:
    """The sampling that a checkpoint's generation_config.json recommends; greedy without that file.

    path, revision  as for `load_model`; of a repository on the hub, no weights are downloaded

    Its temperature, top_k, top_p, min_p and repetition_penalty are read; other settings are ignored.

    Raises:
      InvalidCheckpoint, InvalidSampling: for fields of the wrong type or out of range.
    """
    file = local_folder(path, revision, weights=False, required=[]) / GENERATION
    if not file.is_file():
        return GREEDY
    fields = read_json(file)
    kinds = {
        "temperature": float, "top_p": float, "min_p": float, "repetition_penalty": float, "top_k": int,
    }  # fmt: skip
    values: dict[str, Any] = {}
    for name, kind in kinds.items():
        value = fields.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
                raise InvalidCheckpoint(f"{file}: {name}: expected a number, found {value!r}.")
            values[name] = value
    if fields.get("do_sample", False) is not True:
        return Sampling(temperature=0.0, repetition_penalty=values.get("repetition_penalty", 1.0))
    return Sampling(**values)


def generate_text(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str] | Prefix,
    max_new_tokens: int = 256,
    *,
    stop: str | Sequence[str] = (),
    sampling: Sampling = GREEDY,
    key: Any = 0,
    num_return_sequences: int = 1,
    logprobs: bool = False,
) -> list[Completion]:
    """The model's answers to text prompts, `num_return_sequences` for each prompt, in order.

    prompts   text; for a chat, the output of `tokenizer.apply_chat_template`. The BOS token is added if the checkpoint
              wants one and the text does not begin with it. Or a `Prefix`, which is continued
    stop      strings that end an answer and are not part of its text
    logprobs  whether the answers have the log-probability of each token

    The other arguments are those of `generate`.

    Raises:
      InvalidTokens, InvalidSampling, InvalidText
    """
    if not isinstance(prompts, Prefix):
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    config = GenerationConfig(
        max_new_tokens,
        sampling=sampling,
        key=key,
        num_return_sequences=num_return_sequences,
        logprobs=0 if logprobs else None,
    )
    run = _Run(model, tokenizer, prompts, config, stop)
    for _ in run.steps():
        pass
    return [row.completion() for row in run.rows]


def stream_text(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: str | Prefix,
    max_new_tokens: int = 256,
    *,
    stop: str | Sequence[str] = (),
    sampling: Sampling = GREEDY,
    key: Any = 0,
    chunk: int = CHUNK,
) -> Generator[str, None, Completion]:
    """An iterator over the text of an answer, while it is generated.

    prompt  text, or a `Prefix` of one row
    chunk   tokens between two pieces

    Text that may be the beginning of a stop string is held back until that is certain. The iterator's return value is
    the `Completion`. The other arguments and errors are those of `generate_text`.
    """
    prompts = prompt if isinstance(prompt, Prefix) else [prompt]
    run = _Run(model, tokenizer, prompts, GenerationConfig(max_new_tokens, sampling=sampling, key=key), stop, chunk)
    if len(run.rows) != 1:
        raise InvalidText(f"stream_text answers one prompt, found {len(run.rows)}.")
    return _pieces(run)


def _pieces(run: _Run) -> Generator[str, None, Completion]:
    (row,) = run.rows
    for _ in run.steps():
        if piece := row.next_piece():
            yield piece
    return row.completion()


class _Row:
    """An answer in progress."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], eos: frozenset[int]):
        self._decoder, self._stop, self._eos = tokenizer.decode_stream(), stop, eos
        self._text, self._returned, self._longest = "", 0, max(map(len, stop), default=0)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.reason: str | None = None
        self._first = self._last = time.perf_counter()

    def add(self, tokens: Sequence[int], logprobs: Sequence[float]) -> bool:
        """Adds tokens; returns whether the answer has ended with them."""
        if self.reason is None:
            self._last = time.perf_counter()
            self._first = self._first if self.tokens else self._last
        for i, token in enumerate(tokens):
            if self.reason is not None:
                break
            self.tokens.append(int(token))
            self.logprobs += map(float, logprobs[i : i + 1])
            if token in self._eos:
                self._append(self._decoder.flush())
                self.reason = "stop"
            else:
                self._append(self._decoder.add([int(token)]))
        return self.reason is not None

    def _append(self, text: str) -> None:
        """Adds text; the answer ends at a stop string that is complete with it."""
        before = max(len(self._text) - self._longest, 0)
        self._text += text
        if places := [at for each in self._stop if (at := self._text.find(each, before)) >= 0]:
            self._text, self.reason = self._text[: min(places)], "stop"

    def end(self) -> None:
        """Ends an answer that no token or stop string has ended."""
        if self.reason is None:
            self._append(self._decoder.flush())  # bytes of an incomplete character may complete a stop string
            self.reason = self.reason or "length"

    def next_piece(self) -> str:
        """The text since the last call, without an end that may begin a stop string."""
        certain = len(self._text)
        if self.reason is None:
            for length in range(min(self._longest - 1, len(self._text)), 0, -1):
                if any(each.startswith(self._text[-length:]) for each in self._stop):
                    certain -= length
                    break
        piece = self._text[self._returned : certain]
        self._returned = max(certain, self._returned)
        return piece

    def completion(self) -> Completion:
        """The finished answer."""
        assert self.reason is not None
        logprobs = tuple(self.logprobs) or None
        return Completion(self._text, tuple(self.tokens), self.reason, logprobs, (self._first, self._last))


class _Run:
    """Answers to several prompts, decoded together."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        prompts: Sequence[str] | Prefix,
        config: GenerationConfig,
        stop: str | Sequence[str],
        chunk: int | None = None,
    ):
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(each, str) and each for each in stops):
            raise InvalidText(f"stop: expected strings of at least one character, found {stops!r}.")
        eos = frozenset((*model.config.eos_token_id, *tokenizer.eos_ids))
        if isinstance(prompts, Prefix):
            inputs: tuple[Any, Any] = (prompts, None)
            rows = prompts.tokens.shape[0]
        else:
            inputs, rows = _padded([tokenizer.encode_prompt(prompt) for prompt in prompts]), len(prompts)
        self.rows = [_Row(tokenizer, stops, eos) for _ in range(rows * config.num_return_sequences)]
        # Stop strings are searched for after each chunk; without any, one chunk is enough.
        if chunk is None:
            chunk = CHUNK if stops else max(config.max_new_tokens, 1)
        self._parts = decode(model, *inputs, dataclasses.replace(config, eos_token_id=sorted(eos)), chunk=chunk)

    def steps(self) -> Iterator[None]:
        """Generates to the end; yields after every chunk."""
        try:
            part: Generated = next(self._parts)
            while True:
                logprobs = part.logprobs if part.logprobs is not None else np.zeros((len(self.rows), 0))
                ended = [
                    row.add(tokens[:length], row_logprobs[:length])
                    for row, tokens, length, row_logprobs in zip(
                        self.rows, part.tokens, part.lengths, logprobs, strict=True
                    )
                ]
                yield
                part = self._parts.send(np.array(ended))
        except StopIteration:
            pass
        for row in self.rows:
            row.end()
        yield


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 and mask bool (prompts, longest length) of prompts, padded on the left."""
    if not prompts or not all(prompts):
        raise InvalidText("a prompt is empty, so there is nothing to continue.")
    longest = max(map(len, prompts))
    ids = np.array([[0] * (longest - len(each)) + list(each) for each in prompts], np.int32)
    mask = np.array([[0] * (longest - len(each)) + [1] * len(each) for each in prompts], bool)
    return ids, mask
