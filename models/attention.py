"""Grouped-query attention over positions, and the static cache of keys and values.

Masks come from positions, not from slots: a slot holds the position of its token, or EMPTY, so left and right padding,
a cache that is not full and a sliding window are one comparison.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..policies.dtypes import is_narrow, saturating_cast
from ..policies.errors import InvalidTokens
from ..policies.formats import Format, quantize_in_one_pass
from ..policies.matmul.portable import unless_portable
from ..policies.scales import F32, least_rule
from ..policies.targets import here
from . import flash

EMPTY = np.int32(2**30)
"""The position of a slot that holds no token: later than any query."""

SCORES = 2**26
"""Bytes of scores that are held at a time, all heads together."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far, in slots that are filled in order.

    They lie as attention reads them: what is not summed over is contiguous, so that no step copies or turns them.

    keys          one a layer, (b, kv heads, head_dim, slots), in `dtype`; float8 as uint8 of the same bits, since XLA's
                  CPU backend copies a float8 array that a loop carries, each time
    values        one a layer, (b, kv heads, slots, head_dim), likewise
    key_scales    one a layer, (b, kv heads, slots) float32: what each head's key of a token is multiplied by; None in
                  place of each where the dtype needs no scales
    value_scales  likewise
    positions     (b, slots) int32, EMPTY where a slot holds no token or padding
    length        () int32, slots filled
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
            layers[0].dtype,
        )

    def layer(self, i: int) -> Kept:
        """What it holds of one layer."""
        return Kept(self.keys[i], self.values[i], self.key_scales[i], self.value_scales[i], self.dtype)

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
    key_scales: jax.Array | None
    value_scales: jax.Array | None
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    @staticmethod
    def of(k: jax.Array, v: jax.Array, dtype: np.dtype) -> Kept:
        """Keys and values (b, t, kv, d) in `dtype`; narrow ones scaled for each head and token by its largest value."""
        dtype = np.dtype(dtype)
        if not is_narrow(dtype):
            return Kept(*as_cached(saturating_cast(k, dtype), saturating_cast(v, dtype)), None, None, dtype)
        (k, key_scales), (v, value_scales) = (quantize_in_one_pass(x, head_format(dtype)) for x in (k, v))
        if dtype.kind != "i":
            k, v = (jax.lax.bitcast_convert_type(x, jnp.uint8) for x in (k, v))
        key_scales, value_scales = (scales[..., 0].transpose(0, 2, 1) for scales in (key_scales, value_scales))
        return Kept(*as_cached(k, v), key_scales, value_scales, dtype)

    def read(self, held: jax.Array) -> jax.Array:
        """Keys or values in the dtype that they have."""
        return held if held.dtype == self.dtype else jax.lax.bitcast_convert_type(held, self.dtype)

    def put(self, new: Kept, start: jax.Array | int) -> Kept:
        """With `new` in the slots from `start` on."""
        update = jax.lax.dynamic_update_slice_in_dim
        keys, values = _put(self.keys, new.keys, start, axis=3), _put(self.values, new.values, start, axis=2)
        if self.key_scales is None or self.value_scales is None:
            return Kept(keys, values, None, None, self.dtype)
        assert new.key_scales is not None
        assert new.value_scales is not None
        key_scales = update(self.key_scales, new.key_scales, start, axis=2)
        value_scales = update(self.value_scales, new.value_scales, start, axis=2)
        return Kept(keys, values, key_scales, value_scales, self.dtype)


def _put(old: jax.Array, new: jax.Array, start: jax.Array | int, axis: int) -> jax.Array:
    """`old` with `new` from `start` on; 16 bits as bits: XLA's CPU backend widens all of it for that, and back."""
    if old.dtype.itemsize != 2:
        return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis)
    old_bits, new_bits = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (old, new))
    updated = jax.lax.dynamic_update_slice_in_dim(old_bits, new_bits, start, axis)
    return jax.lax.bitcast_convert_type(updated, old.dtype)


def head_format(dtype: np.dtype) -> Format:
    """The format of keys and values in a narrow dtype: one float32 scale for each head of each token."""
    return Format(np.dtype(dtype), (1, -1), F32, least_rule)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Alone:
    """Tokens that nothing came before: keys and values (b, t, kv, d), and which are real (b, t) bool."""

    k: jax.Array
    v: jax.Array
    mask: jax.Array


