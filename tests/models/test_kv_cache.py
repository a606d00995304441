"""The policy's `kv_cache` slot: what it may be, what is kept under each dtype, and how much that changes logits."""

import dataclasses
import functools
import json

import checkpoints
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import BF16, F8, fields, relative_error, tensors, write
from flax import nnx

import perparam
from perparam import Policy, generate
from perparam.generation import GenerationConfig
from perparam.models import attention, cpu_attention, generate_with_logprobs
from perparam.models.kv_cache import EMPTY, LayerCache
from perparam.policies import InvalidPolicy, PerparamError, UnknownDtype

FLOAT32 = 2**-24
"""The relative error of a float32 operation."""

HALF_STEP = {F8: 2**-4, np.dtype(np.int8): 1 / 254}
"""What rounding adds: of e4m3's three bits half the last, relative to the value; of int8 half a step, relative to the
largest value of the head and token."""

SMALLEST = 2**-10
"""Half the last bit of e4m3's subnormal numbers, in units of the scale, which is amax / 448."""

IDS = np.array([[3, 14, 15, 9, 26, 5, 35, 8], [60, 60, 9, 7, 1, 2, 3, 4]], np.int32)
MASK = np.array([[1] * 8, [0, 0, 1, 1, 1, 1, 1, 1]], bool)
F16, INT8 = np.dtype(np.float16), np.dtype(np.int8)
NARROW = ["f8_e4m3fn", "int8"]
EVERY = ["f32", "bf16", "f16", *NARROW]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = fields(use_sliding_window=True, sliding_window=3, max_window_layers=1)
    return write(tmp_path_factory.mktemp("small"), config, tensors(config))


@pytest.fixture(scope="module")
def models(folder):
    """Models by the dtype of their cache; the first computes in float32."""
    exact = perparam.load_model(folder, Policy(compute="f32"))
    return {kept: exact.with_policy(Policy(compute="f32", kv_cache=kept)) for kept in (None, *EVERY)}


# The slot.


@pytest.mark.parametrize("name", EVERY)
def test_the_slot_is_read_written_and_shown(name):
    policy = Policy("bf16", kv_cache=name)
    assert Policy.loads(f"params: bf16\nkv_cache: {name}\n") == policy
    assert Policy.parse(f"p=bf16,kv_cache={name}") == policy
    assert Policy.loads(policy.dumps()) == policy
    assert eval(repr(policy)) == policy
    assert repr(policy) == f"Policy(params='bf16', kv_cache='{name}')"
    assert f"kv_cache: {name}\n" in policy.dumps()
    assert policy != Policy("bf16")
    assert hash(policy) == hash(Policy("bf16", kv_cache=policy.kv_cache))


def test_without_the_slot_nothing_is_written():
    assert Policy().kv_cache is None
    for policy in (Policy("bf16"), Policy("bf16", kv_cache=None), Policy.loads("params: bf16\nkv_cache: null")):
        assert policy == Policy("bf16")
        assert "kv_cache" not in repr(policy) + policy.dumps()


def test_dtypes_and_their_names_are_taken():
    for dtype in (np.int8, jnp.int8, "int8", np.dtype("int8")):
        assert Policy(kv_cache=dtype).kv_cache == np.int8
    for dtype in (jnp.float8_e4m3fn, ml_dtypes.float8_e4m3fn, "float8_e4m3fn"):
        assert Policy(kv_cache=dtype).kv_cache == F8


@pytest.mark.parametrize(
    "dtype", ["f8_e5m2", "float8_e4m3fnuz", "f64", "int16", "int32", "uint8", "int4", "bool", "complex64", "nonsense"]
)
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(UnknownDtype, match="kv_cache"):
        Policy(kv_cache=dtype)
    with pytest.raises(UnknownDtype, match=r"p\.yaml:2: kv_cache"):
        Policy.loads(f"params: bf16\nkv_cache: {dtype}\n", "p.yaml")


