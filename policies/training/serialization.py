"""Serialisation by Flax: `flax.serialization.to_bytes` and `from_bytes` of what perparam adds to trees.

Arrays are serialised; a format, and the fixed numbers of a loss scale, are those of the target that is restored into.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from flax import serialization

from ..dtypes import dtype_name
from ..errors import InvalidCheckpoint
from ..scaled_array import ScaledArray
from .loss_scale import DynamicLossScale, NoOpLossScale, StaticLossScale
from .state_formats import StateArray


def _register(kind: type, fields: tuple[str, ...]) -> None:
    """Makes Flax serialise the arrays `fields` of a dataclass as a mapping, without those that are None."""

    def to_state_dict(value: Any) -> dict[str, Any]:
        arrays = {name: getattr(value, name) for name in fields}
        return {name: x for name, x in arrays.items() if x is not None}

    def from_state_dict(target: Any, state: Any) -> Any:
        expected = to_state_dict(target)
        if not isinstance(state, dict) or state.keys() != expected.keys():
            found = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise InvalidCheckpoint(
                f"{_place()}: found {found}, expected {sorted(expected)}, the arrays of a {kind.__name__}. Restore "
                "into a state of the policy under which it was saved."
            )
        for name, x in expected.items():
            if _described(state[name]) != _described(x):
                raise InvalidCheckpoint(
                    f"{_place()}/{name}: found {_described(state[name])}, expected {_described(x)}. Restore into a "
                    "state of the policy under which it was saved."
                )
        return dataclasses.replace(target, **state)

    serialization.register_serialization_state(kind, to_state_dict, from_state_dict, override=True)


def _place() -> str:
    """Returns the path in the state that is restored."""
    path: str = serialization.current_path()
    return path.removeprefix("./")


def _described(array: Any) -> str:
    dtype = np.dtype(getattr(array, "dtype", type(array)))
    return f"{dtype_name(dtype)} {tuple(np.shape(array))}"


_register(ScaledArray, ("values", "scale_inv", "proxy"))
_register(StateArray, ("codes", "scales"))
_register(DynamicLossScale, ("loss_scale", "counter"))
_register(StaticLossScale, ())
_register(NoOpLossScale, ())