def attend(
    q: jax.Array,
    kept: Kept,
    queries: jax.Array,
    slots: jax.Array,
    window: int | None,
    alone: Alone | None = None,
) -> tuple[jax.Array, Callable[[], jax.Array]]:
    """Attention of q (b, t, h, d) over keys and values, in q's dtype: (b, t, h * d); and its weights, if called for.

    queries  (b, t) int32  positions of the queries
    slots    (b, s) int32  positions of the keys
    window   a query sees the keys less than `window` positions before it; None: all
    alone    what `kept` holds beside empty slots, for cuDNN's flash attention where that takes it; has no derivative
    weights  (b, h, t, s), in q's dtype

    Scores and softmax are float32.  Of long prompts a part of the queries is looked at at a time, so that never more
    than SCORES bytes of scores are held.
    """

    def over_slots(q: jax.Array, kept: Kept, queries: jax.Array, slots: jax.Array, _: Alone | None = None) -> jax.Array:
        return _over_slots(window, q, kept, queries, slots)

    def flashed(q: jax.Array, _: Kept, __: jax.Array, ___: jax.Array, alone: Alone) -> jax.Array:
        return flash.attend(q, alone.k, alone.v, alone.mask, window).reshape(*q.shape[:2], -1)

    def weights() -> jax.Array:
        b, t, heads, _ = q.shape
        return _weights(window, _grouped(q, kept), queries, kept, slots).astype(q.dtype).reshape(b, heads, t, -1)

    if (
        alone is None
        or flash.refuses(here(), q.shape[1], q.shape[3], q.dtype, kept.dtype)
        or not flash.traces(q, alone.k, alone.v, alone.mask, window)
    ):
        return over_slots(q, kept, queries, slots), weights
    on_gpu = unless_portable(flashed, over_slots)
    return jax.lax.platform_dependent(q, kept, queries, slots, alone, cuda=on_gpu, default=over_slots), weights


def _grouped(q: jax.Array, kept: Kept) -> jax.Array:
    """Queries (b, t, h, d) by the kv head that they share: (b, kv, h/kv, t, d)."""
    b, t, heads, d = q.shape
    kv = kept.keys.shape[1]
    return q.reshape(b, t, kv, heads // kv, d).transpose(0, 2, 3, 1, 4)


def _over_slots(window: int | None, q: jax.Array, kept: Kept, queries: jax.Array, slots: jax.Array) -> jax.Array:
    """See `attend`."""
    b, t, heads, d = q.shape
    grouped = _grouped(q, kept)
    size = _chunk(t, 4 * b * heads * slots.shape[1])
    if size == t:
        mixed = _mixed(window, grouped, queries, kept, slots)
    else:
        padding = -t % size
        padded = jnp.pad(grouped, ((0, 0),) * 3 + ((0, padding), (0, 0)))
        places = jnp.pad(queries, ((0, 0), (0, padding)))
        mixed = _mixed_in_parts(window, size, padded, places, kept, slots)[:, :, :, :t]
    return mixed.transpose(0, 3, 1, 2, 4).reshape(b, t, heads * d)


def _weights(window: int | None, q: jax.Array, queries: jax.Array, kept: Kept, slots: jax.Array) -> jax.Array:
    """How much q (b, kv, g, t, d) looks at each slot: (b, kv, g, t, s) float32."""
    distance = queries[:, :, None] - slots[:, None, :]
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    scores = _product(q, kept.read(kept.keys)) * jnp.float32(q.shape[-1] ** -0.5)
    if kept.key_scales is not None:
        scores = scores * kept.key_scales[:, :, None, None, :]
    # Finite, so that the row of a padding token, which sees nothing, is not NaN.
    return jax.nn.softmax(jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min), axis=-1)


def _mixed(window: int | None, q: jax.Array, queries: jax.Array, kept: Kept, slots: jax.Array) -> jax.Array:
    """The values that q (b, kv, g, t, d) looks at: of its shape and dtype."""
    shares = _weights(window, q, queries, kept, slots)
    if kept.value_scales is None:
        return _product(shares.astype(q.dtype), kept.read(kept.values)).astype(q.dtype)
    # Relative to the largest scale, so that small shares of small values do not leave float16.
    scales = kept.value_scales[:, :, None, None, :]
    largest_scale = jnp.max(scales, axis=-1, keepdims=True)
    sums = _product((shares * (scales / largest_scale)).astype(q.dtype), kept.read(kept.values))
    return (sums * largest_scale).astype(q.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _mixed_in_parts(
    window: int | None, size: int, q: jax.Array, queries: jax.Array, kept: Kept, slots: jax.Array
) -> jax.Array:
    """`_mixed`, `size` queries at a time, each part written where its queries were.

    A loop that collects its results begins with zeros, and XLA makes those of all layers before the first one.
    """

    def step(i: jax.Array, so_far: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(so_far, i * size, size, axis=3)
        places = jax.lax.dynamic_slice_in_dim(queries, i * size, size, axis=1)
        return _put(so_far, _mixed(window, part, places, kept, slots), i * size, axis=3)

    return jax.lax.fori_loop(0, q.shape[3] // size, step, q)


@_mixed_in_parts.defjvp
def _mixed_in_parts_jvp(window: int | None, size: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Where it is differentiated parts are collected, and computed again for the derivative."""

    def collected(q: jax.Array, queries: jax.Array, kept: Kept, slots: jax.Array) -> jax.Array:
        mixed = jax.checkpoint(lambda part: _mixed(window, part[0], part[1], kept, slots))
        parts = q.reshape(*q.shape[:3], -1, size, q.shape[4])
        places = queries.reshape(queries.shape[0], -1, size)
        results = jax.lax.map(mixed, (jnp.moveaxis(parts, 3, 0), jnp.moveaxis(places, 1, 0)))
        return jnp.moveaxis(results, 0, 3).reshape(q.shape)

    return jax.jvp(collected, primals, tangents)


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
