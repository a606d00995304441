"""State formats: 8-bit representations of an optimizer's state, in blocks of the flattened array.

A state array in one of these formats has an 8-bit code for each value, in the shape of the array, and one float32 scale
for each 256 consecutive values of the flattened array.  The value is `decoded(code) * scale`.

- `dynamic8`: the dynamic tree code of Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2022), which
  bitsandbytes uses: the number of leading zeros of a code is a power of ten, the other bits are a linear fraction.
  The code is unsigned for fields that cannot be negative, such as `nu`.
- `f8_e4m3fn`: float8 values, as torchao's `OptimStateFp8` has them.
- `int8`: linear codes, for fields that no optimizer divides by.

Linear codes are refused for second moments: values below 1/254 of the largest one of a block become zero, and an update
divided by the square root of zero is as large as the optimizer's epsilon permits.  In the other two formats a positive
value of a second moment never becomes zero: it is rounded up to the smallest code.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import dtypes
from ..blocks import Block, block_amax, expand, grid_shape
from ..errors import UnknownDtype
from ..explicit_axes import on_auto_axes
from ..formats import Format, as_format
from ..scales import E4M3, F32, amax_rule

BLOCK = 256
"""Consecutive values of the flattened array that share one scale, as in bitsandbytes and torchao."""

MIN_SIZE = 4096
"""The fewest values of an array that a rule for a whole field stores in 8 bits, as in bitsandbytes and torchao."""

SECOND_MOMENTS = frozenset({"nu", "nu_max", "v", "v_row", "v_col", "n", "sum_of_squares", "e_g", "e_x", "exp_avg_sq"})
"""Fields of optax's states with averages or sums of squares, by whose square root updates are divided."""

LINEAR_SECOND_MOMENT = (
    "int8 has linear codes, in which the small values of a second moment become zero, so that the update divided by "
    "their square root explodes. Write dynamic8 or f8_e4m3fn."
)

_FLAT: Block = (1, BLOCK)


