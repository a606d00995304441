"""Typed reading of a JSON file's fields, with errors that name the file and the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..policies.errors import InvalidCheckpoint, UnsupportedConfig, shown


class Fields:
    """The fields of a JSON object, read with their types checked.

    name    the file, for errors
    values  the object
    """

    def __init__(self, name: str, values: Mapping[str, Any]):
        self.name, self.values = name, values

    def within(self, key: str) -> Fields:
        """The fields of the object in field `key`; none where that is null or absent."""
        return Fields(self.name, self.get(key, dict, {}))

    def unsupported(self, text: str) -> UnsupportedConfig:
        """The error that this file asks for something that is not implemented."""
        return UnsupportedConfig(f"{self.name}: {text}")

    def invalid(self, text: str) -> InvalidCheckpoint:
        """The error that this file is damaged or contradicts itself."""
        return InvalidCheckpoint(f"{self.name}: {text}")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The field `key`, of type `kind`; null counts as absent.

        Raises:
          InvalidCheckpoint: a value of another type, or a number that is not finite.
        """
        value = self.values.get(key)
        if value is None:
            return default
        accepted: Any = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise self.invalid(f"{key}: expected {kind.__name__}, found {shown(value)}.")
        if kind is not float:
            return value
        if not abs(value) < 1e30:  # NaN, infinity, and integers that are too large for a float
            raise self.invalid(f"{key}: expected a finite number, found {shown(value)}.")
        return float(value)

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer that fits in an int32.

        Raises:
          InvalidCheckpoint: any other value, and a missing field without a default.
        """
        value = self.get(key, int, default)
        if value is None:
            raise self.invalid(f"{key} is missing. The config of a model must contain it.")
        if not 1 <= value < 2**31:
            raise self.invalid(f"{key}: expected a positive integer below 2**31, found {value}.")
        return value

    def positive(self, key: str, default: float) -> float:
        """A positive number.

        Raises:
          InvalidCheckpoint: any other value.
        """
        value = self.get(key, float, default)
        if value <= 0:
            raise self.invalid(f"{key}: expected a positive number, found {value}.")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Token ids of a field that may be null, one id or a list.

        Raises:
          InvalidCheckpoint: any other value.
        """
        return token_ids(self.name, key, self.values.get(key))


def token_ids(name: str, key: str, ids: Any) -> tuple[int, ...]:
    """Token ids of the value `ids` in field `key` of the file `name`: null, one id or a list.

    Raises:
      InvalidCheckpoint: any other value.
    """
    listed = () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)
    if any(type(i) is not int or not 0 <= i < 2**31 for i in listed):
        raise InvalidCheckpoint(f"{name}: {key}: expected token ids, found {shown(ids)}.")
    return listed
