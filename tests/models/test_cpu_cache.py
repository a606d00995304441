"""New keys and values enter a 16-bit cache in place, by the native library."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perparam.models import kv_cache
from perparam.models.kv_cache import LayerCache
from perparam.policies.native import library

pytestmark = pytest.mark.skipif(library.unavailable() is not None, reason="there is no native library here")

SLOTS = 12


def cache_and_new(dtype: str, count: int) -> tuple[LayerCache, LayerCache]:
    """A cache of 2 rows, 3 heads, 5 numbers and SLOTS tokens with random bits, and `count` tokens."""
    random = np.random.default_rng(0)

    def of(tokens: int) -> LayerCache:
        bits = [random.integers(0, 2**16, shape, np.uint16) for shape in ((2, 3, 5, tokens), (2, 3, tokens, 5))]
        k, v = (jax.lax.bitcast_convert_type(jnp.asarray(each), dtype) for each in bits)
        return LayerCache(k, v, None, None, np.dtype(k.dtype))

    return of(SLOTS), of(count)


def bits(cache: LayerCache) -> list[np.ndarray]:
    return [np.array(jax.lax.bitcast_convert_type(x, jnp.uint16)) for x in (cache.keys, cache.values)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("start", "count"), [(0, 1), (7, 1), (3, 4), (0, SLOTS), (11, 1), (10, 4), (99, 1)])
def test_bits_are_those_of_numpy(dtype, start, count):
    """NaN and subnormal numbers too; a start without room for the update is moved, as by XLA."""
    cache, new = cache_and_new(dtype, count)
    expected, first = bits(cache), min(max(start, 0), SLOTS - count)
    expected[0][..., first : first + count] = bits(new)[0]
    expected[1][:, :, first : first + count] = bits(new)[1]
    for found, right in zip(bits(jax.jit(LayerCache.put)(cache, new, start)), expected, strict=True):
        np.testing.assert_array_equal(found, right)


def test_the_old_cache_stays_where_it_is_used_again():
    cache, new = cache_and_new("bfloat16", 1)
    before = bits(cache)
    both = jax.jit(lambda cache, new: (cache.put(new, 2), cache.keys + 0))(cache, new)
    np.testing.assert_array_equal(bits(cache)[0], before[0])
    assert (bits(both[0])[0] != before[0]).any()


def test_a_loop_copies_no_cache():
    cache, new = cache_and_new("bfloat16", 1)

    def steps(cache: LayerCache, new: LayerCache) -> LayerCache:
        return jax.lax.fori_loop(0, 5, lambda i, cache: cache.put(new, i), cache)

    program = jax.jit(steps, donate_argnums=0).lower(cache, new).compile().as_text()
    assert program.count("perparam_put") == 2
    whole = rf"(2,3,5,{SLOTS}|2,3,{SLOTS},5)"
    assert not re.search(rf"= bf16\[{whole}\]\S* (copy|fusion|convert)\(", program)


def test_batched_and_differentiated_as_the_slice_of_jax():
    cache, new = cache_and_new("bfloat16", 2)
    cache, new = (jax.tree.map(lambda x: jnp.ones_like(x), each) for each in (cache, new))
    put = functools.partial(kv_cache._in_place, axis=2)
    stacked = jnp.stack([cache.values, 2 * cache.values])
    batched = jax.vmap(put, in_axes=(0, None, None))(stacked, new.values, 3)
    one_by_one = jnp.stack([put(each, new.values, 3) for each in stacked])
    np.testing.assert_array_equal(np.asarray(batched, np.float32), np.asarray(one_by_one, np.float32))

    def total(values: jax.Array, new: jax.Array) -> jax.Array:
        return (put(values, new, 3).astype(jnp.float32) * jnp.arange(SLOTS, dtype=jnp.float32)[:, None]).sum()

    of_cache, of_new = jax.grad(total, (0, 1))(cache.values, new.values)
    np.testing.assert_array_equal(np.asarray(of_new[0, 0, :, 0], np.float32), [3, 4])
    expected = np.where(np.isin(np.arange(SLOTS), (3, 4)), 0, np.arange(SLOTS))
    np.testing.assert_array_equal(np.asarray(of_cache[0, 0, :, 0], np.float32), expected)
