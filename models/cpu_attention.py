"""The native kernel of attention on a CPU, which reads the cache as it is stored, and only slots that a query sees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ..policies.matmul.shards import vary
from ..policies.native import library
from ..policies.native.tables import bfloat16_table
from ..policies.targets import Target
from .kv_cache import LayerCache

_WIDE = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))
_UNLIMITED = 2**31 - 1


def refuses(target: Target, q: jax.Array, cache: LayerCache) -> str | None:
    """The reason not to use the kernel for queries q (b, t, h, d); None if it can be used.

    target  device that the program is compiled for
    """
    if target.platform != "cpu":
        return "it is for CPUs"
    if q.dtype not in _WIDE:
        return f"queries are {q.dtype.name}, it supports float32, bfloat16 and float16"
    if cache.dtype not in _WIDE and cache.dtype.itemsize != 1:
        return f"the cache is {cache.dtype.name}"
    if not all(isinstance(size, int) and size > 0 for size in (*q.shape, *cache.keys.shape)):
        return "a size is not known, or 0"
    why = library.unavailable()
    return None if why is None else f"native kernels: {why}"


def attend(q: jax.Array, cache: LayerCache, queries: jax.Array, slots: jax.Array, window: int | None) -> jax.Array:
    """Attention of q (b, t, h, d) over the cache, (b, t, h * d) in q's dtype; `refuses` has no reason against it.

    Scores, softmax and sums are float32.  The result of a query has the same bits alone and among others, for any
    number of threads, and whatever is in slots that it does not see, as long as that is finite; a query that sees no
    slot has zero.  Weights are rounded to bfloat16 only where queries are bfloat16, the cache is exact in it, and the
    processor multiplies pairs of bfloat16; all else is multiplied in float32.

    queries  (b, t) int32  positions of the queries
    slots    (b, s) int32  positions of the keys, EMPTY for those that no query sees
    window   a query sees the keys less than `window` positions before it; None: all
    """
    b, t, heads, d = q.shape
    none = jnp.zeros(0, jnp.float32)
    call = jax.ffi.ffi_call("perparam_attention", jax.ShapeDtypeStruct((b, t, heads * d), q.dtype))
    operands = (
        q,
        cache.keys,
        cache.values,
        none if cache.key_scales is None else cache.key_scales,
        none if cache.value_scales is None else cache.value_scales,
        queries,
        slots,
    )
    result: jax.Array = call(
        *operands,
        bfloat16_table(cache.dtype),
        window=np.int32(_UNLIMITED if window is None else min(window, _UNLIMITED)),
        scale=np.float32(d**-0.5),
    )
    marked: jax.Array = vary(result, operands)
    return marked
