"""Streaming decoder: token ids to text while a model generates, equal to decoding all ids at once.

The `decoder` of a tokenizer.json is one step, or a `Sequence` of steps, that rewrites a list of tokens; the text is the
output of the last step, joined. Each class below is the incremental form of one step of Hugging Face tokenizers, with
the same name. Published decoders are built from them in three ways:

    ByteLevel                                        Qwen3, Llama 3, SmolLM2
    Sequence[Replace, ByteFallback, Fuse, Strip]     Llama 2, TinyLlama: SentencePiece with byte fallback
    Metaspace                                        SentencePiece without byte fallback
"""

from __future__ import annotations

import codecs
import json
import operator
import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from ...policies.errors import InvalidTokens, UnsupportedConfig, shown

if TYPE_CHECKING:  # imported on first use, since the import takes 65 ms
    import tokenizers


class DecodeStream:
    """Decodes token ids in pieces: the results of `add` and `flush`, joined, are what `Tokenizer.decode` returns.

    skipped  the tokens that do not become text
    """

    def __init__(self, backend: tokenizers.Tokenizer, skipped: Collection[str] = ()):
        self._backend, self._skipped = backend, skipped
        self._steps = decoding_steps(backend)

    def add(self, ids: Iterable[int]) -> str:
        """Return the text that these ids complete; later ids cannot change it.

        The bytes of a character wait for the rest of it. Byte tokens such as <0x0A>, which Llama 2 has for a newline,
        wait for the next token of another kind: one invalid byte turns all byte tokens beside it into U+FFFD.

        Raises:
          InvalidTokens: if `ids` is not a sequence of token ids.
        """
        tokens = [self._backend.id_to_token(one) for one in checked_ids(ids)]
        pieces = [token for token in tokens if token is not None and token not in self._skipped]
        for step in self._steps:
            pieces = step.add(pieces)
        return "".join(pieces)

    def flush(self) -> str:
        """Return the text of all bytes that still wait, and start a new text."""
        pieces: list[str] = []
        for step in self._steps:
            pieces = step.add(pieces) + step.flush()
        self._steps = decoding_steps(self._backend)
        return "".join(pieces)


def checked_ids(ids: Any) -> list[int]:
    """Return token ids as a list of ints.

    Raises:
      InvalidTokens: if `ids` is not a flat sequence of integers from 0 to 2**32 - 1, the range of tokenizers.
    """
    try:
        checked = list(map(operator.index, ids.tolist() if hasattr(ids, "tolist") else ids))
    except TypeError as error:
        raise InvalidTokens(
            f"expected the token ids of one text, found {shown(ids)}. Pass a flat list or a 1-D array of integers."
        ) from error
    if wrong := [one for one in checked if not 0 <= one < 2**32]:
        raise InvalidTokens(f"expected token ids from 0 to 2**32 - 1, found {shown(wrong[0])}.")
    return checked


class _Step(Protocol):
    """One step of a decoder, fed in pieces; a step is used for one text."""

    def add(self, tokens: list[str]) -> list[str]:
        """Return the output tokens that `tokens` complete."""

    def flush(self) -> list[str]:
        """Return the output tokens that were still incomplete when the text ended."""


def decoding_steps(backend: tokenizers.Tokenizer, name: str = "tokenizer.json") -> list[_Step]:
    """Return new steps for the decoder of a tokenizer, in the order in which they apply.

    name  the file that describes the decoder, for the error

    Raises:
      UnsupportedConfig: if a step has no incremental form here, or cannot follow the steps before it.
    """
    if backend.decoder is None:
        raise UnsupportedConfig(f"{name}: decoder null {_NOT_IMPLEMENTED}")
    state = json.loads(backend.decoder.__getstate__())  # the JSON of the decoder as tokenizers understood it
    sequence = state["type"] == "Sequence"
    steps: list[_Step] = []
    joined = False  # whether the tokens are one text by now, without boundaries between them
    for fields in state["decoders"] if sequence else [state]:
        kind = fields["type"]
        step = None if joined and kind in _PER_TOKEN else _step(kind, fields, joined)
        if step is None:
            raise UnsupportedConfig(f"{name}: decoder {'Sequence: step ' if sequence else ''}{kind} {_NOT_IMPLEMENTED}")
        steps.append(step)
        joined = joined or kind in ("ByteLevel", "Fuse")
    return steps


