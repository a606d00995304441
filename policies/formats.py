"""Formats: the representation of an array as values and scales, with quantisation and dequantisation.

An array in a narrow format has values in a narrow dtype, and one scale for each block; the weight is
`values * scale_inv` in float32.  Despite the name `scale_inv`, which published checkpoints use, the scale is a
multiplier.  All quantisation arithmetic of perparam is in this file and in `scales`; kernels that cannot call it are
tested against it.

Invariants of `quantize`, for an array whose last two axes are divided into blocks, ragged at the edges:

- `scale_inv = rule(amax(block))`, rounded to the format's scale dtype before the division;
- `values = weight / scale_inv`, a correctly rounded quotient, cast to the values' dtype half to even and saturating;
- the largest value times its scale is finite in float32.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from . import dtypes
from .blocks import DEFAULT_BLOCK, Block, as_block, block_amax, block_sides, check_grid, expand, grid_shape
from .errors import InvalidPolicy, UnknownDtype, UnsupportedCast
from .scales import E4M3, E8M0, F32, ScaleRule, amax_rule, can_scale, decode_scales, encode_scales, shared_exponent_rule

if TYPE_CHECKING:
    from jaxtyping import Array, Float

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


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scale_inv"], meta_fields=["format"])
@dataclasses.dataclass(frozen=True, eq=False)
class ScaledArray:
    """An array in a narrow format: a pytree of its values and scales, with the format as static metadata.

    values     (*batch, rows, columns)                                format.values
    scale_inv  (*batch, ceil(rows/block[0]), ceil(columns/block[1]))  format.scale
    format     complete, with a block and a scale dtype

    Trees whose containers have fixed fields hold a ScaledArray in place of the kernel.  `values, scale_inv = array`
    unpacks it.

    >>> scaled = quantize(jnp.ones((2, 4)), "int8", (1, 4))
    >>> scaled.shape, scaled.scale_inv.shape, scaled.dequantize().dtype.name
    ((2, 4), (2, 1), 'float32')
    """

    values: jax.Array
    scale_inv: jax.Array
    format: Format

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the represented array, which is the shape of the values."""
        return tuple(self.values.shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the values."""
        return self.format.values

    @property
    def block(self) -> Block:
        """(rows, columns) that share one scale, with -1 replaced by the length of the axis."""
        return block_sides(self._block, self.shape)

    @property
    def _block(self) -> Block:
        """The block of the format.

        Raises:
          UnsupportedCast: for a format without one.
        """
        if self.format.block is None:
            raise UnsupportedCast(
                f"the format {self.format} of a ScaledArray has no block. Make it with perparam.quantize, or write "
                "Format(values, block, scale)."
            )
        return self.format.block

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def __iter__(self) -> Iterator[jax.Array]:
        return iter((self.values, self.scale_inv))

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """Returns the weight: `values * scale_inv` in float32, then cast to `dtype`, saturating.

        Raises:
          InvalidScale: if the shape of the scales does not fit the shape of the values in the format's block.
        """
        check_grid(self.shape, self.scale_inv.shape, self._block)
        result: jax.Array = _dequantize(self, dtypes.as_dtype(dtype))
        return result


def scaled_array(values: ArrayLike, scale_inv: ArrayLike, block: Block = DEFAULT_BLOCK) -> ScaledArray:
    """Returns the ScaledArray of values and scales that are stored as two arrays.

    Raises:
      InvalidScale: if the shape of the scales does not fit the shape of the values in this block.
    """
    values, scale_inv, block = jnp.asarray(values), jnp.asarray(scale_inv), as_block(block)
    check_grid(values.shape, scale_inv.shape, block)
    return ScaledArray(values, scale_inv, stored_format(values.dtype, block, scale_inv.dtype))


def quantize(
    weight: ArrayLike,
    dtype: Any,
    block: Block | None = None,
    *,
    scale_dtype: DTypeLike | None = None,
    scale_inv: ArrayLike | None = None,
) -> ScaledArray:
    """Returns `weight` quantised to a narrow format: a ScaledArray, which unpacks to `(values, scale_inv)`.

    weight       (..., rows, columns)  floating point
    dtype        a float8 type or int8, the name of a format, or a Format
    block        (rows, columns) that share one scale, -1 for a whole axis; by default the format's, or (128, 128)
    scale_dtype  f32, bf16, f16, f8_e8m0fnu or f8_e4m3fn; by default the format's, or f32
    scale_inv    (..., ceil(rows/block[0]), ceil(columns/block[1]))  scales to use, as for delayed scaling: values
                 beyond the largest are clipped; by default those of the format's rule

    The elementwise error of e4m3fn under the amax rule is at most `max(|w| * 2**-4, scale_inv * 2**-10)`.  Quotients
    are computed in float32: a float64 weight beyond the largest float32, 3.4e38, is clipped to it first.

    >>> kernel, scale_inv = quantize(jnp.array([[448.0, 1.0], [0.0, -896.0]]), "f8_e4m3fn", (1, 2))
    >>> kernel.astype("float32").tolist(), scale_inv.tolist()
    ([[448.0, 1.0], [0.0, -448.0]], [[1.0], [2.0]])

    Raises:
      UnsupportedCast: if `weight` is not floating point, `dtype` is not narrow, or `scale_inv` has another dtype.
      InvalidScale: if `weight` has fewer than two dimensions, or the shape of `scale_inv` does not fit it.
    """
    weight, format = as_operands(weight, dtype, block, scale_dtype)
    given = None if scale_inv is None else as_scales(scale_inv, weight.shape, format)
    result: ScaledArray = _quantize(weight, format, given)
    return result


def as_operands(
    weight: ArrayLike, dtype: Any, block: Block | None = None, scale_dtype: DTypeLike | None = None
) -> tuple[jax.Array, Format]:
    """Returns the arguments of `quantize` as a float32 array and a complete format, with the errors of `quantize`."""
    format = as_format(dtype)
    if not format.narrow:
        raise UnsupportedCast(
            f"{dtypes.dtype_name(format.values)} is not a narrow dtype. Write f8_e4m3fn, f8_e5m2, …, or int8."
        )
    scale = None if scale_dtype is None else dtypes.as_dtype(scale_dtype)
    if scale is not None and not can_scale(scale):
        raise UnsupportedCast(
            f"scales are f32, bf16, f16, f8_e8m0fnu or f8_e4m3fn, not {dtypes.dtype_name(scale)}. Write one of these."
        )
    if block is not None or scale is not None:
        format = dataclasses.replace(
            format, block=format.block if block is None else as_block(block), scale=scale or format.scale
        )
    format = format.completed()
    weight = dtypes.as_array(weight)
    if not dtypes.is_floating(weight.dtype) or dtypes.is_narrow(weight.dtype):
        raise UnsupportedCast(f"an array of {weight.dtype} cannot be quantised. Pass f32, bf16 or f16 weights.")
    assert format.block is not None
    grid_shape(weight.shape, format.block)
    return dtypes.saturating_cast(weight, F32), format


def as_scales(scale_inv: ArrayLike, shape: tuple[int, ...], format: Format) -> jax.Array:
    """Returns given scales of an array of `shape` as an array, after checking their dtype and shape."""
    scales = jnp.asarray(scale_inv)
    assert format.block is not None
    assert format.scale is not None
    check_grid(shape, scales.shape, format.block)
    if scales.dtype != format.scale:
        raise UnsupportedCast(
            f"scale_inv: found {dtypes.dtype_name(scales.dtype)}, expected {dtypes.dtype_name(format.scale)}, the dtype "
            f"of scales of the format {format}. Cast the scales, or name their dtype in the format."
        )
    return scales


@functools.partial(jax.jit, static_argnames=("format",))
def _quantize(weight: jax.Array, format: Format, scale_inv: jax.Array | None = None) -> ScaledArray:
    scales = fresh_scales(weight, format, exact=True) if scale_inv is None else decode_scales(scale_inv)
    assert format.block is not None
    assert format.scale is not None
    divisors = jax.lax.optimization_barrier(expand(scales, weight.shape, format.block))
    values = dtypes.saturating_cast(weight / divisors, format.values)
    return ScaledArray(values, encode_scales(scales, format.scale) if scale_inv is None else scale_inv, format)


def fresh_scales(weight: jax.Array, format: Format, exact: bool) -> jax.Array:
    """Returns the float32 scales of a float32 array by the rule of a complete format; `exact` as for a `ScaleRule`."""
    assert format.block is not None
    assert format.scale is not None
    return format.rule(block_amax(weight, format.block), format.values, format.scale, exact)


def quantize_rows(x: Float[Array, "*b columns"], dtype: Any) -> ScaledArray:
    """Returns activations quantised row by row: a ScaledArray whose blocks are within rows.

    x      (..., columns)  f32, bf16 or f16
    dtype  a narrow dtype, for a float32 scale per row and 128 columns, or a Format whose block is (1, columns)

    On CPUs the result has the same bits as that of `quantize`; on other platforms this is `quantize_in_one_pass`.
    """
    format = as_format(dtype).completed(ROW_BLOCK)

    def exactly(x: jax.Array) -> ScaledArray:
        flat = quantize(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), format)
        grid = (*x.shape[:-1], flat.scale_inv.shape[-1])
        return ScaledArray(flat.values.reshape(x.shape), flat.scale_inv.reshape(grid), format)

    one_pass = functools.partial(quantize_in_one_pass, format=format)
    result: ScaledArray = jax.lax.platform_dependent(x, cpu=exactly, default=one_pass)
    return result


def quantize_in_one_pass(x: Float[Array, "*b columns"], format: Format) -> ScaledArray:
    """Returns the result of `quantize_rows`, computed without barriers to fusion, so that XLA reads x once.

    On CPUs a quotient may be off by an ulp of float32, so that a value close to a tie may round the other way.
    """
    assert format.block is not None
    assert format.scale is not None
    columns = x.shape[-1]
    side = block_sides(format.block, (1, columns))[1]
    wide = jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(0, -columns % side)])
    blocks = wide.reshape(*x.shape[:-1], wide.shape[-1] // side, side)
    scales = format.rule(jnp.max(jnp.abs(blocks), axis=-1), format.values, format.scale, False)
    values = dtypes.saturating_cast(blocks / scales[..., None], format.values)
    return ScaledArray(values.reshape(wide.shape)[..., :columns], encode_scales(scales, format.scale), format)


def dequantize(
    kernel: ArrayLike | ScaledArray,
    scale_inv: ArrayLike | None = None,
    block: Block = DEFAULT_BLOCK,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Returns the weight of a kernel and its scales: `kernel * scale_inv` in float32, then cast to `dtype`, saturating.

    kernel     (..., rows, columns)  a narrow dtype; or a ScaledArray, which includes scales and block
    scale_inv  (..., ceil(rows/block[0]), ceil(columns/block[1]))

    >>> dequantize(jnp.ones((1, 3), "float8_e4m3fn"), jnp.array([[2.0, 3.0]]), (1, 2)).tolist()
    [[2.0, 2.0, 3.0]]

    Raises:
      InvalidScale: if the shape of the scales does not fit the kernel.
      UnsupportedCast: for a kernel without scales, and for a ScaledArray with other scales or another block.
    """
    if isinstance(kernel, ScaledArray):
        if scale_inv is not None or as_block(block) not in (DEFAULT_BLOCK, kernel.format.block):
            raise UnsupportedCast("a ScaledArray includes its scales and its block. Pass neither beside it.")
        return kernel.dequantize(dtype)
    if scale_inv is None:
        raise UnsupportedCast("a kernel cannot be dequantised without scales. Pass scale_inv, or a ScaledArray.")
    return scaled_array(kernel, scale_inv, block).dequantize(dtype)


@functools.partial(jax.jit, static_argnames=("dtype",))
def _dequantize(array: ScaledArray, dtype: np.dtype) -> jax.Array:
    weight = array.values.astype(jnp.float32) * expand(decode_scales(array.scale_inv), array.shape, array.block)
    return dtypes.saturating_cast(weight, dtype)
