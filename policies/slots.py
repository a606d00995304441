"""The slots of a policy: one table that says what each of them accepts.

A slot is added by one entry here and by the code that reads it: constructors, YAML, `repr`, equality, strictness and
errors follow from the entry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from . import dtypes
from .errors import InvalidPolicy, UnknownDtype
from .formats import Format, as_format
from .scales import amax_rule


@dataclasses.dataclass(frozen=True)
class Slot:
    """One field of a policy.

    name          what constructors and YAML call it
    by_parameter  True: a map from patterns to formats, or one format for all parameters; False: one dtype
    check         `check(where, format, kind)` raises UnknownDtype or InvalidPolicy for a format it does not accept;
                  kind is "rule", "scales" (a rule that names scales) or "default"
    unset         what it means that the slot says nothing, in a few words
    """

    name: str
    by_parameter: bool
    check: Callable[[str, Format, str], None]
    unset: str

    def read(self, key: str, value: Any, kind: str) -> Format | None:
        """The format that `value` writes for `key`; None leaves it alone.

        Raises:
          UnknownDtype, InvalidPolicy: with the slot and the key.
        """
        if value is None:
            return None
        where = f"{self.name}: {key}"
        if isinstance(value, str) and value in ("None", "none", "Null", "NULL", "~"):
            raise InvalidPolicy(f"{where}: {value!r} is text here. To leave a parameter alone write null.")
        try:
            format = as_format(value)
        except (UnknownDtype, InvalidPolicy) as error:
            raise type(error)(f"{where}: {error}") from error
        if not dtypes.can_store(format.values):
            raise UnknownDtype(
                f"{where}: a parameter cannot be {dtypes.dtype_name(format.values)}. "
                "Write a float (f32, bf16, f16), a narrow type with scales (f8_e4m3fn, f8_e5m2, …, int8), or null."
            )
        if format.name is None and (format.rule is not amax_rule or format.activations is not None):
            raise InvalidPolicy(
                f"{where}: a Format with a rule or activations of its own has to have a name, by which text and stored "
                "pairs know it. Register it with register_format."
            )
        self.check(where, format, kind)
        return format

    def read_one(self, value: Any) -> Format | None:
        """The format of a slot that is not by parameter; `{default: …}` is the same as the dtype alone."""
        if isinstance(value, Mapping) and "dtype" not in value:
            if set(value) - {"default"}:
                raise InvalidPolicy(
                    f"{self.name}: the slot holds one dtype, found the map {dict(value)}. Write f32, say."
                )
            value = value.get("default")
        return self.read("default", value, "default")


def _refuse_narrow_default(where: str, format: Format) -> None:
    if format.narrow:
        slot, _, key = where.partition(": ")
        dtype = dtypes.dtype_name(format.values)
        raise UnknownDtype(
            f"{slot}: {dtype} needs scales, which only parameters of two or more dimensions have, "
            f"so it cannot be the {key} of a slot. Name the parameters: {{kernel: {format.name or dtype}}}."
        )


def _check_params(where: str, format: Format, kind: str) -> None:
    if kind == "default":
        _refuse_narrow_default(where, format)
    elif kind == "scales" and not dtypes.is_activation(format.values):
        raise UnknownDtype(
            f"{where}: scales are f32, bf16 or f16, not {dtypes.dtype_name(format.values)}. "
            "Write one of these, null to keep the current ones, or the scale in the kernel's format: "
            "{dtype: f8_e4m3fn, block: [128, 128], scale: f8_e8m0fnu}."
        )


def _check_compute(where: str, format: Format, kind: str) -> None:
    if kind == "default":
        _refuse_narrow_default(where, format)
        if not dtypes.is_activation(format.values):
            raise UnknownDtype(
                f"{where}: activations are f32, bf16 or f16, not {dtypes.dtype_name(format.values)}. "
                "Write one of these."
            )
    elif kind == "scales":
        raise InvalidPolicy(f"{where}: scales are always applied in f32. Write null, or leave the rule out.")
    elif format.name is None and (format.block is not None or format.scale is not None):
        raise InvalidPolicy(
            f"{where}: activations are quantised as a named format says, or as the kernel's own. Write a dtype or a "
            "name, without block and scale."
        )
    elif not dtypes.is_activation(format.values) and (format.values.kind == "i" or not format.narrow):
        raise UnknownDtype(
            f"{where}: {dtypes.dtype_name(format.values)} is no dtype to compute in. "
            "Write f32, bf16, f16, or a float8 type for matmuls with both operands narrow."
        )


def _check_output(where: str, format: Format, kind: str) -> None:
    _refuse_narrow_default(where, format)


def _check_kv_cache(where: str, format: Format, kind: str) -> None:
    allowed = dtypes.is_activation(format.values) or format.values in (np.dtype(ml_dtypes.float8_e4m3fn), np.int8)
    if not allowed or format.block is not None or format.scale is not None:
        raise UnknownDtype(
            f"kv_cache: {format} is no dtype for keys and values. Write f32, bf16, f16, f8_e4m3fn or int8."
        )


SLOTS: dict[str, Slot] = {
    slot.name: slot
    for slot in (
        Slot("params", True, _check_params, "stored as it comes"),
        Slot("compute", True, _check_compute, "narrow as stored, plain in the activations' dtype"),
        Slot("output", False, _check_output, "the activations' dtype"),
        Slot("kv_cache", False, _check_kv_cache, "the activations' dtype"),
    )
}
"""The table, in the order in which policies are written.  `block` stands beside it: it is no slot, but the block of
rules that name none."""
