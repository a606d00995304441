"""Batches of token ids: rows of similar length, padded to few shapes, so that few programs are compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from ..models.decoder import Decoder
from ..models.generation.prefix import bucket
from ..models.tokens import checked_tokens
from ..policies.errors import InvalidText, UnsupportedTask
from ..policies.hosts import on_host
from .tokenizer import Tokenizer

BATCH_TOKENS = 8192
"""Tokens of a batch, padding included, by default."""

Program = Callable[[Any, nnx.State, jax.Array, jax.Array], jax.Array]
"""A compiled function of a model's graphdef and state, ids (b, t) int32 and mask (b, t) bool, which returns (b, n)."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows that are processed together.

    rows   their places in the input
    shape  (height, width) after padding: both are powers of two, or a width three quarters of one
    """

    rows: tuple[int, ...]
    shape: tuple[int, int]


def in_batches(lengths: Sequence[int], batch_tokens: int = BATCH_TOKENS) -> Iterator[Batch]:
    """Batches of rows with these lengths, the longest first; all full batches of a width have the same height.

    batch_tokens  most tokens of a batch, padding included; a longer row is a batch of its own

    >>> [(batch.rows, batch.shape) for batch in in_batches([3, 70, 5], batch_tokens=100)]
    [((1,), (1, 96)), ((2, 0), (2, 16))]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        width = bucket(lengths[order[start]])
        height = 1 << max(batch_tokens // width, 1).bit_length() - 1
        rows = tuple(order[start : start + height])
        yield Batch(rows, (min(height, 1 << (len(rows) - 1).bit_length()), width))
        start += height


def run_in_batches(
    program: Program, model: Decoder, rows: Sequence[Sequence[int]], batch_tokens: int, columns: int
) -> np.ndarray:
    """The results (rows, columns) float32 of `program` for rows of token ids, in the order of the rows.

    Raises:
      InvalidTokens: ids outside the model's vocabulary.
    """
    graphdef, state = nnx.split(model)
    results = np.empty((len(rows), columns), np.float32)
    for batch in in_batches([len(row) for row in rows], batch_tokens):
        ids, mask = np.zeros(batch.shape, np.int32), np.zeros(batch.shape, bool)
        for place, row in enumerate(batch.rows):
            ids[place, : len(rows[row])], mask[place, : len(rows[row])] = rows[row], True
        outputs = program(graphdef, state, *checked_tokens(ids, mask, model.config.vocab_size))
        results[list(batch.rows)] = on_host(outputs)[: len(batch.rows)]
    return results


def encoded(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """The token ids of each text, at most `max_length`, with those that the tokenizer adds.

    Raises:
      InvalidText: a text without a token.
    """
    rows = [tokenizer.encode(text, max_length=max_length) for text in texts]
    if not all(rows):
        raise InvalidText(
            f"texts: text {rows.index([])} is empty, and the tokenizer adds no token to it. Leave it out."
        )
    return rows


def check_arguments(function: str, model: Any, tokenizer: Any) -> None:
    """Raises an error unless these are a model and its tokenizer.

    Raises:
      UnsupportedTask
    """
    if not isinstance(model, Decoder) or not isinstance(tokenizer, Tokenizer):
        raise UnsupportedTask(
            f"{function}: expected a model and its tokenizer, found {type(model).__name__} and "
            f"{type(tokenizer).__name__}. Pass load_model(path) and load_tokenizer(path)."
        )


def checked_text(name: str, text: Any) -> str:
    """`text`, which must be one string.

    Raises:
      InvalidText: anything else, such as a list.
    """
    if not isinstance(text, str):
        raise InvalidText(f"{name}: expected one text, found {type(text).__name__}. Pass a string for all texts.")
    return text


def listed(name: str, texts: Any) -> list[str]:
    """`texts` as a list of strings; one string is a list of one.

    Raises:
      InvalidText: anything else.
    """
    items = [texts] if isinstance(texts, str) or not hasattr(texts, "__iter__") else list(texts)
    if wrong := [text for text in items if not isinstance(text, str)]:
        raise InvalidText(f"{name}: expected texts, found {type(wrong[0]).__name__}. Pass a list of strings.")
    return items
