"""Formats: how an array is represented, and the arithmetic that takes weights into a format and back.

A narrow format holds, for every block of an array, values in a narrow dtype and one scale; the weight is
`values * scale_inv` in float32 (the published name notwithstanding, the scale is a multiplier).  All quantiser
arithmetic of perparam is in this file and `scales`; kernels that cannot call it are tested against it.

Invariants of `quantize`, for an array whose last two axes are divided into blocks, ragged at the edges:

- `scale_inv = rule(amax(block))`, rounded to the format's scale dtype before anything is divided by it;
- `values = weight / scale_inv`, the quotient correctly rounded, then rounded half to even, saturating;
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
"""The block in which activations are quantised where a format names none: a row, 128 columns (DeepSeek-V3)."""


@dataclasses.dataclass(frozen=True)
class Format:
    """How an array is represented.

    values       dtype of its values
    block        (rows, columns) over which one scale holds, -1 for a whole axis; None for a dtype that is not narrow.
                 In a rule None leaves it open: the policy's block, or the one that an array already has
    scale        dtype of the scales; None as for `block`
    rule         how scales are made
    activations  the format in which activations meet a kernel of this format when both are narrow (W8A8);
                 None: float32 scales for each row and 128 columns

    A plain dtype is a format without scales.  What an array of a format consists of is said by `parts` alone: a format
    with a further sibling, or with several values in a byte, changes that method and `quantize`.

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
            raise UnknownDtype(f"{self.values!r} is no np.dtype. Use as_format, which reads names, types and mappings.")
        if self.block is not None:
            object.__setattr__(self, "block", as_block(self.block))
        if self.values.kind == "i" and self.scale == E4M3:
            raise InvalidPolicy(
                f"scales in f8_e4m3fn begin at 2**-6, too coarse for {dtypes.dtype_name(self.values)}. "
                "Write f32, bf16 or f16."
            )

    @property
    def narrow(self) -> bool:
        """Whether the values need scales."""
        return dtypes.is_narrow(self.values)

    @property
    def name(self) -> str | None:
        """The name it is registered under."""
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
        """The format as constructors, `repr` and YAML write it: a name, or a mapping of dtype, block and scale."""
        if self.name is not None:
            return self.name
        written: dict[str, Any] = {"dtype": dtypes.dtype_name(self.values)}
        if self.block is not None:
            written["block"] = list(self.block)
        if self.scale is not None:
            written["scale"] = dtypes.dtype_name(self.scale)
        return written if len(written) > 1 else written["dtype"]

    def completed(self, block: Block | None = None, scale: np.dtype | None = None) -> Format:
        """The format with what it leaves open filled in: `block`, else (128, 128); `scale`, else float32."""
        if not self.narrow or (self.block is not None and self.scale is not None):
            return self
        return dataclasses.replace(self, block=self.block or block or DEFAULT_BLOCK, scale=self.scale or scale or F32)

    def parts(self, shape: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], np.dtype], ...]:
        """Shape and dtype of the arrays that an array of `shape` consists of: its values, then its scales if any."""
        if self.block is None or self.scale is None:
            return ((shape, self.values),)
        return (shape, self.values), (grid_shape(shape, self.block), self.scale)

    def represents_as(self, other: Format, shape: tuple[int, ...]) -> bool:
        """Whether an array of `shape` has the same parts with the same meaning in both, however scales are made."""
        if (self.values, self.scale) != (other.values, other.scale):
            return False
        sides = [None if each.block is None else block_sides(each.block, shape) for each in (self, other)]
        return sides[0] == sides[1]

    def of_rows(self, values: np.dtype) -> Format:
        """The format in which activations of dtype `values` meet a kernel of this format."""
        activations = self.activations
        if activations is None and self.block is not None and self.scale is not None:
            activations = stored_format(self.values, self.block, self.scale).activations  # a pair knows its parts alone
        return dataclasses.replace(activations or Format(values, ROW_BLOCK, F32), values=values)


FORMATS: dict[str, Format] = {}
"""The named formats.  `register_format` adds one."""


def register_format(name: str, format: Format) -> Format:
    """`format`, which rules may call `name` from now on.

    Raises:
      InvalidPolicy: for a name that is taken, and for a narrow format without block or scale.
    """
    if name in FORMATS or dtypes.is_dtype_name(name):
        raise InvalidPolicy(f"{name!r} is the name of a format or dtype already. Choose another one.")
    if not format.narrow or format.block is None or format.scale is None:
        raise InvalidPolicy(f"{name!r}: a named format needs narrow values, a block and the dtype of its scales.")
    same = [
        other
        for other, each in FORMATS.items()
        if (each.values, each.block, each.scale) == (format.values, format.block, format.scale)
    ]
    if same:
        raise InvalidPolicy(
            f"{name!r}: {same[0]!r} has the same values, block and scales: pairs of the two look alike. Use that name."
        )
    FORMATS[name] = format
    return format


