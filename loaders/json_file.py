"""JSON from files that nobody vouches for: of bounded size, without a key written twice."""

from __future__ import annotations

import json
import os
import pathlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..policies.errors import InvalidCheckpoint, MissingFile, shown

LARGEST = 16 << 20
"""Bytes; the index of a model of 100,000 tensors is 10 MB."""

_MOST_ENTRIES = 1 << 18  # objects, lists and keys: what time and memory go into


def read_json(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The object that a JSON file holds.

    Raises:
      MissingFile: where there is no such file.
      InvalidCheckpoint: where it is none, cannot be read, or is not a JSON object; see `parse_object`.
    """
    path = pathlib.Path(path)
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise InvalidCheckpoint(f"{path}: this is no file. Fetch it again.")
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
    except FileNotFoundError as error:
        raise MissingFile(f"{path}: there is no such file. A checkpoint's folder holds {path.name}.") from error
    except (OSError, ValueError) as error:
        raise InvalidCheckpoint(f"{path}: cannot be read: {error}.") from error
    try:
        return parse_object(data)
    except ValueError as error:
        raise InvalidCheckpoint(f"{path}: {error}. Fetch the file again.") from error


def parse_object(data: bytes) -> dict[str, Any]:
    """The object that JSON in UTF-8 writes.

    Raises:
      ValueError: for anything else, for a key that is written twice, and for more than a checkpoint can need.
    """
    entries = sum(data.count(mark) for mark in (b"{", b"[", b":"))
    if len(data) > LARGEST or entries > _MOST_ENTRIES:
        raise ValueError(f"more than {LARGEST >> 20} MiB or {_MOST_ENTRIES} entries of JSON")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{shown(name)} is written twice")
    return result
