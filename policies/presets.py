"""The presets, and `get_policy`, which converts every `policy=` argument to a Policy."""

from __future__ import annotations

import difflib
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any, TypeAlias

from .dtypes import as_dtype, is_dtype_name
from .errors import InvalidPolicy
from .policy import Policy
from .rules import unknown_slot
from .slots import SLOTS

_FOLDER = pathlib.Path(__file__).parent / "presets"


@functools.cache
def _preset(name: str) -> Policy:
    file = _FOLDER / f"{name}.yaml"
    return Policy.loads(file.read_text(encoding="utf-8"), name=file.name)


@functools.cache
def preset_names() -> tuple[str, ...]:
    """Returns the names of the presets in alphabetical order."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def _is_file(name: str) -> bool:
    try:
        return pathlib.Path(name).is_file()
    except (OSError, ValueError):  # not a file name: too long, as YAML text can be, or with a NUL character
        return False


PolicyLike: TypeAlias = Policy | str | os.PathLike[str] | Mapping[str, Any] | None
"""What `get_policy` accepts, and every `policy=` argument with it."""


def get_policy(policy: PolicyLike) -> Policy:
    """Returns the policy for a Policy, a mapping, a path, text or None.

    The first of these that applies: a Policy; None, for a policy that changes nothing; a mapping of slots; a path
    object; the name of a preset; the name of a dtype, for `params`, `compute` and `output`; text with `=`, as for
    `Policy.parse`; the path of an existing file.

    >>> get_policy("bf16") == Policy("bf16", "bf16", "bf16")
    True

    Raises:
      InvalidPolicy: for any other value, and for an invalid policy.
    """
    if isinstance(policy, Policy):
        return policy
    if policy is None:
        return Policy()
    if isinstance(policy, Mapping):
        if unknown := sorted(map(str, set(policy) - {*SLOTS, "block"})):
            raise unknown_slot(unknown[0])
        return Policy(**policy)
    if isinstance(policy, os.PathLike):
        return Policy.load(policy)
    if not isinstance(policy, str):
        raise InvalidPolicy(
            f"{policy!r} is not a policy. Pass a Policy, a mapping, the name of a preset or a YAML file."
        )
    if policy in preset_names():
        return _preset(policy)
    if is_dtype_name(policy):
        dtype = as_dtype(policy)
        return Policy(dtype, dtype, dtype)
    if "=" in policy:
        return Policy.parse(policy)
    if _is_file(policy):
        return Policy.load(policy)
    near = difflib.get_close_matches(policy, preset_names(), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise InvalidPolicy(f"{policy!r} is neither a preset ({', '.join(preset_names())}), a dtype nor a file.{hint}")
