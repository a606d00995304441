"""The native attention over a cache: float64 within derived bounds, the same bits in every company, where it runs."""

import ctypes
import dataclasses
import hashlib
import os
import subprocess
import sys

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from perparam.models import attention, cpu_attention
from perparam.models.kv_cache import EMPTY, LayerCache
from perparam.policies.native import library
from perparam.policies.targets import Target

if library.unavailable() is not None:
    pytest.skip(f"native kernels: {library.unavailable()}", allow_module_level=True)

BF16, F32, F16, INT8, F8, F8_WIDE = map(
    np.dtype,
    (ml_dtypes.bfloat16, np.float32, np.float16, np.int8, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
)
ROUNDING = {F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8}
"""Largest relative rounding error of a normal number."""

U, CHUNK, SPAN = ROUNDING[F32], 64, 1024

CASES = [(F32, F32), (F32, INT8), (F32, F8), (F16, F16), (F16, F8_WIDE), (BF16, BF16), (BF16, F32), (BF16, F16)]
CASES += [(BF16, INT8), (BF16, F8), (BF16, F8_WIDE)]


def numbers(array, dtype):
    """Stored keys or values in float64."""
    array = np.asarray(array)
    return (array.view(dtype) if array.dtype == np.uint8 else array).astype(np.float64)


def exact(q, cache, queries, slots, window):
    """`(result, bound)`: attention in float64 of a query that sees something, NaN for others; and of its error.

    With A the sum of |q k| of a score, times its scales, and u the rounding of float32:
    score      d + 4 roundings of at most A
    weight     exp of a difference of two scores: another 2 A u, and 2 u for exp itself
    rescaling  once a chunk and once a span, by such a weight
    sums       of as many terms as there are slots, in the numerator and the denominator
    Relative errors of weights reach the result twice, in both; by those instructions that multiply pairs of bfloat16,
    weights in the numerator are rounded to bfloat16.  Weights below exp(-87) are 0.  The result is rounded as well.
    """
    b, t, heads, d = q.shape
    kv, s = cache.keys.shape[1], cache.keys.shape[3]
    k, v = numbers(cache.keys, cache.dtype), numbers(cache.values, cache.dtype)
    ones = np.ones((b, kv, s))
    key_scales, value_scales = (
        ones if x is None else np.asarray(x, np.float64) for x in (cache.key_scales, cache.value_scales)
    )
    v = v * value_scales[..., None]
    wide = np.asarray(q).astype(np.float64).reshape(b, t, kv, heads // kv, d)
    scale = d**-0.5 * key_scales[:, :, None, None]
    scores = np.einsum("btkgd,bkds->bkgts", wide, k) * scale
    sizes = np.einsum("btkgd,bkds->bkgts", np.abs(wide), np.abs(k)) * scale
    distance = queries[:, :, None].astype(np.int64) - slots[:, None, :]
    seen = ((distance >= 0) & (distance < (window or 2**31)))[:, None, None]
    any_seen = seen.any(axis=-1, keepdims=True)
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - np.where(any_seen, scores.max(axis=-1, keepdims=True), 0))
    weights = weights / np.where(any_seen, weights.sum(axis=-1, keepdims=True), np.nan)
    largest = np.where(seen, sizes, 0).max(axis=-1)
    steps = s // CHUNK + s // SPAN + 4
    error = (d + 6) * U * largest + steps * (2 * U * largest + 4 * U) + (s + 4) * U
    relative = 2.1 * error + (ROUNDING[BF16] if q.dtype == BF16 else 0)
    size = np.einsum("bkgts,bksd->bkgtd", weights, np.abs(v))
    smallest = 1e-37 * np.abs(v).max() + (2.0**-25 if q.dtype == F16 else 1e-37)
    result = np.einsum("bkgts,bksd->bkgtd", weights, v)
    bound = size * relative[..., None] + 1.01 * ROUNDING[q.dtype] * np.abs(result) + smallest
    return tuple(x.transpose(0, 3, 1, 2, 4).reshape(b, t, heads * d) for x in (result, bound))


def inputs(shape, dtype, stored, seed=0, size=1.0):
    """`(q, cache)` of shape (b, t, kv, group, d, slots)."""
    b, t, kv, group, d, slots = shape
    rng = np.random.default_rng(seed)
    q = jnp.asarray((size * rng.normal(size=(b, t, kv * group, d))).astype(dtype))
    k, v = (jnp.asarray(rng.normal(size=(b, slots, kv, d)).astype(F32)) for _ in range(2))
    return q, LayerCache.of(k, v, stored)


def in_order(b, t, slots, filled=None, padding=0):
    """`(queries, slots)`: t tokens at the end of `filled` slots, of which the first `padding` are empty."""
    filled = slots if filled is None else filled
    positions = np.full((b, slots), EMPTY, np.int32)
    positions[:, padding:filled] = np.arange(filled - padding)
    return np.tile(np.arange(filled - padding - t, filled - padding, dtype=np.int32), (b, 1)), positions


def check(q, cache, queries, slots, window):
    found = np.asarray(cpu_attention.attend(q, cache, jnp.asarray(queries), jnp.asarray(slots), window))
    assert found.dtype == q.dtype
    result, bound = exact(q, cache, queries, slots, window)
    blind = np.isnan(result)
    assert (found[blind] == 0).all()
    ratio = np.where(blind, 0, np.abs(found.astype(np.float64) - result) / np.where(blind, 1, bound))
    assert ratio.max() <= 1
    return ratio.max()


@pytest.mark.parametrize(("dtype", "stored"), CASES)
@pytest.mark.parametrize("shape", [(2, 1, 2, 2, 128, 1100), (1, 70, 2, 3, 64, 150), (2, 9, 1, 1, 7, 33)])
def test_errors_are_within_their_bound(dtype, stored, shape):
    q, cache = inputs(shape, dtype, stored)
    b, t, *_, slots = shape
    check(q, cache, *in_order(b, t, slots, padding=3), None)


@pytest.mark.parametrize(("dtype", "part"), [(F32, 1 / 200), (BF16, 1 / 8)])
def test_the_bound_is_not_loose(dtype, part):
    """What happens with short sums is at least a part of what may happen."""
    q, cache = inputs((1, 8, 1, 2, 8, 16), dtype, dtype)
    assert check(q, cache, *in_order(1, 8, 16), None) >= part


@st.composite
def calls(draw):
    """Shapes, positions in any order with empty slots among them, and a window."""
    b, kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 5))
    t, d = draw(st.sampled_from([1, 2, 5, 33, 100])), draw(st.sampled_from([1, 3, 8, 40, 64, 128, 160]))
    slots = draw(st.sampled_from([1, 2, 63, 64, 65, 200, 1024, 1100]))
    window = draw(st.sampled_from([None, 1, 7, 64, 300]))
    seed = draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    positions = np.tile(np.arange(slots, dtype=np.int32), (b, 1))
    if draw(st.booleans()):
        positions = rng.permuted(positions, axis=1)
    positions[rng.random((b, slots)) < draw(st.sampled_from([0, 0.1, 0.9]))] = EMPTY
    queries = rng.integers(0, slots + 3, (b, t)).astype(np.int32)
    if draw(st.booleans()):
        queries.sort(axis=1)
    return (b, t, kv, group, d, slots), queries, positions, window, seed