_PER_TOKEN = ("ByteLevel", "Replace", "ByteFallback", "Metaspace")
"""Steps that depend on the boundaries between tokens, and so cannot follow a step that joins them."""

_NOT_IMPLEMENTED = (
    "is not implemented here. Supported decoders are ByteLevel, Metaspace, and Sequence of Replace (of a string), "
    "ByteFallback, Metaspace, then Fuse and Strip (at the start). Use transformers for this tokenizer."
)


def _step(kind: str, fields: Mapping[str, Any], joined: bool) -> _Step | None:
    """Return the step that tokenizer.json describes in `fields`, or None if it is not implemented."""
    if kind == "ByteLevel":
        return _ByteLevel()
    if kind == "Replace" and fields["pattern"].get("String"):
        return _Replace(fields["pattern"]["String"], fields["content"])
    if kind == "ByteFallback":
        return _ByteFallback()
    if kind == "Metaspace":
        return _Metaspace(fields["replacement"], fields["prepend_scheme"] != "never")
    if kind == "Fuse":
        return _Fuse()
    if kind == "Strip" and joined and not fields["stop"]:
        return _Strip(fields["content"], fields["start"])
    return None


class _ByteLevel:
    """Maps each character of GPT-2's byte alphabet to its byte, and decodes the bytes of all tokens as UTF-8."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, tokens: list[str]) -> list[str]:
        """See `_Step.add`."""
        return [self._decoder.decode(b"".join(map(_bytes, tokens)))]

    def flush(self) -> list[str]:
        """See `_Step.flush`."""
        return [self._decoder.decode(b"", final=True)]


# GPT-2's byte alphabet: a printable byte is its Latin-1 character, the others are numbered from U+0100 on.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + index): byte for index, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))
}


def _bytes(token: str) -> bytes:
    try:
        return bytes(map(_BYTES.__getitem__, token))
    except KeyError:  # an added token that is written in plain text
        return token.encode()


class _Stateless:
    """Base of the steps that never hold text back."""

    def flush(self) -> list[str]:
        """See `_Step.flush`."""
        return []


class _Replace(_Stateless):
    """Replaces a string in each token, such as "▁" by a space."""

    def __init__(self, pattern: str, content: str):
        self._pattern, self._content = pattern, content

    def add(self, tokens: list[str]) -> list[str]:
        """See `_Step.add`."""
        return [token.replace(self._pattern, self._content) for token in tokens]


_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")  # the sign is what Rust's `u8::from_str_radix` accepts


class _ByteFallback:
    """Decodes each run of adjacent byte tokens, such as <0xE4>; in an invalid run, every byte becomes U+FFFD."""

    def __init__(self) -> None:
        self._run = bytearray()

    def add(self, tokens: list[str]) -> list[str]:
        """See `_Step.add`."""
        output = []
        for token in tokens:
            if byte := _BYTE_TOKEN.fullmatch(token):
                self._run.append(int(byte[1], 16))
            else:
                output += [*self.flush(), token]
        return output

    def flush(self) -> list[str]:
        """See `_Step.flush`."""
        run = bytes(self._run)
        self._run.clear()
        try:
            return [run.decode()] if run else []
        except UnicodeDecodeError:
            return ["\ufffd"] * len(run)


class _Metaspace(_Stateless):
    """Replaces "▁" by a space, and removes it from the first token if encoding had added it in front of the text."""

    def __init__(self, replacement: str, prepended: bool):
        self._replacement, self._first = replacement, prepended

    def add(self, tokens: list[str]) -> list[str]:
        """See `_Step.add`."""
        output = [token.replace(self._replacement, " ") for token in tokens]
        if tokens and self._first:
            output[0] = tokens[0].replace(self._replacement, "")
            self._first = False
        return output


class _Fuse(_Stateless):
    """Joins all tokens into one, which only matters to the steps that follow."""

    def add(self, tokens: list[str]) -> list[str]:
        """See `_Step.add`."""
        return tokens


class _Strip(_Stateless):
    """Removes up to `count` times the character `content` from the start of the text."""

    def __init__(self, content: str, count: int):
        self._content, self._left = content, count

    def add(self, tokens: list[str]) -> list[str]:
        """See `_Step.add`."""
        text = "".join(tokens)
        while self._left and text.startswith(self._content):
            text = text.removeprefix(self._content)
            self._left -= 1
        if text:
            self._left = 0
        return [text]
