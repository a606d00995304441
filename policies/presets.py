"""`get_policy`, which converts every `policy=` argument to a Policy."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any, TypeAlias

from .dtypes import as_dtype, is_dtype_name
from .errors import InvalidPolicy
from .include import is_file, nearest_preset, preset_file, preset_names
from .policy import Policy
from .rules import unknown_slot
from .slots import SLOTS


@functools.cache
def _preset(name: str) -> Policy:
    file = preset_file(name)
    return Policy.loads(file.read_text(encoding="utf-8"), name=file.name)


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
    if is_file(policy):
        return Policy.load(policy)
    names = ", ".join(preset_names())
    raise InvalidPolicy(f"{policy!r} is neither a preset ({names}), a dtype nor a file.{nearest_preset(policy)}")
