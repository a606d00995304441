"""The tokens on which policies are compared: ids or a text, cut into windows."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..models.tokens import checked_tokens
from ..policies.errors import InvalidTokens, shown
from .tokenizer import load_tokenizer

WINDOW = 256
"""Most tokens of a window; no window sees the one before it, so that memory does not grow with the text."""


def token_ids(
    tokens: ArrayLike | None, text: str | None, path: str | os.PathLike[str] | None, revision: str | None = None
) -> ArrayLike:
    """The ids of a text under the tokenizer of the checkpoint `path`, or else `tokens`; one of the two is given.

    Raises:
      InvalidTokens: neither or both are given; a text without a checkpoint, or without tokens.
      Errors of `load_tokenizer`.
    """
    if text is None and tokens is not None:
        return tokens
    if text is None or tokens is not None:
        raise InvalidTokens(f"expected tokens or text, found {'neither' if text is None else 'both'}.")
    if path is None:
        raise InvalidTokens("text: the model was not loaded from a folder with a tokenizer. Pass tokens.")
    ids = load_tokenizer(path, revision).encode(text)
    if not len(ids):
        raise InvalidTokens(f"expected a text with tokens, found {shown(text)}, which has none.")
    return ids


def token_windows(
    tokens: ArrayLike, attention_mask: ArrayLike | None, vocabulary: int
) -> tuple[np.ndarray, np.ndarray]:
    """`(ids, mask)`, both (windows, length), int32 and bool: rows of tokens cut into windows of at most 256 tokens.

    tokens          (length,) or (batch, length) ids
    attention_mask  the same shape, nonzero for real tokens; None: all are real

    Raises:
      InvalidTokens: no tokens, shapes or dtypes that do not fit, ids outside the vocabulary.
    """
    try:
        shape = np.shape(tokens)
    except ValueError:  # rows of different length, of which `checked_tokens` gives the error
        shape = (-1, -1)
    if 0 in shape:
        raise InvalidTokens(f"expected token ids, found none: the shape is {shape}.")
    if len(shape) == 1:
        rows: tuple[Any, Any] = [tokens], None if attention_mask is None else [attention_mask]
    else:
        rows = tokens, attention_mask
    ids, mask = (np.asarray(x) for x in checked_tokens(*rows, vocabulary))
    length = max(min(WINDOW, ids.shape[1]), 1)
    width = ((0, 0), (0, -ids.shape[1] % length))
    ids, mask = (np.pad(x, width).reshape(-1, length) for x in (ids, mask))
    real = mask.any(axis=1)
    return ids[real], mask[real]
