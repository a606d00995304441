"""What a tokenizer that is loaded must do: encode, decode, decode in pieces, and render its chat template.

Every call succeeds or raises a PerparamError, and the pieces of a stream join to the decoded text.
"""

from __future__ import annotations

import pathlib
import random
from typing import Any, Protocol

from perparam.loaders.text import sampling_defaults
from perparam.loaders.tokenizer import Tokenizer, load_tokenizer

_TEXTS = (
    "",
    "Hello <|im_end|> world,  it's 12345 é 你好 👩‍👩‍👧\r\n\n x<s></s>",
    "a" * 3000,
    " " * 3000,
    "ab1 \n" * 600,
)
_MOST_TOKENS = 192
"""Tokens for each character of a text, beside 256 of the post-processor; published tokenizers have up to 4."""

_MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello <b>&</b>"},
    {
        "role": "assistant",
        "content": "<think>\nhm\n</think>\n\nHi",
        "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
    },
    {"role": "user", "content": "a" * 500},
]
_TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


class Readers(Protocol):
    """Calls readers one by one, and notes what each did."""

    failures: list[str]
    refused: str | None

    def call(self, what: str, reader: Any, *arguments: Any, timed: bool = True) -> Any:
        """What the reader returns; None where it refuses."""


def read_tokenizer(folder: pathlib.Path, readers: Readers, only_template: bool) -> None:
    """Loads the tokenizer in `folder` and uses it; `only_template` where nothing but its chat template is hostile."""
    readers.call("sampling_defaults", sampling_defaults, folder)
    readers.refused = None
    tokenizer: Tokenizer | None = readers.call("load_tokenizer", load_tokenizer, folder)
    if tokenizer is None:
        return
    if not only_template:
        _use(tokenizer, readers)
    refused = readers.refused
    render = tokenizer.apply_chat_template
    readers.call("apply_chat_template", lambda: render(_MESSAGES, tokenize=not only_template))
    readers.call("apply_chat_template(tools)", lambda: render(_MESSAGES[1:2], tools=_TOOLS, enable_thinking=False))
    if not only_template:
        readers.refused = refused  # a tokenizer without a template is accepted


def _use(tokenizer: Tokenizer, readers: Readers) -> None:
    rng = random.Random(tokenizer.vocab_size)
    for text in _TEXTS:
        ids = readers.call(f"encode({text[:9]!a})", tokenizer.encode, text)
        readers.call(f"encode_prompt({text[:9]!a})", tokenizer.encode_prompt, text)
        if ids is None:
            continue
        if len(ids) > _MOST_TOKENS * len(text) + 256:
            readers.failures.append(f"encode: {len(ids)} tokens of {len(text)} characters")
        _decode(tokenizer, readers, ids[:200])
    for _ in range(3):
        _decode(tokenizer, readers, [rng.randrange(tokenizer.vocab_size + 2) for _ in range(12)])


def _decode(tokenizer: Tokenizer, readers: Readers, ids: list[int]) -> None:
    for skip in (True, False):
        text = readers.call("decode", lambda skip=skip: tokenizer.decode(ids, skip_special_tokens=skip))
        pieces = readers.call("decode_stream", lambda skip=skip: _streamed(tokenizer, ids, skip))
        if text is not None and pieces is not None and text != pieces:
            readers.failures.append("decode_stream: another text than that of decode")


def _streamed(tokenizer: Tokenizer, ids: list[int], skip: bool) -> str:
    stream = tokenizer.decode_stream(skip_special_tokens=skip)
    return "".join([*(stream.add(ids[at : at + 2]) for at in range(0, len(ids), 2)), stream.flush()])
