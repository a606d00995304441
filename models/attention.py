"""Grouped-query attention of queries over cached keys and values."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from ..policies.targets import here
from . import cpu_attention, flash
from .by_platform import by_kernel, differentiated_as
from .kv_cache import LayerCache, update_slice

SCORES = 2**26
"""Most bytes of attention scores held at once, all heads together, and of masks."""

Places = jax.Array | tuple[jax.Array, jax.Array]
"""Positions (b, n) int32 of tokens; where rows hold several sequences, `(positions, segments)`, both (b, n) int32."""

Attend = Callable[[jax.Array, Places, LayerCache, Places], jax.Array]
"""A function of q (b, kv, h/kv, t, d), queries, cache and slots, which returns attention in q's shape."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillKV:
    """Keys and values (b, t, kv, d) of tokens that follow no others, and their mask (b, t) bool, padding at the end."""

    k: jax.Array
    v: jax.Array
    mask: jax.Array


def attend(
    q: jax.Array,
    cache: LayerCache,
    queries: jax.Array,
    slots: jax.Array,
    window: int | None,
    prefill: PrefillKV | None = None,
    segments: jax.Array | None = None,
) -> tuple[jax.Array, Callable[[], jax.Array]]:
    """`(output, weights)`: attention of q (b, t, h, d) over the cache, (b, t, h * d) in q's dtype.

    queries  (b, t) int32  positions of the queries
    slots    (b, s) int32  positions of the keys
    window   a query sees the keys less than `window` positions before it; None: all
    prefill  the same keys and values before they entered an empty cache, for cuDNN's causal attention; None: its
             attention with a mask, which is also for tokens that follow others
    segments (b, t) int32  the sequence of each token, if a row holds several: a query sees the keys of its own. The
             cache holds the same tokens and no others. None of the kernels supports this
    weights  function without arguments that returns the attention weights (b, h, t, s) in q's dtype

    On a CPU this is a native kernel, on a GPU cuDNN's flash attention, where that accepts the call; derivatives and
    batches (`vmap`) are those of attention over the slots.  There, scores and softmax are float32, and the queries of a
    long prompt are processed in chunks, so that never more than SCORES bytes of scores are held.
    """

    def over_slots(
        q: jax.Array, cache: LayerCache, queries: Places, slots: Places, _: PrefillKV | None = None
    ) -> jax.Array:
        return _over_slots(functools.partial(_attend, window), 4 * q.shape[2], q, cache, queries, slots)

    def with_mask(
        q: jax.Array, cache: LayerCache, queries: jax.Array, slots: jax.Array, _: PrefillKV | None = None
    ) -> jax.Array:
        return _over_slots(functools.partial(_attend_by_flash, window), q.dtype.itemsize, q, cache, queries, slots)

    def flash_attention(q: jax.Array, _: LayerCache, __: jax.Array, ___: jax.Array, prefill: PrefillKV) -> jax.Array:
        return flash.attend(q, prefill.k, prefill.v, prefill.mask, window).reshape(*q.shape[:2], -1)

    def natively(q: jax.Array, cache: LayerCache, queries: jax.Array, slots: jax.Array) -> jax.Array:
        return cpu_attention.attend(q, cache, queries, slots, window)

    def weights() -> jax.Array:
        b, t, heads, _ = q.shape
        return _weights(window, _grouped(q, cache), *places(), cache).astype(q.dtype).reshape(b, heads, t, -1)

    def places() -> tuple[Places, Places]:
        return (queries, slots) if segments is None else ((queries, segments), (slots, segments))

    if segments is not None:
        return over_slots(q, cache, *places()), weights
    if flash.refuses(here(), q.shape[1], q.shape[3], q.dtype, cache.dtype):
        native = cpu_attention.refuses(here(), q, cache) is None
        attention = by_kernel("cpu", natively, over_slots) if native else over_slots
        return attention(q, cache, queries, slots), weights
    if prefill is not None:
        traces = flash.traces(q, prefill.k, prefill.v, prefill.mask, window)
    else:
        traces = slots.shape[1] % flash.SLOTS == 0 and flash.traces_masked(q, cache.values)
    if not traces:
        return over_slots(q, cache, queries, slots), weights
    attention = by_kernel("cuda", with_mask if prefill is None else flash_attention, over_slots)
    return attention(q, cache, queries, slots, prefill), weights


def in_row_major_order(cache: LayerCache) -> LayerCache:
    """`cache`; on a GPU its axes are in memory in their order.

    Otherwise XLA may fill the cache in the order that cuDNN requires of k and v, and transpose all of it afterwards.
    """
    if here().platform != "cuda":
        return cache

    def constrained(cache: LayerCache) -> LayerCache:
        return jax.tree.map(lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim)))), cache)

    result: LayerCache = by_kernel("cuda", constrained, lambda cache: cache)(cache)
    return result