@hypothesis.given(call=calls(), case=st.sampled_from(CASES), size=st.sampled_from([0.1, 1.0, 8.0]))
def test_any_shape_window_and_padding(call, case, size):
    shape, queries, slots, window, seed = call
    check(*inputs(shape, *case, seed, size), queries, slots, window)


BITS = [(F32, F32), (F16, F16), (BF16, BF16), (BF16, INT8), (BF16, F8), (F32, F8)]


def bits(q, cache, queries, slots, window):
    return np.asarray(cpu_attention.attend(q, cache, jnp.asarray(queries), jnp.asarray(slots), window))


@pytest.mark.parametrize(("dtype", "stored"), BITS)
@pytest.mark.parametrize("window", [100, pytest.param(None, marks=pytest.mark.slow)])
def test_a_query_alone_has_the_bits_of_a_prefill(dtype, stored, window):
    """Also where the prefill has blocks of several queries, and chunks that only some of them see."""
    q, cache = inputs((2, 130, 2, 2, 64, 1300), dtype, stored)
    queries, slots = in_order(2, 130, 1300, filled=1200, padding=5)
    whole = bits(q, cache, queries, slots, window)
    for at in (0, 1, 63, 64, 129):
        one = slice(at, at + 1)
        np.testing.assert_array_equal(bits(q[:, one], cache, queries[:, one], slots, window), whole[:, one])
    some = slice(3, 12)
    np.testing.assert_array_equal(bits(q[:, some], cache, queries[:, some], slots, window), whole[:, some])


