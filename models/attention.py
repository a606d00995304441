"""Grouped-query attention over positions, and the static cache of keys and values.

Masks come from positions, not from slots: a slot holds the position of its token, or EMPTY, so left and right padding,
a cache that is not full and a sliding window are one comparison.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ..policies.errors import InvalidTokens

EMPTY = np.int32(2**30)
"""The position of a slot that holds no token: later than any query."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far, in slots that are filled in order.

    They lie as attention reads them: what is not summed over is contiguous, so that no step copies or turns them.

    keys          one a layer, (b, kv heads, head_dim, slots), the activations' dtype
    values        one a layer, (b, kv heads, slots, head_dim), likewise
    positions     (b, slots) int32, EMPTY where a slot holds no token or padding
    length        () int32, slots filled
    tokens        (b,) int32, real tokens so far: the position of the next one
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    positions: jax.Array
    length: jax.Array
    tokens: jax.Array

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


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, queries: jax.Array, slots: jax.Array, window: int | None
) -> jax.Array:
    """Attention of q (b, t, h, d) over k (b, kv, d, s) and v (b, kv, s, d), in their dtype: (b, t, h * d).

    queries  (b, t) int32  positions of the queries
    slots    (b, s) int32  positions of the keys
    window   a query sees the keys less than `window` positions before it; None: all

    Scores and softmax are float32.
    """
    b, t, heads, d = q.shape
    kv = k.shape[1]
    grouped = q.reshape(b, t, kv, heads // kv, d).transpose(0, 2, 3, 1, 4)
    distance = queries[:, :, None] - slots[:, None, :]
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    # Finite, so that the row of a padding token, which sees nothing, is not NaN.
    scores = jnp.where(seen[:, None, None], _product(grouped, k) * jnp.float32(d**-0.5), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = _product(weights, v).astype(v.dtype)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(b, t, heads * d)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a (b, kv, g, t, n) @ b (b, kv, n, m) of each kv head, float32 (b, kv, g, t, m)."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum("bkgtn,bknm->bkgtm", a, b, precision=precision, preferred_element_type=jnp.float32)

    def fused(a: jax.Array, b: jax.Array) -> jax.Array:
        """A multiplication and a sum: for one token XLA's dot on a CPU converts and copies the whole cache."""
        wide = b[:, :, None, None].astype(jnp.float32)
        return jnp.sum(a.astype(jnp.float32)[..., None] * wide, axis=-2, dtype=jnp.float32)

    return jax.lax.platform_dependent(a, b, cpu=fused, default=dot) if a.shape[3] == 1 else dot(a, b)
