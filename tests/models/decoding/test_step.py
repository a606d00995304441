"""A decoding step with fused kernels: when it is taken, and that its layers are those of `transformer.py`."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import relative_error
from flax import nnx
from interpreter import interpreted, required

from perparam import Policy, get_policy
from perparam.models import Llama, LlamaConfig, Qwen3, Qwen3Config, transformer
from perparam.models.decoding import step as decoding
from perparam.models.layers import Linear, RMSNorm
from perparam.models.lora import add_lora
from perparam.policies.matmul import Target, matmul_override

HOPPER = Target("cuda", (9, 0))
BF16 = np.dtype(ml_dtypes.bfloat16)
FIELDS = {
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "dtype": BF16,
    "pad_token_id": 0,
}


def built(mode="fp8_weight_only", family=(Qwen3, Qwen3Config), linear=Linear, stored=(), **fields):
    model, config = family
    narrow = dict(stored) | {"kernel": "f8_e4m3fn", "default": "bf16"}
    policy = Policy(narrow, get_policy(mode).compute)
    return model(config(**FIELDS | fields), policy=policy, linear=linear, rngs=nnx.Rngs(0))


def refusal(model, rows=1, tokens=1, slots=64, cache=None, target=HOPPER):
    x = jnp.zeros((rows, tokens, FIELDS["hidden_size"]), model.activations)
    cache = model.empty_cache(rows, slots) if cache is None else cache
    return decoding.refuses(model.layers, x, [cache.layer(i) for i in range(2)], target)


@pytest.fixture(scope="module")
def taken():
    """A model that the kernels take, for tests that leave it as it is."""
    return built()


class Other(Linear):
    """A projection of the user's."""


@pytest.mark.parametrize("mode", ["fp8_weight_only", "fp8_dynamic"])
@pytest.mark.parametrize("family", [(Qwen3, Qwen3Config), (Llama, LlamaConfig)], ids=["qwen3", "llama"])
def test_published_models_are_taken(mode, family):
    model = built(mode, family)
    assert refusal(model) is None
    assert refusal(model, rows=64) is None


