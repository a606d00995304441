"""Arrays in a narrow format: values and scales as one pytree, with quantisation and dequantisation.

All arithmetic of quantisation to nearest is in this file and in `scales`; kernels that cannot call it are tested
against it.

Invariants of `quantize`, for an array whose last two axes are divided into blocks, ragged at the edges:

- `scale_inv = rule(amax(block))`, rounded to the format's scale dtype before the division;
- `values = weight / scale_inv`, a correctly rounded quotient, cast to the values' dtype half to even and saturating;
- the largest value times its scale is finite in float32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from . import dtypes
from .blocks import DEFAULT_BLOCK, Block, as_block, block_amax, block_sides, check_grid, expand, grid_shape
from .errors import UnsupportedCast
from .explicit_axes import on_auto_axes
from .formats import ROW_BLOCK, Format, as_format, stored_format
from .scales import F32, can_scale, decode_scales, encode_scales
from .trainable import TrainableValues, straight_through

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "scale_inv", "proxy"], meta_fields=["format"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class ScaledArray:
    """An array in a narrow format: a pytree of its values and scales, with the format as static metadata.

    values     (*batch, rows, columns)                                format.values
    scale_inv  (*batch, ceil(rows/block[0]), ceil(columns/block[1]))  format.scale
    format     complete, with a block and a scale dtype
    proxy      (*batch, rows, columns)  f32, bf16 or f16; it receives the gradient of the weight, and is not read.
               None: the array is frozen.  See `perparam.training.value_and_grad`

    `TrainableValues` in place of the values are the values and a proxy.  Trees whose containers have fixed fields hold
    a ScaledArray in place of the kernel.  `values, scale_inv = array` unpacks it.

    >>> scaled = quantize(jnp.ones((2, 4)), "int8", (1, 4))
    >>> scaled.shape, scaled.scale_inv.shape, scaled.dequantize().dtype.name
    ((2, 4), (2, 1), 'float32')
    """

    values: jax.Array
    scale_inv: jax.Array
    format: Format
    proxy: jax.Array | None = None

    def __post_init__(self) -> None:
        if isinstance(self.values, TrainableValues):
            object.__setattr__(self, "proxy", self.values.proxy)
            object.__setattr__(self, "values", self.values.values)

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

    def frozen(self) -> ScaledArray:
        """Returns the array without its proxy."""
        return self if self.proxy is None else dataclasses.replace(self, proxy=None)

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """Returns the weight: `values * scale_inv` in float32, then cast to `dtype`, saturating.

        Raises:
          InvalidScale: if the shape of the scales does not fit the shape of the values in the format's block.
        """
        check_grid(self.shape, self.scale_inv.shape, self._block)
        wide = functools.partial(_dequantize, format=self.format, dtype=dtypes.as_dtype(dtype))
        result: jax.Array = on_auto_axes(wide, self.values, self.scale_inv)
        return result if self.proxy is None else straight_through(result, self.proxy)


def scaled_array(
    values: ArrayLike | TrainableValues, scale_inv: ArrayLike, block: Block = DEFAULT_BLOCK
) -> ScaledArray:
    """Returns the ScaledArray of values and scales that are stored as two arrays.

    Raises:
      InvalidScale: if the shape of the scales does not fit the shape of the values in this block.
    """
    values = values if isinstance(values, TrainableValues) else jnp.asarray(values)
    scale_inv, block = jnp.asarray(scale_inv), as_block(block)
    check_grid(values.shape, scale_inv.shape, block)
    return ScaledArray(values, scale_inv, stored_format(values.dtype, block, scale_inv.dtype))  # type: ignore[arg-type]


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
    result: ScaledArray = on_auto_axes(functools.partial(_quantize, format=format), weight, given)
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
            f"scale_inv: found {dtypes.dtype_name(scales.dtype)}, expected {dtypes.dtype_name(format.scale)}, the "
            f"dtype of scales of the format {format}. Cast the scales, or name their dtype in the format."
        )
    return scales


@functools.partial(jax.jit, static_argnames=("format",))
def _quantize(weight: jax.Array, scale_inv: jax.Array | None, *, format: Format) -> ScaledArray:
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
    kernel: ArrayLike | ScaledArray | TrainableValues,
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


@functools.partial(jax.jit, static_argnames=("format", "dtype"))
def _dequantize(values: jax.Array, scale_inv: jax.Array, *, format: Format, dtype: np.dtype) -> jax.Array:
    assert format.block is not None
    weight = values.astype(jnp.float32) * expand(decode_scales(scale_inv), values.shape, format.block)
    return dtypes.saturating_cast(weight, dtype)