@pytest.mark.parametrize(("dtype", "stored"), BITS)
@pytest.mark.parametrize("t", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_row_alone_has_the_bits_of_a_batch(dtype, stored, t):
    q, cache = inputs((3, t, 2, 2, 64, 200), dtype, stored)
    queries, slots = in_order(3, t, 200)
    queries[1] -= 30
    slots[2, :40] = EMPTY
    whole = bits(q, cache, queries, slots, None)
    for row in range(3):
        one = slice(row, row + 1)
        alone = jax.tree.map(lambda x, one=one: x[one], cache)
        np.testing.assert_array_equal(bits(q[one], alone, queries[one], slots[one], None), whole[one])


@pytest.mark.parametrize(("dtype", "stored"), BITS)
@pytest.mark.parametrize("t", [1, pytest.param(40, marks=pytest.mark.slow)])
def test_empty_slots_change_no_bits(dtype, stored, t):
    q, cache = inputs((1, t, 2, 2, 64, 3000), dtype, stored)
    found = []
    for slots in (117, 118, 128, 1024, 3000):
        part = dataclasses.replace(
            cache,
            keys=cache.keys[..., :slots],
            values=cache.values[:, :, :slots],
            key_scales=None if cache.key_scales is None else cache.key_scales[..., :slots],
            value_scales=None if cache.value_scales is None else cache.value_scales[..., :slots],
        )
        found.append(bits(q, part, *in_order(1, t, slots, filled=117), None))
    for one in found[1:]:
        np.testing.assert_array_equal(one, found[0])


def test_slots_that_no_query_sees_are_not_read():
    """A chunk with NaN, which would reach the result."""
    q, cache = inputs((1, 1, 1, 2, 64, 256), F32, F32)
    queries, slots = in_order(1, 1, 256, filled=128)
    expected = bits(q, cache, queries, slots, None)
    cache = dataclasses.replace(
        cache, keys=cache.keys.at[..., 128:].set(jnp.nan), values=cache.values.at[:, :, 128:].set(jnp.nan)
    )
    np.testing.assert_array_equal(bits(q, cache, queries, slots, None), expected)
    assert np.isnan(bits(q, cache, queries, np.where(slots == EMPTY, 0, slots), None)).all()


@pytest.mark.parametrize("stored", [F32, INT8])
def test_a_nan_that_is_seen_is_seen(stored):
    q, cache = inputs((1, 3, 1, 2, 64, 100), F32, stored)
    queries, slots = in_order(1, 3, 100)
    found = bits(q.at[0, 1, 0, 5].set(jnp.nan), cache, queries, slots, None).reshape(3, 2, 64)
    assert np.isnan(found[1, 0]).all()
    assert np.isfinite(found[[0, 2]]).all()
    assert np.isfinite(found[1, 1]).all()


def test_exp_is_within_one_ulp():
    """Within two where there is no FMA, which rounds once.

    Of all float32 from -0 to -88, one in 997; and at the bound below which it is 0.
    """
    x = np.arange(0x80000000, 0xC2B00000, 997, dtype=np.uint32).view(F32)
    x = np.append(x, np.float32([0, -87, -1e30, -np.inf]))
    y = np.full_like(x, np.nan)
    function = ctypes.CDLL(str(library._path())).perparam_exponential
    pointers = (array.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) for array in (x, y))
    function(ctypes.c_int64(x.size), *pointers)
    expected = np.exp(x.astype(np.float64))
    kept = x >= -87
    assert (y[~kept] == 0).all()
    ulp = np.spacing(expected[kept].astype(F32)).astype(np.float64)
    assert (np.abs(y[kept] - expected[kept]) / ulp).max() <= (2 if library.instructions() == "scalar" else 1)
    assert y[x == 0].tolist() == [1, 1]


DIGEST = """
import hashlib, sys
sys.path[:0] = {paths!r}
import test_cpu_attention as tests
print(tests.digest())
"""


def digest():
    """A hash of results whose spans are divided among threads, and of those whose blocks are."""
    total = hashlib.sha256()
    for dtype, stored in BITS:
        for shape in ((1, 1, 2, 2, 64, 3100), (2, 150, 2, 2, 64, 1100), (1, 3, 1, 2, 64, 64)):
            q, cache = inputs(shape, dtype, stored)
            total.update(bits(q, cache, *in_order(shape[0], shape[1], shape[-1]), None).tobytes())
    return total.hexdigest()


