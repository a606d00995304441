"""Grouped-query attention over positions, and the static cache of keys and values.

Masks come from positions, not from slots: a slot holds the position of its token, or EMPTY, so left and right padding,
a cache that is not full and a sliding window are one comparison.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ..policies.dtypes import is_narrow, largest, saturating_cast
from ..policies.errors import InvalidTokens

EMPTY = np.int32(2**30)
"""The position of a slot that holds no token: later than any query."""

SCORES = 2**26
"""Bytes of scores that are held at a time, all heads together."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far, in slots that are filled in order.

    They lie as attention reads them: what is not summed over is contiguous, so that no step copies or turns them.

    keys          one a layer, (b, kv heads, head_dim, slots), in the policy's `kv_cache` dtype
    values        one a layer, (b, kv heads, slots, head_dim), likewise
    key_scales    one a layer, (b, kv heads, slots) float32: what each head's key of a token is multiplied by; None in
                  place of each where the dtype needs no scales
    value_scales  likewise
    positions     (b, slots) int32, EMPTY where a slot holds no token or padding
    length        () int32, slots filled
    tokens        (b,) int32, real tokens so far: the position of the next one
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    key_scales: tuple[jax.Array | None, ...]
    value_scales: tuple[jax.Array | None, ...]
    positions: jax.Array
    length: jax.Array
    tokens: jax.Array

    @staticmethod
    def of(layers: Sequence[Kept], positions: jax.Array, length: jax.Array, tokens: jax.Array) -> KVCache:
        """The cache of these layers."""
        return KVCache(
            tuple(kept.keys for kept in layers),
            tuple(kept.values for kept in layers),
            tuple(kept.key_scales for kept in layers),
            tuple(kept.value_scales for kept in layers),
            positions,
            length,
            tokens,
        )

    def layer(self, i: int) -> Kept:
        """What it holds of one layer."""
        return Kept(self.keys[i], self.values[i], self.key_scales[i], self.value_scales[i])

    def check_room(self, count: int) -> None:
        """Raises InvalidTokens unless `count` more tokens fit; under jit `length` is unknown and counts as 0."""
        filled = 0 if isinstance(self.length, jax.core.Tracer) else int(self.length)
        slots = self.positions.shape[1]
        if filled + count > slots:
            raise InvalidTokens(f"the cache has {slots} slots, {filled} are filled, {count} more tokens do not fit.")


def token_positions(mask: jax.Array, before: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`(queries, slots)`, both (b, t) int32: positions count the real tokens of a row, on from `before` (b,).

    As queries, padding tokens take a neighbour's position, whatever they compute being unused; as slots they are EMPTY.
    """
    queries = jnp.maximum(before[:, None] + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    return queries, jnp.where(mask, queries, EMPTY)


def as_cached(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values (b, t, kv, d) as a `KVCache` holds them: (b, kv, d, t) and (b, kv, t, d)."""
    return k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
    """Keys and values of one layer, as `KVCache` holds them."""

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None

    @staticmethod
    def of(k: jax.Array, v: jax.Array, dtype: np.dtype) -> Kept:
        """Keys and values (b, t, kv, d) in `dtype`; narrow ones scaled for each head and token by its largest value."""
        if not is_narrow(dtype):
            return Kept(*as_cached(saturating_cast(k, dtype), saturating_cast(v, dtype)))
        (k, key_scales), (v, value_scales) = (_narrowed(x, dtype) for x in (k, v))
        return Kept(*as_cached(k, v), key_scales.transpose(0, 2, 1), value_scales.transpose(0, 2, 1))

    def put(self, new: Kept, start: jax.Array | int) -> Kept:
        """With `new` in the slots from `start` on."""
        update = jax.lax.dynamic_update_slice_in_dim
        keys, values = _put(self.keys, new.keys, start, axis=3), _put(self.values, new.values, start, axis=2)
        if self.key_scales is None or self.value_scales is None:
            return Kept(keys, values)
        assert new.key_scales is not None
        assert new.value_scales is not None
        key_scales = update(self.key_scales, new.key_scales, start, axis=2)
        return Kept(keys, values, key_scales, update(self.value_scales, new.value_scales, start, axis=2))


def _put(old: jax.Array, new: jax.Array, start: jax.Array | int, axis: int) -> jax.Array:
    """`old` with `new` from `start` on, as bits: XLA's CPU backend widens a whole cache to update it, and back."""
    if old.dtype.itemsize > 2 or old.dtype == jnp.int8:
        return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis)
    bits = jnp.dtype(f"uint{8 * old.dtype.itemsize}")
    cast = jax.lax.bitcast_convert_type
    updated = jax.lax.dynamic_update_slice_in_dim(cast(old, bits), cast(new, bits), start, axis)
    return cast(updated, old.dtype)


