"""cuDNN's flash attention: what it is given, against attention over slots; nothing here runs on a GPU."""

import functools

import jax
import jax.extend
import jax.interpreters.mlir
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import relative_error
from flax import nnx

from perparam import Policy
from perparam.models import Qwen3, Qwen3Config, attention, by_platform, flash, generation
from perparam.models.generation import programs
from perparam.models.kv_cache import EMPTY, LayerCache, token_positions
from perparam.models.tokens import padding_last
from perparam.policies.matmul import matmul_override
from perparam.policies.matmul.dispatch import Target

HOPPER = Target("cuda", (9, 0))
BF16, F16, F32 = (np.dtype(dtype) for dtype in (ml_dtypes.bfloat16, np.float16, np.float32))
LENGTH, HEADS, KV, D = 37, 4, 2, 16
MASKS = {
    "left": np.arange(LENGTH) >= [[9], [0]],
    "right": np.arange(LENGTH) < [[30], [37]],
    "middle": ~((np.arange(LENGTH) > [[10], [36]]) & (np.arange(LENGTH) < [[14], [36]])),
    "one token": np.arange(LENGTH) == [[36], [3]],
}


def inputs(dtype):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(2, LENGTH, heads, D)).astype(dtype)) for heads in (HEADS, KV, KV)]


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 1, 7, LENGTH])
@pytest.mark.parametrize("padding", MASKS)
def test_it_is_attention_over_slots(padding, window):
    """With JAX's plain implementation of the same function in cuDNN's place."""
    mask, (q, k, v) = jnp.asarray(MASKS[padding]), inputs(np.float32)
    queries, slots = token_positions(mask, jnp.zeros(2, jnp.int32))
    expected, _ = attention.attend(q, LayerCache.of(k, v, F32), queries, slots, window)
    order, back = padding_last(mask)
    moved = [jnp.take_along_axis(x, order[:, :, None, None], axis=1) for x in (q, k, v)]
    found = flash.attend(*moved, jnp.take_along_axis(mask, order, axis=1), window, "xla")
    found = jnp.take_along_axis(found, back[:, :, None, None], axis=1).reshape(expected.shape)
    mask = np.asarray(mask)
    assert relative_error(found, expected, mask) <= 2e-6
    assert (np.asarray(found)[~mask] == 0).all()


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("window", [None, 7])
def test_with_a_mask_it_is_attention_over_slots(monkeypatch, window, chunk):
    """After a prefix, with slots that hold nothing, padding between tokens, and queries in chunks."""
    if chunk:
        monkeypatch.setattr(attention, "_chunk", lambda *_: chunk)
    monkeypatch.setattr(flash, "attend_masked", functools.partial(flash.attend_masked, implementation="xla"))
    q, k, v = inputs(np.float32)
    mask = jnp.asarray(MASKS["middle"])
    k, v = (jnp.pad(x, ((0, 0), (0, 11), (0, 0), (0, 0)), constant_values=7) for x in (k, v))
    _, slots = token_positions(mask, jnp.zeros(2, jnp.int32))
    slots = jnp.pad(slots, ((0, 0), (0, 11)), constant_values=EMPTY)
    queries = jnp.broadcast_to(jnp.arange(10, 30), (2, 20))
    call = q[:, :20], LayerCache.of(k, v, F32), queries, slots
    expected, _ = attention.attend(*call, window)
    found = attention._over_slots(functools.partial(attention._attend_by_flash, window), 4, *call)
    assert relative_error(found, expected) <= 2e-6


def test_rows_without_a_real_token_are_zero():
    q, k, v = inputs(BF16)
    found = flash.attend(q, k, v, jnp.zeros((2, LENGTH), bool), None, "xla")
    assert (np.asarray(found) == 0).all()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, None),
        ({"dtype": F16, "cache_dtype": F16}, None),
        ({"target": Target("cuda", (8, 0))}, None),
        ({"target": Target("cuda", (7, 5))}, "compute capability 8.0"),
        ({"target": Target("cuda")}, "compute capability 8.0"),
        ({"target": Target("cpu")}, "NVIDIA GPU"),
        ({"target": Target("rocm")}, "NVIDIA GPU"),
        ({"dtype": F32, "cache_dtype": F32}, "bf16 and f16"),
        ({"cache_dtype": np.dtype(np.int8)}, "another dtype"),
        ({"head_dim": 100}, "head_dim is 100"),
        ({"head_dim": 256}, "head_dim is 256"),
        ({"tokens": flash.LEAST - 1}, "fewer than"),
    ],
)
def test_what_it_takes(change, why):
    call = {"target": HOPPER, "tokens": 4096, "head_dim": 128, "dtype": BF16, "cache_dtype": BF16} | change
    found = flash.refuses(**call)
    assert found is None if why is None else why in found


