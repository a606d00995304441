"""Reading of JSON from untrusted files: its size is bounded, and a duplicate key is an error."""

from __future__ import annotations

import json
import os
import pathlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..policies.errors import InvalidCheckpoint, MissingFile, shown

LARGEST = 16 << 20
"""Maximum size of a file in bytes; the index of a model of 100,000 tensors has 10 MB."""

_MOST_ENTRIES = 1 << 18  # objects, lists and keys, which take most of the time and memory


def read_json(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The JSON object in a file.

    Raises:
      MissingFile: there is no such file.
      InvalidCheckpoint: not a regular file, not readable, or not a JSON object; see `parse_object`.
    """
    path = pathlib.Path(path)
    try:
        if path.exists() and not path.is_file():  # opening a pipe would block
            raise InvalidCheckpoint(f"{path}: not a regular file. Download it again.")
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
    except InvalidCheckpoint:
        raise
    except FileNotFoundError as error:
        raise MissingFile(f"{path}: there is no such file. A checkpoint's folder contains {path.name}.") from error
    except (OSError, ValueError) as error:
        raise InvalidCheckpoint(f"{path}: cannot be read: {error}.") from error
    try:
        return parse_object(data)
    except ValueError as error:
        raise InvalidCheckpoint(f"{path}: {error}. Download the file again.") from error


def parse_object(data: bytes, largest: int = LARGEST, most_entries: int = _MOST_ENTRIES) -> dict[str, Any]:
    """The JSON object in `data`, which is UTF-8.

    largest       bytes that it may have
    most_entries  objects, lists and keys that it may have

    Raises:
      ValueError: not UTF-8, not JSON, not an object, a duplicate key, or larger than any checkpoint needs.
    """
    entries = sum(data.count(mark) for mark in (b"{", b"[", b":"))
    if len(data) > largest or entries > most_entries:
        raise ValueError(f"more than {largest >> 20} MiB or {most_entries} entries of JSON")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"duplicate key {shown(name)}")
    return result