def _grouped(q: jax.Array, cache: LayerCache) -> jax.Array:
    """Queries (b, t, h, d), grouped by the kv head they share: (b, kv, h/kv, t, d)."""
    b, t, heads, d = q.shape
    kv = cache.keys.shape[1]
    return q.reshape(b, t, kv, heads // kv, d).transpose(0, 2, 3, 1, 4)


def _over_slots(attend: Attend, row: int, q: jax.Array, cache: LayerCache, queries: Places, slots: Places) -> jax.Array:
    """See `attend`; the function `attend` takes `row` bytes for one query and one slot."""
    b, t, heads, d = q.shape
    grouped = _grouped(q, cache)
    size = _chunk(t, row * b * cache.values.shape[2])
    if size == t:
        mixed = attend(grouped, queries, cache, slots)
    else:
        padding = -t % size
        padded = jnp.pad(grouped, ((0, 0),) * 3 + ((0, padding), (0, 0)))
        places = jax.tree.map(lambda each: jnp.pad(each, ((0, 0), (0, padding))), queries)
        mixed = _attend_in_chunks(attend, size, padded, places, cache, slots)[:, :, :, :t]
    return mixed.transpose(0, 3, 1, 2, 4).reshape(b, t, heads * d)


def _seen(window: int | None, queries: Places, slots: Places) -> jax.Array:
    """Whether each query sees each slot, (b, t, s) bool."""
    if isinstance(queries, tuple):
        same = queries[1][:, :, None] == slots[1][:, None, :]
        return same & _seen(window, queries[0], slots[0])
    assert not isinstance(slots, tuple)
    distance = queries[:, :, None] - slots[:, None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _weights(window: int | None, q: jax.Array, queries: Places, slots: Places, cache: LayerCache) -> jax.Array:
    """Attention weights of q (b, kv, g, t, d) over the slots: (b, kv, g, t, s) float32."""
    scores = _product(q, cache.typed(cache.keys)) * jnp.float32(q.shape[-1] ** -0.5)
    if cache.key_scales is not None:
        scores = scores * cache.key_scales[:, :, None, None, :]
    # Finite, so that the row of a padding token, which sees nothing, is not NaN.
    return jax.nn.softmax(
        jnp.where(_seen(window, queries, slots)[:, None, None], scores, jnp.finfo(jnp.float32).min), axis=-1
    )


def _attend(window: int | None, q: jax.Array, queries: Places, cache: LayerCache, slots: Places) -> jax.Array:
    """Values weighted by the attention of q (b, kv, g, t, d): its shape and dtype."""
    weights = _weights(window, q, queries, slots, cache)
    if cache.value_scales is None:
        return _product(weights.astype(q.dtype), cache.typed(cache.values)).astype(q.dtype)
    # Relative to the largest scale, so that small weights of small values do not leave float16.
    scales = cache.value_scales[:, :, None, None, :]
    largest_scale = jnp.max(scales, axis=-1, keepdims=True)
    sums = _product((weights * (scales / largest_scale)).astype(q.dtype), cache.typed(cache.values))
    return (sums * largest_scale).astype(q.dtype)


def _attend_by_flash(window: int | None, q: jax.Array, queries: Places, cache: LayerCache, slots: Places) -> jax.Array:
    """`_attend` by cuDNN."""
    b, kv, g, t, d = q.shape
    by_token = q.transpose(0, 3, 1, 2, 4).reshape(b, t, kv * g, d)
    k, v = cache.keys.transpose(0, 3, 1, 2), cache.values.transpose(0, 2, 1, 3)
    mixed = flash.attend_masked(by_token, k, v, _seen(window, queries, slots))
    return mixed.reshape(b, t, kv, g, d).transpose(0, 2, 3, 1, 4)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attend_in_chunks(
    attend: Attend, size: int, q: jax.Array, queries: Places, cache: LayerCache, slots: Places
) -> jax.Array:
    """`attend` for `size` queries at a time; each result overwrites its queries.

    A loop that collects its results starts from zeros, and XLA allocates the zeros of all layers before the first one.
    """

    def step(i: jax.Array, output: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(output, i * size, size, axis=3)
        places = jax.tree.map(lambda each: jax.lax.dynamic_slice_in_dim(each, i * size, size, axis=1), queries)
        return update_slice(output, attend(part, places, cache, slots), i * size, axis=3)

    return jax.lax.fori_loop(0, q.shape[3] // size, step, q)


@_attend_in_chunks.defjvp
def _attend_in_chunks_jvp(attend: Attend, size: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """The derivative collects the chunks, and computes each a second time in the backward pass."""

    def in_chunks(q: jax.Array, queries: Places, cache: LayerCache, slots: Places) -> jax.Array:
        mixed = jax.checkpoint(lambda part: attend(part[0], part[1], cache, slots))
        parts = q.reshape(*q.shape[:3], -1, size, q.shape[4])
        places = jax.tree.map(lambda each: jnp.moveaxis(each.reshape(each.shape[0], -1, size), 1, 0), queries)
        results = jax.lax.map(mixed, (jnp.moveaxis(parts, 3, 0), places))
        return jnp.moveaxis(results, 0, 3).reshape(q.shape)

    return jax.jvp(in_chunks, primals, tangents)


def _chunk(queries: int, row: int) -> int:
    """Queries in a chunk, where the scores of one take `row` bytes: all of them, or a power of two."""
    if queries * row <= SCORES:
        return queries
    return min(queries, max(1 << max((SCORES // row).bit_length() - 1, 0), 16))


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a (b, kv, g, t, n) @ b (b, kv, n, m) for each kv head, float32 (b, kv, g, t, m); b is exact in a's dtype."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        b = b.astype(a.dtype)
        return jnp.einsum("bkgtn,bknm->bkgtm", a, b, precision=precision, preferred_element_type=jnp.float32)

    def fused(a: jax.Array, b: jax.Array) -> jax.Array:
        """A product and a sum, since for one token XLA's dot on a CPU converts and copies the whole cache."""
        wide = b[:, :, None, None].astype(jnp.float32)
        return jnp.sum(a.astype(jnp.float32)[..., None] * wide, axis=-2, dtype=jnp.float32)

    if a.shape[3] != 1:
        return dot(a, b)

    def dispatched(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(a, b, cpu=fused, default=dot)

    # XLA (jaxlib 0.10.2) crashes in the program of the derivatives of `fused` in a batch.
    result: jax.Array = differentiated_as(dot, dispatched)(a, b)
    return result