CONFIG = Qwen3Config(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, pad_token_id=0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh():
    """No program that an earlier test has traced."""
    programs.prefill.clear_cache()
    yield
    programs.prefill.clear_cache()


@pytest.fixture
def calls(monkeypatch):
    """What flash attention was traced for; JAX's plain implementation stands in for cuDNN."""
    seen, real, real_masked = [], flash.attend, flash.attend_masked

    def attend(q, k, v, mask, window):
        seen.append(q.shape)
        return real(q, k, v, mask, window, "xla")

    def attend_masked(q, k, v, mask):
        seen.append((*q.shape, "masked"))
        return real_masked(q, k, v, mask, "xla")

    monkeypatch.setattr(flash, "attend", attend)
    monkeypatch.setattr(flash, "attend_masked", attend_masked)
    return seen


def lowered(policy, length, platforms):
    model = Qwen3(CONFIG, policy=policy, rngs=None)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, length), jnp.bool_)
    graphdef, state = nnx.split(model)
    with matmul_override(target="cuda:9.0"):
        traced = programs.prefill.trace(graphdef, state, ids, mask, length + 16)
    return traced.lower(lowering_platforms=platforms).as_text()


def scores(text, length):
    """Whether a program holds the scores of all queries over the cache."""
    return f"x{length}x{length + 16}xf32>" in text


def test_a_prompt_on_a_gpu_is_read_by_it(calls):
    text = lowered("bf16", flash.LEAST, ("cuda",))
    assert set(calls) == {(1, flash.LEAST, 4, 16)}
    assert len(calls) >= CONFIG.num_hidden_layers
    assert not scores(text, flash.LEAST)


@pytest.mark.parametrize(
    ("policy", "length", "platforms"),
    [
        ("bf16", flash.LEAST, ("cpu",)),
        ("bf16", flash.LEAST, ("cpu", "cuda")),
        ("bf16", flash.LEAST // 2, ("cuda",)),
        ("f32", flash.LEAST, ("cuda",)),
        (Policy(compute="bf16", kv_cache="f8_e4m3fn"), flash.LEAST, ("cuda",)),
    ],
    ids=["a CPU", "several platforms", "a short prompt", "float32", "a narrow cache"],
)
def test_others_are_read_over_slots(calls, policy, length, platforms):
    assert scores(lowered(policy, length, platforms), length)


def call_lowered(function, *arrays):
    """A program for a GPU, of a model that is called without a cache."""
    graphdef, state = nnx.split(Qwen3(CONFIG, policy="bf16", rngs=None))
    with matmul_override(target="cuda:9.0"):
        traced = jax.jit(lambda state, *arrays: function(nnx.merge(graphdef, state), *arrays)).trace(state, *arrays)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


IDS = jax.ShapeDtypeStruct((1, flash.LEAST), jnp.int32)


def test_a_call_without_cache_and_padding_uses_it(calls):
    call_lowered(lambda model, ids: model(ids), IDS)
    assert len(calls) >= CONFIG.num_hidden_layers


def test_a_call_with_a_mask_uses_it(calls):
    mask = jax.ShapeDtypeStruct(IDS.shape, bool)
    call_lowered(lambda model, ids, mask: model(ids, mask), IDS, mask)
    assert set(calls) == {(1, flash.LEAST, 4, 16, "masked")}


def test_a_mask_whose_rows_are_not_aligned_does_not(calls):
    ids, mask = (jax.ShapeDtypeStruct((1, flash.LEAST + 1), dtype) for dtype in (jnp.int32, bool))
    call_lowered(lambda model, ids, mask: model(ids, mask), ids, mask)
    assert calls == []


def test_a_prompt_after_a_prefix_uses_it(calls):
    cache = jax.eval_shape(lambda: Qwen3(CONFIG, policy="bf16", rngs=nnx.Rngs(0)).empty_cache(1, 512))
    call_lowered(lambda model, ids, cache: model.hidden(ids, None, cache)[0], IDS, cache)
    assert set(calls) == {(1, flash.LEAST, 4, 16, "masked")}


@pytest.fixture
def opaque(monkeypatch):
    """In cuDNN's place a primitive that has neither a derivative nor a batching rule, and returns what it should."""
    primitive = jax.extend.core.Primitive("cudnn")
    primitive.def_abstract_eval(lambda q, *_, window: q)
    lowered_calls = []
    real = flash.attend

    def lower(context, *operands, window):
        lowered_calls.append(window)
        plain = functools.partial(real, window=window, implementation="xla")
        return jax.interpreters.mlir.lower_fun(plain, multiple_results=False)(context, *operands)

    jax.interpreters.mlir.register_lowering(primitive, lower)
    monkeypatch.setattr(flash, "attend", lambda *operands: primitive.bind(*operands[:4], window=operands[4]))
    monkeypatch.setattr(flash, "refuses", lambda *_: None)
    monkeypatch.setattr(flash, "traces_masked", lambda *_: False)
    monkeypatch.setattr(by_platform, "unless_portable", lambda kernel, _, **options: kernel)
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *operands, default, cuda=None, **_: (cuda or default)(*operands)
    )
    return lowered_calls