MXFP8 = register_format(
    "mxfp8",
    Format(E4M3, (1, 32), E8M0, shared_exponent_rule, activations=Format(E4M3, (1, 32), E8M0, shared_exponent_rule)),
)
"""OCP's MXFP8 with e4m3 values: a power of two for every 32 values of a row, of kernels and of activations."""


def stored_format(values: np.dtype, block: Block, scale: np.dtype) -> Format:
    """The format of a stored pair: the registered one with these parts, or else one of no name."""
    for format in FORMATS.values():
        if (format.values, format.block, format.scale) == (values, block, scale):
            return format
    return Format(values, block, scale)


def as_format(value: Any) -> Format:
    """The format that `value` writes: a Format, a dtype, the name of either, or a mapping.

    The keys of a mapping are `dtype`, `block` and `scale`; what it leaves out stays open.

    >>> as_format("bf16").values.name, as_format({"dtype": "f8_e4m3fn", "block": [64, 64]}).block
    ('bfloat16', (64, 64))

    Raises:
      UnknownDtype: for a name that is neither a dtype's nor a format's.
      InvalidPolicy: for other keys, and for a block or scales of a dtype that needs none.
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
        raise InvalidPolicy(f"a format has dtype, block and scale, found {unknown[0]!r}. Remove it.")
    if value.get("dtype") is None:
        raise InvalidPolicy("a format needs a dtype: {dtype: f8_e4m3fn, block: [128, 128], scale: bf16}.")
    if isinstance(value["dtype"], str) and value["dtype"] in FORMATS:
        raise InvalidPolicy(f"{value['dtype']!r} names a whole format. Write the name alone, without block and scale.")
    values = dtypes.as_dtype(value["dtype"])
    block = None if value.get("block") is None else as_block(value["block"])
    scale = None if value.get("scale") is None else dtypes.as_dtype(value["scale"])
    if not dtypes.is_narrow(values) and (block or scale):
        raise InvalidPolicy(
            f"{dtypes.dtype_name(values)} needs neither block nor scale. Write the dtype alone, or a narrow one."
        )
    if scale is not None and not can_scale(scale):
        raise UnknownDtype(
            f"scales are f32, bf16, f16, f8_e8m0fnu or f8_e4m3fn, not {dtypes.dtype_name(scale)}. Write one of these."
        )
    return Format(values, block, scale)


# Arrays in a format.


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scale_inv"], meta_fields=["format"])
@dataclasses.dataclass(frozen=True, eq=False)
class ScaledArray:
    """An array in a narrow format: a pytree of its values and scales, the format static.

    values     (*batch, rows, columns)  format.values
    scale_inv  (*batch, ceil(rows/block[0]), ceil(columns/block[1]))  format.scale
    format     complete: with a block and a scale dtype

    It stands in the place of a leaf in trees whose containers have no room for a sibling.  `values, scale_inv = array`
    takes it apart.

    >>> scaled = quantize(jnp.ones((2, 4)), "int8", (1, 4))
    >>> scaled.shape, scaled.scale_inv.shape, scaled.dequantize().dtype.name
    ((2, 4), (2, 1), 'float32')
    """

    values: jax.Array
    scale_inv: jax.Array
    format: Format

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that it represents."""
        return tuple(self.values.shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the values."""
        return self.format.values

    @property
    def block(self) -> Block:
        """The block in numbers, -1 resolved."""
        assert self.format.block is not None
        return block_sides(self.format.block, self.shape)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def __iter__(self) -> Iterator[jax.Array]:
        return iter((self.values, self.scale_inv))

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """`values * scale_inv` in float32, then cast to `dtype`, saturating."""
        result: jax.Array = _dequantize(self, dtypes.as_dtype(dtype))
        return result


def scaled_array(values: ArrayLike, scale_inv: ArrayLike, block: Block = DEFAULT_BLOCK) -> ScaledArray:
    """The ScaledArray of a stored pair.

    Raises:
      InvalidScale: where the grid of scales does not fit.
    """
    values, scale_inv, block = jnp.asarray(values), jnp.asarray(scale_inv), as_block(block)
    check_grid(values.shape, scale_inv.shape, block)
    return ScaledArray(values, scale_inv, stored_format(values.dtype, block, scale_inv.dtype))


def quantize(
    weight: ArrayLike, dtype: Any, block: Block | None = None, *, scale_dtype: DTypeLike | None = None
) -> ScaledArray:
    """`weight` in a narrow format: `(values, scale_inv)`, whose product, block by block, is nearest to it.

    weight       (..., rows, columns)  floating point
    dtype        one of the float8 types or int8, a format's name, or a Format
    block        (rows, columns) over which one scale holds, -1 for a whole axis; by default the format's, or (128, 128)
    scale_dtype  f32, bf16, f16, f8_e8m0fnu or f8_e4m3fn; by default the format's, or f32

    The elementwise error of e4m3fn under the amax rule is at most `max(|w| * 2**-4, scale_inv * 2**-10)`.

    >>> kernel, scale_inv = quantize(jnp.array([[448.0, 1.0], [0.0, -896.0]]), "f8_e4m3fn", (1, 2))
    >>> kernel.astype("float32").tolist(), scale_inv.tolist()
    ([[448.0, 1.0], [0.0, -448.0]], [[1.0], [2.0]])

    Raises:
      UnsupportedCast: where `weight` is not floating point or `dtype` is not narrow.
      InvalidScale: where `weight` has fewer than two dimensions.
    """
    format = as_format(dtype)
    if not format.narrow:
        raise UnsupportedCast(
            f"{dtypes.dtype_name(format.values)} needs no scales. Narrow types are f8_e4m3fn, f8_e5m2, …, int8."
        )
    scale = None if scale_dtype is None else dtypes.as_dtype(scale_dtype)
    if scale is not None and not can_scale(scale):
        raise UnsupportedCast(
            f"scales are f32, bf16 or f16 (or f8_e8m0fnu, f8_e4m3fn), not {dtypes.dtype_name(scale)}."
        )
    if block is not None or scale is not None:
        format = dataclasses.replace(
            format, block=format.block if block is None else as_block(block), scale=scale or format.scale
        )
    format = format.completed()
    weight = jnp.asarray(weight)
    if not dtypes.is_floating(weight.dtype) or dtypes.is_narrow(weight.dtype):
        raise UnsupportedCast(f"a {weight.dtype} array cannot be quantised. Give f32, bf16 or f16 weights.")
    assert format.block is not None
    grid_shape(weight.shape, format.block)
    result: ScaledArray = _quantize(dtypes.saturating_cast(weight, F32), format)
    return result


@functools.partial(jax.jit, static_argnames=("format",))
def _quantize(weight: jax.Array, format: Format) -> ScaledArray:
    assert format.block is not None
    assert format.scale is not None
    scales = format.rule(block_amax(weight, format.block), format.values, format.scale, True)
    divisors = jax.lax.optimization_barrier(expand(scales, weight.shape, format.block))
    values = dtypes.saturating_cast(weight / divisors, format.values)
    return ScaledArray(values, encode_scales(scales, format.scale), format)


def quantize_rows(x: Float[Array, "*b columns"], dtype: Any) -> ScaledArray:
    """Activations as they come in a narrow format whose blocks lie within rows; each row by itself.

    x      (..., columns)  f32, bf16 or f16
    dtype  a narrow dtype, which means float32 scales for 128 columns, or a Format whose block is (1, columns)

    On a CPU the same bits as `quantize`; elsewhere `quantize_in_one_pass`.
    """
    format = as_format(dtype)
    if format.block is None:
        format = Format(format.values, ROW_BLOCK, F32)

    def exactly(x: jax.Array) -> ScaledArray:
        flat = quantize(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), format)
        grid = (*x.shape[:-1], flat.scale_inv.shape[-1])
        return ScaledArray(flat.values.reshape(x.shape), flat.scale_inv.reshape(grid), format)

    one_pass = functools.partial(quantize_in_one_pass, format=format)
    result: ScaledArray = jax.lax.platform_dependent(x, cpu=exactly, default=one_pass)
    return result


def quantize_in_one_pass(x: Float[Array, "*b columns"], format: Format) -> ScaledArray:
    """`quantize_rows` without barriers to fusion: one reduction and what follows it.

    On a CPU a quotient may be an ulp of float32 off, and so a value that is nearly a tie may round the other way.
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
    """The weight of a scaled pair: `kernel * scale_inv` in float32, then cast to `dtype`, saturating.

    kernel     (..., rows, columns), or a ScaledArray, which knows its scales and block
    scale_inv  (..., ceil(rows/block[0]), ceil(columns/block[1]))

    >>> dequantize(jnp.ones((1, 3), "float8_e4m3fn"), jnp.array([[2.0, 3.0]]), (1, 2)).tolist()
    [[2.0, 2.0, 3.0]]

    Raises:
      InvalidScale: where the grid of scales does not fit.
      UnsupportedCast: for a kernel without scales.
    """
    if isinstance(kernel, ScaledArray):
        if scale_inv is not None or as_block(block) not in (DEFAULT_BLOCK, kernel.format.block):
            raise UnsupportedCast("a ScaledArray knows its scales and its block. Give it alone.")
        return kernel.dequantize(dtype)
    if scale_inv is None:
        raise UnsupportedCast("a kernel is dequantised with its scales. Give scale_inv, or a ScaledArray.")
    return scaled_array(kernel, scale_inv, block).dequantize(dtype)


@functools.partial(jax.jit, static_argnames=("dtype",))
def _dequantize(array: ScaledArray, dtype: np.dtype) -> jax.Array:
    weight = array.values.astype(jnp.float32) * expand(decode_scales(array.scale_inv), array.shape, array.block)
    return dtypes.saturating_cast(weight, dtype)