@pytest.mark.parametrize(
    ("why", "settings", "call"),
    [
        ("its kernels are for Hopper GPUs", {}, {"target": Target("cuda", (10, 0))}),
        ("its kernels are for Hopper GPUs", {}, {"target": Target("cpu")}),
        ("it is for one token of each sequence", {}, {"tokens": 2}),
        ("it is for at most 64 sequences", {}, {"rows": 65}),
        ("activations are not in 16 bits", {"mode": "f32"}, {}),
        ("there is no kernel for 4 and 2 heads of 32 columns", {"head_dim": 32}, {}),
        ("there is no kernel for 4 and 2 heads of 128 columns and a cache of 16 slots", {}, {"slots": 16}),
        ("a projection has a kernel that is not narrow, or is of another class", {"linear": Other}, {}),
        (
            "a projection has a kernel that is not narrow, or is of another class",
            {"stored": {"**/down_proj/kernel": "bf16"}.items()},
            {},
        ),
        ("a projection has a bias, or other activations", {"attention_bias": True}, {}),
        (
            "projections of the same operand differ in their formats",
            {"stored": {"**/up_proj/kernel": "f8_e5m2"}.items()},
            {},
        ),
        ("a product is not computed by 'hopper columns'", {"intermediate_size": 400}, {}),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(taken, why, settings, call):
    model = built(**settings) if settings else taken
    assert refusal(model, **call) == why


def test_a_cache_in_another_dtype_is_refused():
    cache = dataclasses.replace(built().empty_cache(1, 64), dtype=np.dtype(np.float32))
    assert refusal(built(), cache=cache) == "the cache has another dtype than activations"


def test_a_norm_in_another_dtype_is_refused():
    model = built()
    model.layers[1].input_layernorm.compute = np.dtype(np.float32)
    assert refusal(model) == "a norm is not computed in the activations' dtype"


def test_other_norms_are_refused():
    class Norm(nnx.Module):
        """A norm of the user's."""

    class Centred(RMSNorm):
        pass

    model = built()
    model.layers[0].input_layernorm = Norm()
    assert refusal(model) == "a norm is of another class"
    model = built()
    model.layers[1].self_attn.k_norm.__class__ = Centred
    assert refusal(model) == "a norm is of another class"
    model = built()
    model.layers[1].self_attn.k_norm.eps = 1e-3
    assert refusal(model) == "the norms of queries and keys differ in eps"


def test_layers_and_attention_of_other_classes_are_refused():
    class Layer(transformer.Layer):
        pass

    class Attention(transformer.Attention):
        def __call__(self, x, step, past):
            return super().__call__(x, step, past)

    model = built(family=(Llama, LlamaConfig))
    model.layers[0].__class__ = Layer
    assert refusal(model) == "a layer is of another class"
    model.layers = nnx.List([nnx.Module(), model.layers[1]])
    assert refusal(model) == "a layer is of another class"
    model = built(family=(Llama, LlamaConfig))
    model.layers[1].self_attn.__class__ = Attention
    assert refusal(model) == "attention is of another class"


def test_projections_with_adapters_are_refused(taken):
    assert refusal(add_lora(taken, 2, 4, "up_proj", rngs=nnx.Rngs(0))) == "a projection has an adapter"


def test_what_cannot_be_the_key_of_a_compiled_layer_is_refused():
    model = built()
    model.layers[0].self_attn.notes = nnx.static({"a": 1})
    assert refusal(model) == "a layer has attributes that cannot be hashed"


@pytest.mark.slow
def test_observed_models_are_refused():
    model, reasons = built(), []

    def look(x):
        reasons.append(refusal(model))
        return x

    model.observe([[1, 2]], intervene={"layers/0": look})
    assert reasons == ["intermediate values are observed"]


MASK = np.arange(7) >= np.array([[0], [3], [1]])
BOUND = {"fp8_weight_only": 0.02, "fp8_dynamic": 0.1}
"""Roundings to bf16 differ where the sums of products are added otherwise: by 0.007, with narrow activations by 0.05,
since a value that falls on the other side of a tie differs by 2**-3."""


@required
@pytest.mark.parametrize(
    ("mode", "family"),
    [
        pytest.param("fp8_weight_only", (Qwen3, Qwen3Config), marks=pytest.mark.slow),
        pytest.param("fp8_dynamic", (Llama, LlamaConfig), marks=pytest.mark.thorough),
    ],
    ids=["W8A16 with norms of heads", "W8A8 without"],
)
def test_the_layers_are_the_same(mode, family):
    model = built(mode, family, windows=(5, None))
    ids = np.random.default_rng(0).integers(1, 300, (3, 8))
    _, cache = model.hidden(ids[:, :7], MASK, model.empty_cache(3, 64))
    expected, expected_cache = model.hidden(ids[:, 7:], None, cache)
    jax.clear_caches()  # of kernels that are not interpreted
    with interpreted(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "refuses", lambda *_: None)
        patch.setattr(decoding, "decode", decoding.fused)
        found, found_cache = model.hidden(ids[:, 7:], None, cache)
    assert found.dtype == expected.dtype
    assert relative_error(found, expected) <= BOUND[mode]
    for i in range(2):
        assert relative_error(found_cache.keys[i], expected_cache.keys[i]) <= BOUND[mode]
        assert relative_error(found_cache.values[i], expected_cache.values[i]) <= BOUND[mode]
    assert decoding._fused_layer._cache_size() <= 2  # the first layer has no sums before it


@pytest.mark.thorough
@pytest.mark.parametrize("run", [pytest.param(lambda f: f, id="eager"), pytest.param(jax.jit, id="jit")])
def test_derivatives_and_batches_are_those_of_the_layers(run):
    model = built()
    _, cache = model.hidden(np.arange(1, 7).reshape(2, 3), None, model.empty_cache(2, 64))
    towards = jnp.asarray(np.random.default_rng(1).normal(size=(2, 1, FIELDS["hidden_size"])), jnp.float32)

    graph, state = nnx.split(model)

    def loss(scale, ids):
        changed = nnx.merge(graph, state)
        changed.layers[0].input_layernorm.scale = nnx.Param(scale)
        return jnp.sum(changed.hidden(ids, None, cache)[0].astype(jnp.float32) * towards)

    ids = jnp.ones((3, 2, 1), jnp.int32) * jnp.arange(3)[:, None, None]
    scale = jnp.linspace(0.5, 1.5, FIELDS["hidden_size"], dtype=BF16)
    functions = [jax.grad(loss), jax.vmap(loss, (None, 0)), jax.vmap(jax.grad(loss), (None, 0))]
    for function, batch in zip(functions, (ids[1], ids, ids), strict=True):
        expected = jax.jit(function)(scale, batch)
        with matmul_override(target="cuda:9.0"):
            found = run(function)(scale, batch)
        assert np.abs(np.asarray(expected, np.float32)).max() > 0.1
        assert relative_error(found, expected) <= 0.02


def test_a_step_for_any_number_of_sequences_is_exported():
    model = built()
    graph, state = nnx.split(model)
    (b,) = jax.export.symbolic_shape("b", constraints=["b<=64"])
    cache = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((b, *leaf.shape[1:]) if leaf.ndim else (), leaf.dtype),
        model.empty_cache(1, 64),
    )

    def step(state, ids, mask, cache):
        return nnx.merge(graph, state).hidden(ids, mask, cache)[0]

    with matmul_override(target="cuda:9.0"):
        ids, mask = (jax.ShapeDtypeStruct((b, 1), dtype) for dtype in (jnp.int32, bool))
        program = jax.export.export(jax.jit(step), platforms=["cuda"])(state, ids, mask, cache)
    assert program.platforms == ("cuda",)