@pytest.mark.parametrize("value", ["{kernel: bf16}", "[bf16]", "3"])
def test_what_is_no_dtype_is_refused(value):
    with pytest.raises(PerparamError, match=r"p\.yaml:1: .*kv_cache"):
        Policy.loads(f"kv_cache: {value}\n", "p.yaml")
    with pytest.raises(InvalidPolicy, match="kv_cache is written twice"):
        Policy.parse("kv_cache=bf16,kv_cache=f32")


@pytest.mark.parametrize("name", [None, *EVERY])
def test_a_plan_says_what_a_token_takes(models, name):
    """Two layers of two kv heads of 18 keys and 18 values, with two scales a head and token where they are narrow."""
    model = models[name]
    plan = model.policy.explain(model)
    dtype = {None: "f32"}.get(name, name)
    width = {"f32": 4, "bf16": 2, "f16": 2}.get(dtype, 1)
    scales = 2 * 2 * 2 * 4 if dtype in NARROW else 0
    assert plan.kv_bytes == 2 * 2 * (2 * 18) * width + scales
    assert plan.kv_cache == model.kv_cache
    cache = model.empty_cache(3, 5)
    held = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
    assert sum(array.nbytes for array in jax.tree.leaves(held)) == plan.kv_bytes * 3 * 5
    assert f"kv cache {dtype}, {plan.kv_bytes} B a token" in str(plan)
    said = json.loads(plan.to_json())
    assert (said["kv_cache"], said["kv_bytes"]) == (dtype, plan.kv_bytes)


def test_a_plan_of_what_keeps_nothing_says_nothing():
    plan = Policy("bf16", "bf16", kv_cache="int8").explain({"dense": {"kernel": np.ones((4, 4), np.float32)}})
    assert plan.kv_cache is None
    assert plan.kv_bytes == 0
    assert "kv cache" not in str(plan)


def test_a_model_without_a_cache_rounds_keys_and_values_only(models):
    config = dataclasses.replace(models[None].config, task="feature_extraction", dtype=BF16)
    model = nnx.eval_shape(lambda: type(models[None])(config, policy=Policy(kv_cache="int8"), rngs=nnx.Rngs(0)))
    plan = model.policy.explain(model)
    assert (plan.kv_cache, plan.kv_bytes, plan.unused) == ("int8", 0, ())
    assert str(plan).endswith("output bf16, keys and values int8")
    for text in (str(Policy().explain(model)), repr(model)):
        assert "kv cache" not in text
        assert "keys and values int8" not in text


def test_init_accepts_a_cache_dtype_for_a_module_that_has_a_model(models):
    class Head(nnx.Module):
        def __init__(self, *, policy, rngs):
            self.model = type(models[None])(models[None].config, policy=policy.at("model"), rngs=rngs)

    assert jax.eval_shape(lambda: perparam.init(Head, Policy(kv_cache="int8"), jax.random.key(0)))


def test_a_checkpoints_plan_is_the_models(folder, models):
    for name in (None, "int8"):
        policy = Policy(compute="f32", kv_cache=name)
        assert policy.explain(perparam.checkpoint_tree(folder)).kv_bytes == policy.explain(models[None]).kv_bytes


# What is kept.


