"""Formats: the representation of an array as values and scales; the registry of formats, and their words in a policy.

An array in a narrow format has values in a narrow dtype, and one scale for each block; the weight is
`values * scale_inv` in float32.  Despite the name `scale_inv`, which published checkpoints use, the scale is a
multiplier.  `scaled_array` has the arrays and their quantisation.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np

from . import dtypes
from .blocks import DEFAULT_BLOCK, Block, as_block, block_sides, grid_shape
from .errors import InvalidPolicy, UnknownDtype
from .scales import E4M3, E8M0, F32, ScaleRule, amax_rule, can_scale, shared_exponent_rule

ROW_BLOCK: Block = (1, 128)
"""The default block of activations: one row and 128 columns, as in DeepSeek-V3."""


@dataclasses.dataclass(frozen=True)
class Format:
    """The representation of an array: the dtype of its values, and for narrow dtypes the block and dtype of its scales.

    values       dtype of the values
    block        (rows, columns) that share one scale, -1 for a whole axis; None for a dtype that is not narrow.
                 In a rule None means unspecified: the block of the stored array, or else the policy's block
    scale        dtype of the scales; None likewise
    rule         computes the scales
    activations  format of activations that are multiplied with a kernel of this format when both are narrow (W8A8);
                 None: float32 scales for each row and 128 columns

    A dtype that is not narrow is a format without scales.  Only `parts` and `quantize` depend on the arrays that make
    up a format: a format with a third array, or with several values in a byte, would change these two.

    >>> str(Format(np.dtype("float32"))), str(as_format({"dtype": "int8", "block": [1, -1]}))
    ('f32', 'int8 1×all')
    """

    values: np.dtype
    block: Block | None = None
    scale: np.dtype | None = None
    rule: ScaleRule = amax_rule
    activations: Format | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.values, np.dtype):
            raise UnknownDtype(
                f"Format.values is an np.dtype, found {self.values!r}. Use as_format, which accepts names and types."
            )
        if self.block is not None:
            object.__setattr__(self, "block", as_block(self.block))
        if self.values.kind == "i" and self.scale == E4M3:
            raise InvalidPolicy(
                f"scales in f8_e4m3fn are at least 2**-6, which is too large for {dtypes.dtype_name(self.values)}. "
                "Write f32, bf16 or f16."
            )

    @property
    def narrow(self) -> bool:
        """Whether the dtype of the values is narrow, so that it needs scales."""
        return dtypes.is_narrow(self.values)

    @property
    def name(self) -> str | None:
        """The name under which the format is registered, or None."""
        return next((name for name, format in FORMATS.items() if format == self), None)

    def __str__(self) -> str:
        if self.name is not None:
            return self.name
        words = [dtypes.dtype_name(self.values)]
        if self.block is not None and self.block != DEFAULT_BLOCK:
            words.append("×".join("all" if side == -1 else str(side) for side in self.block))
        if self.scale is not None and not dtypes.is_activation(self.scale):
            words.append(dtypes.dtype_name(self.scale))
        return " ".join(words)

    def plain(self) -> Any:
        """Returns the value that `as_format` reads back: a name, or a mapping of dtype, block and scale."""
        if self.name is not None:
            return self.name
        fields: dict[str, Any] = {"dtype": dtypes.dtype_name(self.values)}
        if self.block is not None:
            fields["block"] = list(self.block)
        if self.scale is not None:
            fields["scale"] = dtypes.dtype_name(self.scale)
        return fields if len(fields) > 1 else fields["dtype"]

    def completed(self, block: Block | None = None, scale: np.dtype | None = None) -> Format:
        """Returns the format with defaults for unspecified fields: `block`, or (128, 128); `scale`, or float32."""
        if not self.narrow or (self.block is not None and self.scale is not None):
            return self
        return dataclasses.replace(self, block=self.block or block or DEFAULT_BLOCK, scale=self.scale or scale or F32)

    def parts(self, shape: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], np.dtype], ...]:
        """Returns shape and dtype of each array that represents an array of `shape`: the values, then any scales."""
        if self.block is None or self.scale is None:
            return ((shape, self.values),)
        return (shape, self.values), (grid_shape(shape, self.block), self.scale)

    def represents_as(self, other: Format, shape: tuple[int, ...]) -> bool:
        """Returns whether both formats represent an array of `shape` by the same arrays, whatever their scale rules."""
        if (self.values, self.scale) != (other.values, other.scale):
            return False
        sides = [None if format.block is None else block_sides(format.block, shape) for format in (self, other)]
        return sides[0] == sides[1]

    def of_rows(self, values: np.dtype) -> Format:
        """Returns the format of activations of dtype `values` that are multiplied with a kernel of this format."""
        activations = self.activations
        if activations is None and self.block is not None and self.scale is not None:
            # The format of a stored pair has no activations, which the registered format with the same parts has.
            activations = stored_format(self.values, self.block, self.scale).activations
        return dataclasses.replace(activations or Format(values, ROW_BLOCK, F32), values=values)


FORMATS: dict[str, Format] = {}
"""The registered formats by name; see `register_format`."""


def register_format(name: str, format: Format) -> Format:
    """Registers `format` under `name`, for use in rules, and returns it.

    Raises:
      InvalidPolicy: for a name that is in use, for a format that is not narrow or has no block or scale, and for the
        values, block and scale of a format that is already registered.
    """
    if name in FORMATS or dtypes.is_dtype_name(name):
        raise InvalidPolicy(f"{name!r} is already the name of a format or dtype. Choose another name.")
    if not format.narrow or format.block is None or format.scale is None:
        raise InvalidPolicy(f"{name!r}: a named format needs narrow values, a block and the dtype of its scales.")
    same = [
        other
        for other, registered in FORMATS.items()
        if (registered.values, registered.block, registered.scale) == (format.values, format.block, format.scale)
    ]
    if same:
        raise InvalidPolicy(
            f"{name!r}: {same[0]!r} has the same values, block and scales, so that stored pairs of the two would look "
            "alike. Use that name."
        )
    FORMATS[name] = format
    return format


# OCP's MXFP8 with e4m3 values: one power of two for every 32 values of a row, in kernels and in activations.
register_format(
    "mxfp8",
    Format(E4M3, (1, 32), E8M0, shared_exponent_rule, activations=Format(E4M3, (1, 32), E8M0, shared_exponent_rule)),
)


def stored_format(values: np.dtype, block: Block, scale: np.dtype) -> Format:
    """Returns the format of a stored pair: the registered format with these fields, or else one without a name."""
    for format in FORMATS.values():
        if (format.values, format.block, format.scale) == (values, block, scale):
            return format
    return Format(values, block, scale)


def as_format(value: Any) -> Format:
    """Returns the format for a Format, a dtype, the name of either, or a mapping.

    The keys of a mapping are `dtype`, `block` and `scale`; the last two are optional.

    >>> as_format("bf16").values.name, as_format({"dtype": "f8_e4m3fn", "block": [64, 64]}).block
    ('bfloat16', (64, 64))

    Raises:
      UnknownDtype: for a name that is neither the name of a dtype nor of a format.
      InvalidPolicy: for other keys, and for a block or scale with a dtype that is not narrow.
    """
    if isinstance(value, Format):
        return value
    if isinstance(value, str) and value in FORMATS:
        return FORMATS[value]
    if not isinstance(value, Mapping):
        if isinstance(value, str) and not dtypes.is_dtype_name(value):
            near = difflib.get_close_matches(value, FORMATS, n=1, cutoff=0.7)
            if near:
                raise UnknownDtype(f"unknown format {value!r}. The nearest name is {near[0]!r}.")
        return Format(dtypes.as_dtype(value))
    if unknown := sorted(map(str, set(value) - {"dtype", "block", "scale"})):
        raise InvalidPolicy(
            f"a format has dtype, block and scale, found {unknown[0]!r}. Remove it, or if it is part of the path of a "
            "parameter, write the path as one key, such as dense/kernel."
        )
    if value.get("dtype") is None:
        raise InvalidPolicy("a format needs a dtype. Write {dtype: f8_e4m3fn, block: [128, 128], scale: bf16}.")
    if isinstance(value["dtype"], str) and value["dtype"] in FORMATS:
        raise InvalidPolicy(
            f"{value['dtype']!r} is the name of a format, which includes block and scale. Write only the name."
        )
    values = dtypes.as_dtype(value["dtype"])
    block = None if value.get("block") is None else as_block(value["block"])
    scale = None if value.get("scale") is None else dtypes.as_dtype(value["scale"])
    if not dtypes.is_narrow(values) and (block or scale):
        raise InvalidPolicy(
            f"{dtypes.dtype_name(values)} has neither block nor scale. Write only the dtype, or use a narrow dtype."
        )
    if scale is not None and not can_scale(scale):
        raise UnknownDtype(
            f"scales are f32, bf16, f16, f8_e8m0fnu or f8_e4m3fn, not {dtypes.dtype_name(scale)}. Write one of these."
        )
    return Format(values, block, scale)