def python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "threads",
    [pytest.param(3, marks=pytest.mark.slow), *(pytest.param(n, marks=pytest.mark.thorough) for n in (1, 8))],
)
def test_bits_do_not_depend_on_threads(threads):
    """NPROC is the number of threads of XLA's pool."""
    found = python(DIGEST.format(paths=[os.path.dirname(__file__), *sys.path]), NPROC=str(threads))
    assert found.splitlines()[-1] == digest()


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["scalar", "avx512", "avx2"])
def test_every_instruction_set(name):
    if library.instructions() == name:
        pytest.skip("it is the one of the other tests")
    options = ["-q", "-n", "0", "-m", "not slow and not thorough", __file__]
    code = f"import pytest; raise SystemExit(pytest.main({options!r}))"
    assert "passed" in python(code, PERPARAM_CPU=name)


def attends(queries, slots, window=None):
    return lambda q, cache: attention.attend(q, cache, jnp.asarray(queries), jnp.asarray(slots), window)[0]


@pytest.fixture
def call():
    """`(attend, q, cache)`."""
    q, cache = inputs((2, 5, 2, 2, 16, 40), F32, F32)
    return attends(*in_order(2, 5, 40)), q, cache


def test_a_program_for_a_cpu_has_it(call):
    attend, q, cache = call
    assert "perparam_attention" in jax.jit(attend).lower(q, cache).as_text()


def test_exported_programs_do_not(call):
    attend, q, cache = call
    exported = jax.export.export(jax.jit(lambda q: attend(q, cache)))(q)
    assert "perparam_attention" not in exported.mlir_module()
    np.testing.assert_allclose(exported.call(q), attend(q, cache), atol=1e-5)


@pytest.mark.slow
def test_derivatives_and_batches_are_those_over_slots(call, monkeypatch):
    attend, q, cache = call
    # Linear in the result, which is the kernel's own.
    towards = jnp.sin(attend(q, cache))

    def all_of_them():
        loss = lambda q, cache: jnp.sum(attend(q, cache) * towards)  # noqa: E731
        gradients = jax.grad(loss, (0, 1), allow_int=True)(q, cache)
        tangents = jax.jvp(lambda q: attend(q, cache), (q,), (jnp.cos(q),))[1]
        batched = jax.vmap(lambda q: attend(q, cache))(jnp.stack([q, -q]))
        return jax.tree.leaves((gradients, tangents, batched))

    found = all_of_them()
    monkeypatch.setattr(cpu_attention, "refuses", lambda *_: "not now")
    for one, other in zip(found, all_of_them(), strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.abs(other).max() > 1e-3


def test_weights_are_those_it_mixes_by(call):
    _, q, cache = call
    mixed, weights = attention.attend(q, cache, *map(jnp.asarray, in_order(2, 5, 40)), None)
    weights = np.asarray(weights(), np.float64).reshape(2, 2, 2, 5, 40)
    by_hand = np.einsum("bkgts,bksd->btkgd", weights, np.asarray(cache.values, np.float64))
    np.testing.assert_allclose(mixed, by_hand.reshape(2, 5, -1), atol=1e-5)


def test_what_it_refuses(call):
    _, q, cache = call
    here = Target("cpu")
    assert cpu_attention.refuses(here, q, cache) is None
    assert cpu_attention.refuses(Target("cuda"), q, cache) == "it is for CPUs"
    assert "queries are int32" in cpu_attention.refuses(here, q.astype(jnp.int32), cache)
    assert "or 0" in cpu_attention.refuses(here, q[:, :0], cache)


@pytest.mark.slow
def test_within_shard_map_it_has_the_same_bits(call):
    attend, q, cache = call
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    mapped = jax.jit(jax.shard_map(lambda q, cache: attend(q, cache), mesh=mesh, in_specs=spec, out_specs=spec))
    assert "perparam_attention" in mapped.lower(q, cache).as_text()
    np.testing.assert_array_equal(mapped(q, cache), attend(q, cache))


@pytest.mark.parametrize("t", [1, 3, 40])
def test_a_query_that_sees_no_slot_has_zero_whatever_the_call_before_left_in_memory(t):
    q, cache = inputs((2, t, 2, 2, 64, 128), F32, F32)
    unseen = np.full((2, 128), EMPTY, np.int32)
    queries, slots = in_order(2, t, 128)
    nan = dataclasses.replace(cache, values=jnp.full_like(cache.values, jnp.nan))
    for _ in range(5):
        assert np.isnan(np.asarray(cpu_attention.attend(q, nan, jnp.asarray(queries), jnp.asarray(slots), None))).all()
        blind = cpu_attention.attend(q, cache, jnp.asarray(queries), jnp.asarray(unseen), None)
        np.testing.assert_array_equal(np.asarray(blind), np.zeros(q.reshape(2, t, -1).shape))