def keys_and_values(dtype=np.float32, seed=0, shape=(2, 7, 3, 18)):
    """Of all sizes, from head to head, token to token and within."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(2):
        sizes = 10.0 ** rng.uniform(-3, 3, (*shape[:3], 1))
        made.append((sizes * rng.normal(size=shape) * 10 ** rng.uniform(-2, 0, shape)).astype(dtype))
    return made


def widened(kept):
    """Keys and values (b, t, kv, d) in float64, as attention takes them."""
    k, v = (np.asarray(kept.typed(held)).astype(np.float64) for held in (kept.keys, kept.values))
    if kept.key_scales is not None:
        k = k * np.asarray(kept.key_scales, np.float64)[:, :, None]
        v = v * np.asarray(kept.value_scales, np.float64)[..., None]
    return k.transpose(0, 3, 1, 2), v.transpose(0, 2, 1, 3)


@pytest.mark.parametrize("dtype", [F8, np.dtype(np.int8)], ids=str)
@pytest.mark.parametrize("given", [np.float32, BF16], ids=["f32", "bf16"])
def test_narrow_values_are_off_by_half_a_step(dtype, given):
    exact = keys_and_values(given)
    kept = LayerCache.of(*map(jnp.asarray, exact), dtype)
    assert kept.typed(kept.keys).dtype == kept.typed(kept.values).dtype == kept.dtype == dtype
    assert kept.keys.dtype.itemsize == kept.values.dtype.itemsize == 1
    assert kept.key_scales.dtype == kept.value_scales.dtype == np.float32
    assert kept.key_scales.shape == kept.value_scales.shape == (2, 3, 7)
    for found, wide in zip(widened(kept), exact, strict=True):
        wide = wide.astype(np.float64)
        amax = np.abs(wide).max(axis=-1, keepdims=True)
        if dtype == F8:
            bound = np.maximum(HALF_STEP[dtype] * np.abs(wide), SMALLEST * amax / 448)
        else:
            bound = HALF_STEP[dtype] * amax
        # The division by the scale is rounded too, and may move a value over the middle between two steps.
        assert (np.abs(found - wide) <= bound + 4 * FLOAT32 * amax).all()
        assert (np.abs(found - wide) > bound / 4).any()
        largest = np.abs(wide) == amax
        np.testing.assert_allclose(found[largest], wide[largest], rtol=4 * FLOAT32)


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16], ids=["f32", "bf16", "f16"])
def test_wide_values_are_rounded_plainly(dtype):
    exact = keys_and_values()
    kept = LayerCache.of(*map(jnp.asarray, exact), np.dtype(dtype))
    assert kept.key_scales is kept.value_scales is None
    for found, wide in zip(widened(kept), exact, strict=True):
        np.testing.assert_array_equal(found, wide.astype(dtype).astype(np.float64))


def test_a_value_beyond_float16_is_its_largest():
    k = jnp.full((1, 1, 1, 2), 1e6)
    kept = LayerCache.of(k, -k, np.dtype(np.float16))
    assert (np.asarray(kept.keys) == 65504).all()
    assert (np.asarray(kept.values) == -65504).all()


@pytest.mark.parametrize("dtype", [F8, np.dtype(np.int8)], ids=str)
def test_a_large_key_disturbs_no_other_token_and_no_other_head(dtype):
    k, v = keys_and_values()
    before = LayerCache.of(jnp.asarray(k), jnp.asarray(v), dtype)
    k[1, 3, 2, 5], v[0, 2, 1, 7] = 1e6, -1e6
    after = LayerCache.of(jnp.asarray(k), jnp.asarray(v), dtype)
    for old, new, changed in (
        (before.keys, after.keys, (1, 2, slice(None), 3)),
        (before.values, after.values, (0, 1, 2)),
        (before.key_scales, after.key_scales, (1, 2, 3)),
        (before.value_scales, after.value_scales, (0, 1, 2)),
    ):
        same = np.asarray(old).astype(np.float32) == np.asarray(new).astype(np.float32)
        assert not same[changed].all()
        same[changed] = True
        assert same.all()


@pytest.mark.parametrize("dtype", [F8, np.dtype(np.int8)], ids=str)
def test_zeros_stay_zeros_and_tiny_values_stay_finite(dtype):
    zeros = jnp.zeros((1, 2, 1, 4))
    kept = LayerCache.of(zeros, zeros, dtype)
    for found in widened(kept):
        assert (found == 0).all()
    assert (np.asarray(kept.key_scales) > 0).all()
    tiny = jnp.asarray(np.full((1, 2, 1, 4), 1e-38, np.float32))
    for found in widened(LayerCache.of(tiny, -tiny, dtype)):
        assert np.isfinite(found).all()
        assert (np.abs(found) <= 2e-38).all()
    huge = jnp.full((1, 2, 1, 4), 3e38)
    for found in widened(LayerCache.of(huge, huge, dtype)):
        np.testing.assert_allclose(found, 3e38, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), F8, np.dtype(np.int8)], ids=str)
def test_new_tokens_go_into_their_slots_with_their_scales(dtype):
    old = LayerCache.of(*map(jnp.asarray, keys_and_values()), dtype)
    k, v = (jnp.asarray(x[:, :2]) for x in keys_and_values(seed=1))
    found = widened(old.put(LayerCache.of(k, v, dtype), 3))
    new = widened(LayerCache.of(k, v, dtype))
    for whole, before, piece in zip(found, widened(old), new, strict=True):
        np.testing.assert_array_equal(whole[:, 3:5], piece)
        np.testing.assert_array_equal(whole[:, :3], before[:, :3])
        np.testing.assert_array_equal(whole[:, 5:], before[:, 5:])


# What attention makes of it.


@pytest.mark.parametrize("dtype", [F8, np.dtype(np.int8)], ids=str)
@pytest.mark.parametrize("tokens", [1, 5])
def test_attention_is_that_over_the_widened_values(dtype, tokens):
    """Scales are applied after products: nothing is lost beside what the cache has lost."""
    rng = np.random.default_rng(3)
    k, v = (rng.normal(size=(2, 7, 3, 18)).astype(np.float32) for _ in range(2))
    q = jnp.asarray(rng.normal(size=(2, tokens, 6, 18)), jnp.float32)
    kept = LayerCache.of(jnp.asarray(k), jnp.asarray(v), dtype)
    queries = np.tile(np.arange(7 - tokens, 7, dtype=np.int32), (2, 1))
    slots = np.array([range(7), [EMPTY, 0, 1, 2, 3, 4, 5]], np.int32)
    found, _ = attention.attend(q, kept, queries, slots, 4)
    wide = LayerCache.of(*(jnp.asarray(x, jnp.float32) for x in widened(kept)), np.dtype(np.float32))
    expected, _ = attention.attend(q, wide, queries, slots, 4)
    assert relative_error(found, expected) <= 1e-6


# In the quick run each two of the three choices meet, but not all eight combinations.
@pytest.mark.parametrize(
    ("dtype", "kept_in", "room"),
    [
        pytest.param(dtype, kept_in, room, marks=() if quick else pytest.mark.slow, id=f"{dtype}-{kept_in}-{room}")
        for dtype, kept_in, room, quick in [
            (BF16, F8, 0, False), (BF16, F8, 16, False), (BF16, INT8, 0, False), (BF16, INT8, 16, True),
            (F16, F8, 0, True), (F16, F8, 16, False), (F16, INT8, 0, False), (F16, INT8, 16, False),
        ]
    ],
)  # fmt: skip
def test_small_shares_of_many_tokens_are_not_lost(dtype, kept_in, room):
    """4096 tokens with a 4096th each: times a value's scale, a share is far below what float16 can hold in full."""
    slots = 4096
    rng = np.random.default_rng(0)
    v = (0.1 * (1 + 0.5 * rng.uniform(size=(1, slots, 1, 8)))).astype(dtype)
    kept = LayerCache.of(jnp.zeros((1, slots, 1, 8), dtype), jnp.asarray(v), kept_in)
    expected = widened(kept)[1].mean(axis=1).reshape(1, 1, 8).repeat(2, axis=1)
    empty = jnp.zeros((1, slots + room, 1, 8), dtype)
    kept = LayerCache.of(empty, empty, kept_in).put(kept, 0)
    positions = np.concatenate([np.arange(slots), np.full(room, EMPTY)]).astype(np.int32)[None]
    q = jnp.ones((1, 2, 1, 8), dtype)
    found, _ = attention.attend(q, kept, np.full((1, 2), slots, np.int32), positions, None)
    # The shares and the result are each rounded once.
    assert relative_error(found, expected) <= 2 * 2.0 ** -(8 if dtype == BF16 else 11)