def _narrowed(x: jax.Array, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    """x (..., d) in a narrow dtype, and its scales (...) float32."""
    wide = x.astype(jnp.float32)
    amax = jnp.max(jnp.abs(wide), axis=-1)
    scales = jnp.maximum(amax / largest(dtype), np.finfo(np.float32).tiny)  # of nothing but zeros it does not matter
    return saturating_cast(wide / scales[..., None], dtype), scales


def attend(
    q: jax.Array, kept: Kept, queries: jax.Array, slots: jax.Array, window: int | None
) -> tuple[jax.Array, Callable[[], jax.Array]]:
    """Attention of q (b, t, h, d) over keys and values, in q's dtype: (b, t, h * d); and its weights, if called for.

    queries  (b, t) int32  positions of the queries
    slots    (b, s) int32  positions of the keys
    window   a query sees the keys less than `window` positions before it; None: all
    weights  (b, h, t, s), in q's dtype

    Scores and softmax are float32.  Of long prompts a part of the queries is looked at at a time, so that never more
    than SCORES bytes of scores are held.
    """
    b, t, heads, d = q.shape
    kv, s = kept.keys.shape[1], kept.keys.shape[3]
    grouped = q.reshape(b, t, kv, heads // kv, d).transpose(0, 2, 3, 1, 4)

    def weights(q: jax.Array, queries: jax.Array) -> jax.Array:
        distance = queries[:, :, None] - slots[:, None, :]
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        scores = _product(q, kept.keys) * jnp.float32(d**-0.5)
        if kept.key_scales is not None:
            scores = scores * kept.key_scales[:, :, None, None, :]
        # Finite, so that the row of a padding token, which sees nothing, is not NaN.
        return jax.nn.softmax(jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min), axis=-1)

    def mixed(q: jax.Array, queries: jax.Array) -> jax.Array:
        shares = weights(q, queries)
        if kept.value_scales is None:
            return _product(shares.astype(q.dtype), kept.values).astype(q.dtype)
        # Relative to the largest scale, so that small shares of small values do not leave float16.
        scales = kept.value_scales[:, :, None, None, :]
        largest_scale = jnp.max(scales, axis=-1, keepdims=True)
        sums = _product((shares * (scales / largest_scale)).astype(q.dtype), kept.values)
        return (sums * largest_scale).astype(q.dtype)

    def all_weights() -> jax.Array:
        return weights(grouped, queries).astype(q.dtype).reshape(b, heads, t, s)

    size = _chunk(t, 4 * b * heads * s)
    if size == t:
        result = mixed(grouped, queries)
    else:
        padding = -t % size
        parts = jnp.pad(grouped, ((0, 0),) * 3 + ((0, padding), (0, 0))).reshape(b, kv, heads // kv, -1, size, d)
        places = jnp.pad(queries, ((0, 0), (0, padding))).reshape(b, -1, size)
        result = jax.lax.map(lambda part: mixed(*part), (jnp.moveaxis(parts, 3, 0), jnp.moveaxis(places, 1, 0)))
        result = jnp.moveaxis(result, 0, 3).reshape(b, kv, heads // kv, t + padding, d)[:, :, :, :t]
    return result.transpose(0, 3, 1, 2, 4).reshape(b, t, heads * d), all_weights


def _chunk(queries: int, row: int) -> int:
    """How many queries to look at at a time, whose scores take `row` bytes each: all, or a power of two."""
    if queries * row <= SCORES:
        return queries
    return min(queries, max(1 << max((SCORES // row).bit_length() - 1, 0), 16))


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a (b, kv, g, t, n) @ b (b, kv, n, m) of each kv head, float32 (b, kv, g, t, m); b is exact in a's dtype."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        b = b.astype(a.dtype)
        return jnp.einsum("bkgtn,bknm->bkgtm", a, b, precision=precision, preferred_element_type=jnp.float32)

    def fused(a: jax.Array, b: jax.Array) -> jax.Array:
        """A multiplication and a sum: for one token XLA's dot on a CPU converts and copies the whole cache."""
        wide = b[:, :, None, None].astype(jnp.float32)
        return jnp.sum(a.astype(jnp.float32)[..., None] * wide, axis=-2, dtype=jnp.float32)

    return jax.lax.platform_dependent(a, b, cpu=fused, default=dot) if a.shape[3] == 1 else dot(a, b)
