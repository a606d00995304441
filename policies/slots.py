"""The slots of a policy (`params`, `compute`, …): a table of the values that each slot accepts.

A new slot needs one entry here and the code that reads it: constructors, YAML, `repr`, equality, the checks of rules
and the errors follow from the entry.
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
from .training.state_formats import LINEAR_SECOND_MOMENT, SECOND_MOMENTS, StateFormat, as_state_format


@dataclasses.dataclass(frozen=True)
class Slot:
    """One field of a policy.

    name          its name in constructors and in YAML
    by_parameter  True: a map from patterns to formats, or one format for all parameters; False: one dtype
    check         `check(where, format, kind)` raises UnknownDtype or InvalidPolicy for a format that the slot does not
                  accept; kind is "rule", "scales" (a rule for scales) or "default"
    training      whether only training uses the slot: `resolve` applies it if it is named, since a model that is
                  loaded or run may have none of the parameters that are trained
    by_field      whether paths begin with the field of an optimizer's state: `mu/layers/0/kernel`.  A key without a
                  slash is the name of a field
    parse         returns the format for a value of a rule
    """

    name: str
    by_parameter: bool
    check: Callable[[str, Format, str], None]
    training: bool = False
    by_field: bool = False
    parse: Callable[[Any], Format] = as_format

    def read(self, key: str | None, value: Any, kind: str) -> Format | None:
        """Returns the format that `value` stands for as the value of `key`; None for null, which changes nothing.

        key  the key in the map of the slot; None for a slot that is one dtype

        Raises:
          UnknownDtype, InvalidPolicy: for a value that the slot does not accept; the message names slot and key.
        """
        if value is None:
            return None
        where = self.name if key is None else f"{self.name}: {key}"
        if isinstance(value, str) and value in ("None", "none", "Null", "NULL", "~"):
            raise InvalidPolicy(f"{where}: {value!r} is text here. To leave a parameter unchanged write null.")
        try:
            format = self.parse(value)
        except (UnknownDtype, InvalidPolicy) as error:
            raise type(error)(f"{where}: {error}") from error
        if not (dtypes.can_store(format.values) or isinstance(format, StateFormat)):
            raise UnknownDtype(
                f"{where}: a parameter cannot be {dtypes.dtype_name(format.values)}. "
                "Write a float (f32, bf16, f16), a narrow type with scales (f8_e4m3fn, f8_e5m2, …, int8), or null."
            )
        if format.name is None and (format.rule is not amax_rule or format.activations is not None):
            raise InvalidPolicy(
                f"{where}: a Format with its own scale rule or activation format needs a name, so that YAML and stored "
                "pairs can refer to it. Register it with register_format."
            )
        self.check(where, format, kind)
        return format

    def read_one(self, value: Any) -> Format | None:
        """Returns the format of a slot that holds one dtype; `{default: bf16}` means the same as `bf16`."""
        if isinstance(value, Mapping) and "dtype" not in value:
            if set(value) - {"default"}:
                raise InvalidPolicy(
                    f"{self.name}: the slot holds one dtype, found the map {dict(value)}. Write a dtype such as f32."
                )
            value = value.get("default")
        return self.read(None, value, "default")


def _refuse_narrow_default(where: str, format: Format) -> None:
    if format.narrow:
        slot, _, key = where.partition(": ")
        dtype = dtypes.dtype_name(format.values)
        raise UnknownDtype(
            f"{slot}: {dtype} needs scales, which only parameters of two or more dimensions have, so it cannot be "
            f"the {key or 'only dtype'} of a slot. Name the parameters: {{kernel: {format.name or dtype}}}."
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
            f"{where}: a compute format has no block or scale of its own: activations use those of a named format or "
            "of the kernel's format. Write a dtype or the name of a format."
        )
    elif not dtypes.is_activation(format.values) and (format.values.kind == "i" or not format.narrow):
        raise UnknownDtype(
            f"{where}: matmuls do not compute in {dtypes.dtype_name(format.values)}. "
            "Write f32, bf16, f16, or a float8 type to make both operands narrow (W8A8)."
        )


def _check_output(where: str, format: Format, kind: str) -> None:
    if format.narrow:
        raise UnknownDtype(
            f"{where}: {dtypes.dtype_name(format.values)} needs scales, which a result does not have. "
            "Write f32, bf16 or f16."
        )


def _check_kv_cache(where: str, format: Format, kind: str) -> None:
    allowed = dtypes.is_activation(format.values) or format.values in (np.dtype(ml_dtypes.float8_e4m3fn), np.int8)
    if not allowed or format.block is not None or format.scale is not None:
        raise UnknownDtype(
            f"kv_cache: keys and values cannot be cached as {format}. Write f32, bf16, f16, f8_e4m3fn or int8."
        )


def _check_wide(what: str) -> Callable[[str, Format, str], None]:
    """Returns the check of a slot for training whose formats are f32, bf16 and f16."""

    def check(where: str, format: Format, kind: str) -> None:
        if kind == "scales":
            raise InvalidPolicy(
                f"{where}: scales are computed from their kernel, so they have no {what}. Write null, or leave the "
                "rule out."
            )
        if not dtypes.is_activation(format.values):
            raise UnknownDtype(f"{where}: {what} cannot be {format}. Write f32, bf16 or f16, or null.")

    return check


def _check_opt_state(where: str, format: Format, kind: str) -> None:
    if kind == "scales":
        raise InvalidPolicy(
            f"{where}: scales are computed from their kernel, so no optimizer has state for them. Leave the rule out."
        )
    if format.values == np.int8 and where.partition(": ")[2].partition("/")[0] in SECOND_MOMENTS:
        raise InvalidPolicy(f"{where}: {LINEAR_SECOND_MOMENT}")
    if not (dtypes.is_activation(format.values) or isinstance(format, StateFormat)):
        raise UnknownDtype(
            f"{where}: the state of an optimizer cannot be {format}. Write f32, bf16, f16, dynamic8 or f8_e4m3fn."
        )


SLOTS: dict[str, Slot] = {
    slot.name: slot
    for slot in (
        Slot("params", True, _check_params),
        Slot("compute", True, _check_compute),
        Slot("output", False, _check_output),
        Slot("kv_cache", False, _check_kv_cache),
        Slot("grads", True, _check_wide("gradients"), training=True),
        Slot("opt_state", True, _check_opt_state, training=True, by_field=True, parse=as_state_format),
        Slot("master", True, _check_wide("master"), training=True),
    )
}
"""Every slot by name, in the order in which a policy is written.  A policy's `block` is not a slot."""