@functools.partial(jax.jit, static_argnums=0)
def step(graphdef, state, ids, mask, cache):
    model = nnx.merge(graphdef, state)
    hidden, cache = model.hidden(ids, mask, cache)
    return model.logits(hidden), cache


@functools.cache
def fed(model):
    """Its logits of IDS in pieces, through a cache."""
    cache, logits = model.empty_cache(2, 11), []
    for piece in (slice(0, 6), slice(6, 7), slice(7, 8)):
        found, cache = step(*nnx.split(model), IDS[:, piece], MASK[:, piece], cache)
        logits.append(found)
    return np.concatenate(logits, axis=1)


LOGIT_ERROR = {"f32": 1e-5, "bf16": 2**-7, "f16": 2**-10, "f8_e4m3fn": 2**-3, "int8": 2**-5}
"""Relative, of all logits. Keys and values are off by up to 2**-8, 2**-11 and 2**-4 of what they are, or 1/254 of their
largest, some 2**-6 of most: these bounds are twice that, since scores and mixtures are sums of such errors, which are
independent, and two layers add theirs."""


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_logits_are_off_as_little_as_the_cache_is(models, name):
    exact = checkpoints.logits(models[None], IDS, MASK)
    found = fed(models[name])
    error = relative_error(found, exact, MASK)
    assert error <= LOGIT_ERROR[name]
    assert name == "f32" or error > LOGIT_ERROR[name] / 100


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "f8_e4m3fn"])
def test_without_a_cache_a_call_sees_what_a_cache_would_keep(models, name):
    """So that log-probabilities of a full pass are those of generation."""
    whole = checkpoints.logits(models[name], IDS, MASK)
    assert relative_error(fed(models[name]), whole, MASK) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("activations", [BF16, np.dtype(np.float16)], ids=str)
