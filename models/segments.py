"""Packed batches: rows of several sequences, with the segment ids that say which token is of which.

As in MaxText and Flax, the tokens of a sequence have the same positive segment id, and padding has 0.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from ..policies.errors import InvalidTokens, count, shown
from .kv_cache import EMPTY
from .tokens import integers

_LARGEST = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """Sequences in rows of one length, in numpy.

    input_ids    (rows, length) int32  0 for padding
    segment_ids  (rows, length) int32  1 for the first sequence of a row, 2 for the next, and 0 for padding
    positions    (rows, length) int32  position of each token in its sequence, 0 for padding
    """

    input_ids: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray


def pack(sequences: Iterable[ArrayLike], length: int) -> PackedBatch:
    """Returns sequences of token ids in as few rows of `length` as first-fit finds, with no token lost or cut.

    Each sequence, in the order given, is put into the first row with room for it, as a whole.

    >>> batch = pack([[5, 6, 7], [8, 9, 10], [11]], 4)
    >>> batch.input_ids.tolist(), batch.segment_ids.tolist(), batch.positions.tolist()
    ([[5, 6, 7, 11], [8, 9, 10, 0]], [[1, 1, 1, 2], [1, 1, 1, 0]], [[0, 1, 2, 0], [0, 1, 2, 0]])

    Raises:
      InvalidTokens: a sequence that is longer than `length`, has no tokens, or is not a list of token ids; a length
        that is no positive integer.
    """
    if not isinstance(length, numbers.Integral) or length < 1:
        raise InvalidTokens(
            f"length: expected a positive number of tokens, found {shown(length)}. Write 2048, for example."
        )
    found = [np.asarray(integers(f"sequences[{i}]", sequence)) for i, sequence in enumerate(sequences)]
    for i, ids in enumerate(found):
        if ids.ndim != 1 or not 0 < ids.size <= length:
            raise InvalidTokens(
                f"sequences[{i}]: expected 1 to {length} token ids, found shape {ids.shape}. Remove empty sequences, "
                "and cut longer ones, or increase the length."
            )
    sizes = np.array([ids.size for ids in found], np.int64)
    row, segment, start = _first_fit(sizes.tolist(), int(length))
    batch = PackedBatch(*(np.zeros((row.max(initial=-1) + 1, length), np.int32) for _ in range(3)))
    if not found:
        return batch
    positions = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    place = np.repeat(row * length + start, sizes) + positions
    batch.input_ids.ravel()[place] = _joined(found, sizes)
    batch.segment_ids.ravel()[place] = np.repeat(segment, sizes)
    batch.positions.ravel()[place] = positions
    return batch


def _joined(sequences: list[np.ndarray], sizes: np.ndarray) -> np.ndarray:
    """The token ids of all sequences, int64.

    Raises:
      InvalidTokens: an id that is negative or outside int32.
    """
    # Of uint64, the ids beyond int64 become negative.
    ids = np.concatenate([each.astype(np.int64, copy=False) for each in sequences])
    outside = np.flatnonzero((ids < 0) | (ids > _LARGEST))
    if outside.size:
        i = int(np.searchsorted(np.cumsum(sizes), outside[0], side="right"))
        at = int(outside[0] - sizes[:i].sum())
        raise InvalidTokens(
            f"sequences[{i}][{at}] is {sequences[i][at]}, expected a token id from 0 to {_LARGEST}. Use the ids of a "
            "tokenizer, and -100 in labels only."
        )
    return ids


def _first_fit(sizes: list[int], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`(row, segment, start)` of each sequence, from its size.

    The first row with room is found in a binary tree of the largest room of any row, which is that of all rows at the
    root (Johnson 1974, "Fast algorithms for bin packing"). Rows without a sequence have room for any, and are last.
    """
    leaves = 1 << max(len(sizes) - 1, 0).bit_length()
    room = [length] * (2 * leaves)
    segments = [0] * leaves
    places = []
    for size in sizes:
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < size:
                node += 1
        row = node - leaves
        segments[row] += 1
        places.append((row, segments[row], length - room[node]))
        room[node] -= size
        while node > 1:
            left, right = room[node], room[node ^ 1]
            largest = left if left > right else right
            node //= 2
            if room[node] == largest:
                break
            room[node] = largest
    rows, numbers_in_row, starts = np.array(places, np.int64).reshape(-1, 3).T
    return rows, numbers_in_row, starts


def checked_segments(segment_ids: ArrayLike, input_ids: ArrayLike) -> Any:
    """The segment ids as integers of the shape of `input_ids`, (b, t); in numpy, except under jit.

    Raises:
      InvalidTokens: other shapes or dtypes; except under jit, negative ids, and a segment that is not contiguous.
    """
    ids = integers("segment_ids", segment_ids)
    expected = integers("input_ids", input_ids).shape
    if ids.shape != expected or ids.ndim != 2:
        raise InvalidTokens(f"segment_ids: expected the shape of input_ids, {expected}, found {ids.shape}.")
    if isinstance(ids, jax.core.Tracer):
        return ids
    if (ids < 0).any():
        row, column = (int(i) for i in np.argwhere(ids < 0)[0])
        raise InvalidTokens(
            f"segment_ids[{row}, {column}] is {ids[row, column]}, expected 0 for padding and positive numbers for "
            "sequences."
        )
    for row, values in enumerate(ids):
        starts = values[np.flatnonzero(np.diff(values, prepend=0)) if values.size else []]
        found, counts = np.unique(starts[starts > 0], return_counts=True)
        if (counts > 1).any():
            raise InvalidTokens(
                f"segment_ids[{row}]: segment {found[counts > 1][0]} is in {count(counts.max(), 'place')} of the row, "
                "expected one. Number the sequences of a row 1, 2, 3, ..., as perparam.training.pack does."
            )
    return ids


def segment_positions(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(queries, slots, segments)`, all (b, t) int32: the positions of tokens in their segments, from 0 on.

    slots     EMPTY for padding
    segments  the number of each run of equal ids, so that attention and positions agree, whatever the ids are

    >>> queries, _, segments = segment_positions(jnp.array([[4, 4, 7, 7, 7, 0]]))
    >>> queries.tolist(), segments.tolist()
    ([[0, 1, 0, 1, 2, 0]], [[0, 0, 1, 1, 1, 2]])
    """
    columns = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    is_start = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    queries = columns - jax.lax.cummax(jnp.where(is_start, columns, 0), axis=1)
    return queries, jnp.where(segment_ids > 0, queries, EMPTY), jnp.cumsum(is_start, axis=1, dtype=jnp.int32)
