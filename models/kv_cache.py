"""The static cache of keys and values, and the positions of its tokens.

Attention masks are computed from positions, not from slots: a slot holds the position of its token, or EMPTY. Left and
right padding, a cache that is not full, and a sliding window are then one comparison.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ..policies.dtypes import is_narrow, saturating_cast
from ..policies.errors import InvalidTokens
from ..policies.formats import Format
from ..policies.matmul.shards import vary
from ..policies.native import library
from ..policies.scaled_array import quantize_in_one_pass
from ..policies.scales import F32, least_rule
from ..policies.targets import here
from .by_platform import by_kernel, differentiated_as

EMPTY = np.int32(2**30)
"""The position of a slot without a token: later than any query."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far, in slots that are filled in order.

    Stored in attention's layout: the axis that a product does not sum over is contiguous, so that no decoding step
    copies or transposes them.

    keys          one per layer, (b, kv heads, head_dim, slots), in `dtype`; float8 is stored as uint8 of the same
                  bits, since XLA's CPU backend copies a float8 array in a loop's state at every step
    values        one per layer, (b, kv heads, slots, head_dim), likewise
    key_scales    one per layer, (b, kv heads, slots) float32: multiplier of each head's key of a token; None for each
                  layer where the dtype needs no scales
    value_scales  likewise
    positions     (b, slots) int32, EMPTY for a slot without a token or with padding
    length        () int32, filled slots
    tokens        (b,) int32, real tokens so far: the position of the next one
    dtype         the policy's `kv_cache`
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    key_scales: tuple[jax.Array | None, ...]
    value_scales: tuple[jax.Array | None, ...]
    positions: jax.Array
    length: jax.Array
    tokens: jax.Array
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    @staticmethod
    def of(layers: Sequence[LayerCache], positions: jax.Array, length: jax.Array, tokens: jax.Array) -> KVCache:
        """The cache of a model with these layers."""
        return KVCache(
            tuple(layer.keys for layer in layers),
            tuple(layer.values for layer in layers),
            tuple(layer.key_scales for layer in layers),
            tuple(layer.value_scales for layer in layers),
            positions,
            length,
            tokens,
            layers[0].dtype,
        )

    def layer(self, i: int) -> LayerCache:
        """Keys and values of layer `i`."""
        return LayerCache(self.keys[i], self.values[i], self.key_scales[i], self.value_scales[i], self.dtype)

    def check_room(self, count: int) -> None:
        """Raises InvalidTokens unless `count` more tokens fit; under jit `length` is unknown and counts as 0."""
        filled = 0 if isinstance(self.length, jax.core.Tracer) else int(self.length)
        slots = self.positions.shape[1]
        if filled + count > slots:
            raise InvalidTokens(f"the cache has room for {slots} tokens and holds {filled}, found {count} more.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, in the layout of `KVCache`."""

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array | None
    value_scales: jax.Array | None
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    @staticmethod
    def of(k: jax.Array, v: jax.Array, dtype: np.dtype) -> LayerCache:
        """Keys and values (b, t, kv, d) in `dtype`; a narrow dtype has one scale for each head and token."""
        dtype = np.dtype(dtype)
        if not is_narrow(dtype):
            return LayerCache(*_transposed(saturating_cast(k, dtype), saturating_cast(v, dtype)), None, None, dtype)
        (k, key_scales), (v, value_scales) = (quantize_in_one_pass(x, head_format(dtype)) for x in (k, v))
        if dtype.kind != "i":
            k, v = (jax.lax.bitcast_convert_type(x, jnp.uint8) for x in (k, v))
        key_scales, value_scales = (scales[..., 0].transpose(0, 2, 1) for scales in (key_scales, value_scales))
        return LayerCache(*_transposed(k, v), key_scales, value_scales, dtype)

    def typed(self, array: jax.Array) -> jax.Array:
        """`keys` or `values` in the cache's dtype, where float8 is stored as uint8."""
        return array if array.dtype == self.dtype else jax.lax.bitcast_convert_type(array, self.dtype)

    def put(self, new: LayerCache, start: jax.Array | int) -> LayerCache:
        """This cache with `new` in the slots from `start` on."""
        assert new.keys.shape[:3] == self.keys.shape[:3], (new.keys.shape, self.keys.shape)  # an update may be smaller
        update = jax.lax.dynamic_update_slice_in_dim
        keys = _in_place(self.keys, new.keys, start, axis=3)
        values = _in_place(self.values, new.values, start, axis=2)
        if self.key_scales is None or self.value_scales is None:
            return LayerCache(keys, values, None, None, self.dtype)
        assert new.key_scales is not None
        assert new.value_scales is not None
        key_scales = update(self.key_scales, new.key_scales, start, axis=2)
        value_scales = update(self.value_scales, new.value_scales, start, axis=2)
        return LayerCache(keys, values, key_scales, value_scales, self.dtype)


def token_positions(mask: jax.Array, past: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`(queries, slots)`, both (b, t) int32: positions of real tokens, counted on from `past` (b,).

    As a query, a padding token takes its neighbour's position, since its result is not used; as a slot it is EMPTY.
    """
    queries = jnp.maximum(past[:, None] + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    return queries, jnp.where(mask, queries, EMPTY)


def head_format(dtype: np.dtype) -> Format:
    """The format of keys and values in a narrow dtype: one float32 scale for each head of each token."""
    return Format(np.dtype(dtype), (1, -1), F32, least_rule)


def update_slice(old: jax.Array, new: jax.Array, start: jax.Array | int, axis: int) -> jax.Array:
    """`old` with `new` from `start` on along `axis`; 16-bit dtypes are moved as bits.

    XLA's CPU backend would convert all of a 16-bit float array to float32 and back.  It still writes all of the array.
    """
    plain = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis)
    if old.dtype.itemsize != 2:
        return plain(old, new, start)

    def as_bits(old: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
        old_bits, new_bits = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (old, new))
        return jax.lax.bitcast_convert_type(plain(old_bits, new_bits, start), old.dtype)

    result: jax.Array = differentiated_as(plain, as_bits)(old, new, jnp.asarray(start, jnp.int32))
    return result


def _in_place(old: jax.Array, new: jax.Array, start: jax.Array | int, axis: int) -> jax.Array:
    """`update_slice`, which on a CPU writes only the slice, if `old` is not used afterwards."""
    if old.dtype.itemsize != 2 or here().platform != "cpu" or library.unavailable():
        return update_slice(old, new, start, axis)
    shape = jax.ShapeDtypeStruct(old.shape, old.dtype)
    put = jax.ffi.ffi_call("perparam_put", shape, input_output_aliases={0: 0})

    def natively(*operands: jax.Array) -> jax.Array:
        marked: jax.Array = vary(put(*operands, axis=np.int64(axis)), operands)
        return marked

    plain = functools.partial(update_slice, axis=axis)
    result: jax.Array = by_kernel("cpu", natively, plain)(old, new, jnp.asarray(start, jnp.int32))
    return result


def _transposed(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values (b, t, kv, d) in the cache's layout: (b, kv, d, t) and (b, kv, t, d)."""
    return k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