def attends(window):
    """`attention.attend` of tokens that follow no others, as a function of q, k and v."""
    mask = jnp.ones((2, LENGTH), bool)
    queries, slots = token_positions(mask, jnp.zeros(2, jnp.int32))

    def attend(q, k, v, with_flash=True):
        prefill = attention.PrefillKV(k, v, mask) if with_flash else None
        return attention.attend(q, LayerCache.of(k, v, F32), queries, slots, window, prefill)[0]

    return attend


@pytest.mark.parametrize("window", [None, 7])
def test_derivatives_are_those_over_slots(opaque, window):
    attend, qkv = attends(window), inputs(np.float32)
    towards = jnp.asarray(np.random.default_rng(1).normal(size=(2, LENGTH, HEADS * D)), jnp.float32)

    def loss(with_flash, *qkv):
        return jnp.sum(attend(*qkv, with_flash) * towards)

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(with_flash, *qkv):
        one = functools.partial(loss, with_flash)
        return [*jax.grad(one, (0, 1, 2))(*qkv), jax.jvp(one, qkv, qkv)[1]]

    for one, other in zip(derivatives(True, *qkv), derivatives(False, *qkv), strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.abs(other).max() > 0.1
    opaque.clear()
    np.testing.assert_allclose(jax.jit(attend)(*qkv), attend(*qkv, False), rtol=0, atol=1e-5)
    assert opaque == [window]


def test_batches_of_calls_are_those_over_slots(opaque):
    attend, qkv = attends(None), inputs(np.float32)
    batches = [jnp.stack([x, x[::-1]]) for x in qkv]
    found = jax.vmap(attend)(*batches)
    assert opaque == []
    np.testing.assert_allclose(found, jnp.stack([attend(*x, False) for x in zip(*batches, strict=True)]), atol=1e-5)
    found = jax.vmap(lambda q: attend(q, *qkv[1:]))(batches[0])
    np.testing.assert_allclose(found[0], attend(*qkv, False), rtol=0, atol=1e-5)


def test_a_machine_without_cudnn_reads_over_slots(monkeypatch):
    """JAX raises where it finds none."""
    real = flash.attend
    monkeypatch.setattr(flash, "attend", functools.partial(real, implementation="cudnn"))
    if "cudnn" in lowered("bf16", flash.LEAST, ("cuda",)):
        pytest.skip("this machine has cuDNN")
    assert scores(lowered("bf16", flash.LEAST, ("cuda",)), flash.LEAST)


@pytest.mark.slow
def test_padding_is_no_part_of_what_the_model_reads(calls, monkeypatch):
    """A whole prefill with it, on this machine, gives what a prefill over slots gives."""
    model = Qwen3(CONFIG, policy="bf16", rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 64, (2, flash.LEAST))
    mask = np.ones(ids.shape, bool)
    mask[0, :50] = mask[1, 100:] = False
    expected = generation.prefill(model, ids, mask)
    assert calls == []
    monkeypatch.setattr(flash, "refuses", lambda *_: None)
    monkeypatch.setattr(by_platform, "unless_portable", lambda kernel, _, **options: kernel)
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *operands, default, cuda=None, **_: (cuda or default)(*operands)
    )
    programs.prefill.clear_cache()
    found = generation.prefill(model, ids, mask)
    assert len(calls) >= CONFIG.num_hidden_layers
    # The slots have the tokens of each row first, and padding last; ids and positions agree.
    positions, tokens = np.asarray(found.cache.positions), np.asarray(found.tokens)
    for row in range(2):
        count = mask[row].sum()
        np.testing.assert_array_equal(positions[row, :count], np.arange(count))
        assert (positions[row, count:] == EMPTY).all()
        np.testing.assert_array_equal(tokens[row, :count], ids[row, mask[row]])
    # bfloat16 is rounded at other places within the softmax.
    assert relative_error(found.logits, expected.logits) <= 2**-6


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda", "cuda:9.0"])
def test_a_prefill_is_exported_for_a_gpu(target):
    """Without cuDNN's attention and the constraint of layouts, neither of which `jax.export` accepts."""
    graph, state = nnx.split(Qwen3(CONFIG, policy="bf16", rngs=nnx.Rngs(0)))
    ids = jax.ShapeDtypeStruct((1, 128), jnp.int32)

    def prefill(state, ids):
        model = nnx.merge(graph, state)
        return model.hidden(ids, None, model.empty_cache(1, 256), first=True)

    with matmul_override(target=target):
        program = jax.export.export(jax.jit(prefill), platforms=["cuda"])(state, ids)
    assert program.platforms == ("cuda",)