@dataclasses.dataclass(frozen=True)
class StateFormat(Format):
    """An 8-bit format of optimizer state, with one float32 scale for 256 consecutive values of the flattened array.

    dynamic  whether the codes are those of the dynamic tree code; otherwise values are those of a narrow dtype

    >>> str(as_state_format("dynamic8")), as_state_format("dynamic8").parts((8, 100))
    ('dynamic8', (((8, 100), dtype('uint8')), ((4,), dtype('float32'))))
    """

    dynamic: bool = False

    @property
    def name(self) -> str:
        """The name in rules: `dynamic8`, `f8_e4m3fn` or `int8`."""
        return "dynamic8" if self.dynamic else dtypes.dtype_name(self.values)

    def __str__(self) -> str:
        return self.name

    def parts(self, shape: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], np.dtype], ...]:
        """Returns shape and dtype of the codes, and of the scales, of an array of `shape`."""
        return (shape, self.values), ((-(-math.prod(shape) // BLOCK),), F32)


STATE_FORMATS = {
    format.name: format
    for format in (
        StateFormat(np.dtype(np.uint8), _FLAT, F32, dynamic=True),
        StateFormat(E4M3, _FLAT, F32),
        StateFormat(np.dtype(np.int8), _FLAT, F32),
    )
}
"""The 8-bit formats of an optimizer's state by name."""


def as_state_format(value: Any) -> Format:
    """Returns the format of state for the value of a rule: a `StateFormat` by name or 8-bit dtype, or a wide format.

    >>> str(as_state_format("F8_E4M3")), str(as_state_format("bf16"))
    ('f8_e4m3fn', 'bf16')

    Raises:
      UnknownDtype, InvalidPolicy: see `as_format`; for a block, for a scale and for another narrow format.
    """
    if isinstance(value, str) and value in STATE_FORMATS:
        return STATE_FORMATS[value]
    if isinstance(value, StateFormat):
        return value
    format = as_format(value)
    if not format.narrow:
        return format
    state_format = STATE_FORMATS.get(dtypes.dtype_name(format.values))
    if state_format is None or format.block is not None or format.scale is not None:
        raise UnknownDtype(
            f"state is stored in 8 bits as {', '.join(STATE_FORMATS)}, in blocks of {BLOCK} consecutive values with "
            f"float32 scales, found {format.plain()}. Write one of these names."
        )
    return state_format


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "scales"], meta_fields=["format", "unsigned"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class StateArray:
    """An array of an optimizer's state in an 8-bit format: a pytree of codes and scales.

    codes     (...)               format.values, in the shape of the represented array
    scales    (ceil(size / 256),)  float32
    format    how codes represent values
    unsigned  whether no value is negative

    >>> state = encode_state(jnp.linspace(-1, 1, 512), STATE_FORMATS["dynamic8"])
    >>> state.codes.shape, state.scales.shape, round(float(abs(state.decode() - jnp.linspace(-1, 1, 512)).max()), 4)
    ((512,), (2,), 0.007)
    """

    codes: jax.Array
    scales: jax.Array
    format: StateFormat
    unsigned: bool

    def decode(self) -> jax.Array:
        """Returns the values in float32."""
        decode = functools.partial(_decode, format=self.format, unsigned=self.unsigned)
        values: jax.Array = on_auto_axes(decode, self.codes, self.scales)
        return values


def encode_state(values: jax.Array, format: StateFormat, *, unsigned: bool = False) -> StateArray:
    """Returns `values` in an 8-bit format, each rounded to the nearest code; the result decodes to float32.

    values    (...)  floating point
    unsigned  whether no value is negative: then a positive value is at least the smallest code, never zero

    A block with NaN or infinity decodes to NaN, so that it stays visible.
    """
    result: StateArray = on_auto_axes(functools.partial(_encode, format=format, unsigned=unsigned), values)
    return result


@functools.partial(jax.jit, static_argnames=("format", "unsigned"))
def _encode(values: jax.Array, *, format: StateFormat, unsigned: bool) -> StateArray:
    flat = _rows(values.astype(jnp.float32))
    amax = block_amax(flat, _FLAT)
    # A scale of zero would make the quotients NaN, and CPUs flush subnormal ones to zero.
    least = dtypes.smallest_normal(F32)
    scales = jnp.maximum(amax, least) if format.dynamic else amax_rule(amax, format.values, F32, True)
    scales = jnp.where(jnp.isfinite(scales), scales, jnp.nan)
    quotients = flat / expand(scales, flat.shape, _FLAT)
    codes = _dynamic_codes(quotients, unsigned) if format.dynamic else dtypes.saturating_cast(quotients, format.values)
    if unsigned:
        code = jnp.asarray(_smallest_code(format), format.values)
        codes = jnp.where((flat > 0) & (quotients < _midpoint(format)), code, codes)
    return StateArray(codes.reshape(values.shape), scales.reshape(-1), format, unsigned)


@functools.partial(jax.jit, static_argnames=("format", "unsigned"))
def _decode(codes: jax.Array, scales: jax.Array, *, format: StateFormat, unsigned: bool) -> jax.Array:
    flat = _rows(codes)
    table = _table(unsigned)
    values = jnp.asarray(table)[flat.astype(jnp.int32)] if format.dynamic else flat.astype(jnp.float32)
    scales = scales.reshape(grid_shape(flat.shape, _FLAT))
    return (values * expand(scales, flat.shape, _FLAT)).reshape(codes.shape)


def _rows(array: jax.Array) -> jax.Array:
    """Returns an array with axes of rows, whose blocks along the last axis are those of the flattened array.

    It is flattened only where a row does not end with a block: XLA would gather an array that is divided over devices.
    """
    return array if array.ndim > 1 and array.shape[-1] % BLOCK == 0 else array.reshape(1, -1)


def _dynamic_codes(quotients: jax.Array, unsigned: bool) -> jax.Array:
    """Returns the index of the nearest value of the table; the lower one in the middle between two.

    A search has a loop over the values for each of its 8 steps.  Here the index is computed from the interval in which
    a quotient is, which is off by at most one, since the nearest value may be that of the next interval.
    """
    size = jnp.abs(quotients)
    smaller = [size < jnp.float32(10.0**-zeros) for zeros in range(1, 7)]
    count = functools.reduce(lambda x, less: jnp.where(less, x / 2, x), smaller, jnp.float32(128 if unsigned else 64))
    power = functools.reduce(lambda x, less: jnp.where(less, x * 10, x), smaller, jnp.float32(1))
    interval = jnp.clip(jnp.floor((size * power - 0.1) / 0.9 * count), 0, count - 1)
    index = (count + interval).astype(jnp.int32)
    index = index - 1 if unsigned else 127 + jnp.where(quotients < 0, -index, index)
    table = _table(unsigned).astype(np.float64)
    between = np.concatenate([[-np.inf], (table[1:] + table[:-1]) / 2, [np.inf]]).astype(np.float32)
    above, below = quotients > jnp.asarray(between)[index + 1], quotients <= jnp.asarray(between)[index]
    return (index + above.astype(jnp.int32) - below.astype(jnp.int32)).astype(jnp.uint8)


@functools.cache
def _table(unsigned: bool) -> np.ndarray:
    """Returns the 256 values of the dynamic tree code in ascending order, float32.

    After k leading zeros, k from 0 to 6, the other bits are a fraction between 0.1 and 1, of which each code has the
    middle of its interval, times 10**-k.  0 and 1 are codes of their own.  Without a sign, fractions have one bit more.
    """
    values = [0.0, 1.0]
    for zeros in range(7):
        ends = np.linspace(0.1, 1.0, 2 ** (6 - zeros + unsigned) + 1)
        fractions = (ends[1:] + ends[:-1]) / 2 * 10.0**-zeros
        values += [*fractions] if unsigned else [*fractions, *-fractions]
    return np.sort(np.array(values)).astype(np.float32)


def _smallest_code(format: StateFormat) -> Any:
    """Returns the code of the smallest positive value of an unsigned field."""
    return 1 if format.dynamic else np.array(1, np.uint8).view(format.values)


def _midpoint(format: StateFormat) -> float:
    """Returns the quotient below which a value would be rounded to zero."""
    smallest = _table(True)[1] if format.dynamic else np.array(1, np.uint8).view(format.values).astype(np.float32)
    return float(smallest) / 2
