"""Random operands of the kernels of a decoding step that concern attention, and their comparison with the reference."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import dtype

from perparam.models.decoding import bounds, hopper_attention, hopper_rotate, reference
from perparam.models.kv_cache import EMPTY, LayerCache

EPS = 1e-6


def cache_of(batch, kv, d, slots, of, filled, seed=0) -> LayerCache:
    """A cache whose slots from `filled` on are NaN, which nobody may read."""
    random = np.random.default_rng([seed, batch, kv, d, slots])
    keys = random.normal(size=(batch, kv, d, slots)).astype(dtype(of))
    values = random.normal(size=(batch, kv, slots, d)).astype(dtype(of))
    keys[..., filled:] = np.nan
    values[:, :, filled:] = np.nan
    return LayerCache(jnp.asarray(keys), jnp.asarray(values), None, None, dtype(of))


def rotation(batch=1, heads=8, kv=4, d=64, slots=16, start=5, of="bfloat16", parts=2, normed=True, rows=8):
    """The operands of `rotate_and_store`; its padding rows are NaN."""
    random = np.random.default_rng([batch, heads, kv, d, parts])
    sums = random.normal(size=(parts, rows, (heads + 2 * kv) * d)).astype(np.float32)
    sums[:, batch:] = np.nan
    angles = random.uniform(0, 2 * np.pi, (batch, d // 2))
    sides = [random.uniform(0.5, 2, d).astype(dtype(of)) for _ in range(2)]
    return (
        jnp.asarray(sums if parts > 1 else sums.astype(dtype(of))),
        tuple(map(jnp.asarray, sides)) if normed else None,
        jnp.asarray(np.cos(angles).astype(dtype(of))),
        jnp.asarray(np.sin(angles).astype(dtype(of))),
        cache_of(batch, kv, d, slots, of, filled=slots),
        jnp.asarray(start, jnp.int32),
    )


def assert_rotation(operands, run=None) -> None:
    """Asserts that the kernel computes what the reference does, and leaves all other slots as they are."""
    run = run or hopper_rotate.rotate_and_store
    before = operands[4]
    q, cache = run(*operands, eps=EPS)
    want_q, want = reference.rotate_and_store(*operands, eps=EPS)
    bound = bounds.rotation(*operands, eps=EPS)
    assert q.dtype == want_q.dtype
    assert_close(q, want_q, bound.q)
    slot = int(np.clip(operands[5], 0, before.keys.shape[3] - 1))
    assert_close(cache.keys[..., slot], want.keys[..., slot], bound.keys)
    assert_close(cache.values[:, :, slot], want.values[:, :, slot], bound.values)
    for found, old in ((cache.keys, before.keys), (cache.values.swapaxes(2, 3), before.values.swapaxes(2, 3))):
        others = np.delete(np.arange(found.shape[3]), slot)
        np.testing.assert_array_equal(*(np.asarray(x)[..., others].view(np.uint16) for x in (found, old)))


def attention(batch=1, heads=4, kv=2, d=64, slots=192, length=130, of="bfloat16", left=0):
    """The operands of `attend`: `length` filled slots, of which `left + i` at the left are empty in sequence i."""
    random = np.random.default_rng([batch, heads, kv, d, slots, length])
    q = jnp.asarray(random.normal(size=(batch, heads, d)).astype(dtype(of)))
    positions = np.full((batch, slots), EMPTY, np.int32)
    queries = np.zeros(batch, np.int32)
    for i in range(batch):
        first = min(left + i, length - 1) if left else 0
        positions[i, first:length] = np.arange(length - first)
        queries[i] = length - first - 1
    cache = cache_of(batch, kv, d, slots, of, length)
    return q, cache, jnp.asarray(queries), jnp.asarray(positions), jnp.asarray(length, jnp.int32)


def clean(cache: LayerCache) -> LayerCache:
    """The cache with zeros for NaN, of which the reference makes NaN even where the weight is 0."""
    return jax.tree.map(lambda x: jnp.where(jnp.isnan(x), jnp.zeros((), x.dtype), x), cache)


def assert_attention(operands, window=None, narrow=False, rows=8, run=None) -> None:
    """Asserts that the kernels compute what the reference does, with zeros in the rows of padding."""
    q, cache, *rest = operands
    run = run or hopper_attention.attend
    found = run(q, cache, *rest, rows=rows, window=window, narrow=narrow)
    plain = q, clean(cache), *rest
    want = reference.attend(*plain, rows=rows, window=window, narrow=False)[0]
    bound = bounds.attention(*plain, rows=rows, window=window)
    values, scales = found
    if not narrow:
        assert scales is None
        assert values.dtype == want.dtype
        assert_close(values, want, bound)
        assert not np.asarray(values[q.shape[0] :]).any()
        return
    assert values.dtype == dtype("float8_e4m3fn")
    assert scales.shape == (want.shape[1] // 128, max(rows, reference.SCALES))
    assert (np.asarray(scales)[:, q.shape[0] :] == 1).all()
    wide, limit = bounds.dequantized(values, scales, want, bound)
    assert_close(wide, want, limit)
    amax = np.abs(np.asarray(want, np.float64)).reshape(rows, -1, 128).max(axis=2)
    margin = np.asarray(bound).reshape(rows, -1, 128).max(axis=2)
    here = np.asarray(scales, np.float64).T[: q.shape[0]]
    assert (np.abs(here * 448 - amax[: q.shape[0]]) <= margin[: q.shape[0]] + amax[: q.shape[0]] * 2.0**-20).all()


def assert_close(found, want, bound) -> None:
    found, want, bound = (np.asarray(x).astype(np.float64) for x in (found, want, bound))
    assert found.shape == want.shape
    error = np.abs(found - want)
    assert (error <= bound).all(), f"{error.max()} at {np.argwhere(~(error <= bound))[0]}"