def test_the_activations_dtype_is_exact(monkeypatch, folder, activations):
    """What is kept in the dtype it was made in, or a wider one, is bit for bit what is kept without the slot.

    Of XLA's attention: the native kernel does not round the weights of attention for a wider cache.
    """
    monkeypatch.setattr(cpu_attention, "refuses", lambda *_: "for another device")
    plain = perparam.load_model(folder, Policy(compute=activations))
    for name in (activations, "f32"):
        model = plain.with_policy(Policy(compute=activations, kv_cache=name))
        assert model.empty_cache(1, 4).dtype == model.kv_cache
        np.testing.assert_array_equal(
            checkpoints.logits(model, IDS, MASK).astype(np.float32),
            checkpoints.logits(plain, IDS, MASK).astype(np.float32),
        )


# Generation.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", pytest.param("f8_e4m3fn", marks=pytest.mark.slow)])
def test_generation_under_a_narrow_cache_is_that_of_full_passes(models, name):
    model = models[name]
    answer = generate_with_logprobs(model, IDS, MASK, GenerationConfig(6, eos_token_id=(), logprobs=0))
    every = np.concatenate([np.where(MASK, IDS, 0), answer.tokens], axis=1)
    logits = checkpoints.logits(model, every, np.concatenate([MASK, np.ones((2, 6), bool)], axis=1))[:, 7:-1]
    np.testing.assert_array_equal(answer.tokens, logits.argmax(axis=-1))
    shares = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=-1, keepdims=True))
    expected = np.take_along_axis(shares, answer.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(answer.logprobs, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_prefix_is_kept_in_the_caches_dtype(models):
    prefix = perparam.generation.prefill(models["int8"], IDS, MASK)
    assert {array.dtype for array in (*prefix.cache.keys, *prefix.cache.values)} == {np.dtype(np.int8)}
    both = generate(models["int8"], prefix, None, 4, eos_token_id=(), num_return_sequences=2)
    np.testing.assert_array_equal(both, np.repeat(generate(models["int8"], IDS, MASK, 4, eos_token_id=()), 2, axis=0))
