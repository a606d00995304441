"""Gradients of NNX modules with narrow kernels, by `value_and_grad` and by persistent proxies, and training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import perparam
from perparam import Policy
from perparam.models import Linear, Qwen3, Qwen3Config, Qwen3Moe, Qwen3MoeConfig
from perparam.policies import InvalidPolicy, UnmatchedRule, UnsupportedCast
from perparam.training import Narrow, Proxy, add_proxies, grad, remove_proxies, value_and_grad, with_policy

SHAPE = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
DENSE = Qwen3Config(**SHAPE, intermediate_size=64, num_hidden_layers=1, tie_word_embeddings=True)
MIXTURE = Qwen3MoeConfig(
    **SHAPE, intermediate_size=64, num_hidden_layers=1, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
)
IDS = jax.random.randint(jax.random.key(1), (2, 6), 0, 48)
F32 = Policy("f32", "f32", "f32")
NARROW = Policy({"kernel": "f8_e4m3fn", "embedding": "int8", "default": "f32"}, "f32", "f32", block=(16, 16))

MODEL_ERROR = 1e-5
"""Of the largest gradient: float32 through a layer, attention and norms, in another order of sums; measured 1e-6."""


def loss(model, ids=IDS):
    return (model(ids) ** 2).mean()


def by_path(state):
    return {"/".join(map(str, keys)): np.asarray(leaf[...]) for keys, leaf in nnx.to_flat_state(state)}


@pytest.fixture(scope="module", params=["dense", pytest.param("mixture", marks=pytest.mark.slow)])
def models(request):
    """A model with narrow kernels, and the same weights in float32."""
    kind, config = {"dense": (Qwen3, DENSE), "mixture": (Qwen3Moe, MIXTURE)}[request.param]
    narrow = kind(config, policy=NARROW, rngs=nnx.Rngs(0))
    return narrow, narrow.with_policy(F32)


@pytest.fixture(scope="module")
def gradients(models):
    """Of the narrow model, by path, and of the wide one by JAX."""
    narrow, wide = models
    value, found = nnx.jit(value_and_grad(loss))(narrow)
    wanted_value, wanted = nnx.jit(nnx.value_and_grad(loss))(wide)
    assert abs(float(value) - float(wanted_value)) <= MODEL_ERROR * float(wanted_value)
    return by_path(found), by_path(wanted)


def test_they_are_those_of_the_dequantised_model(gradients):
    found, wanted = gradients
    assert found.keys() == wanted.keys()  # embeddings, heads, experts, norms: and no scales
    for path, gradient in wanted.items():
        assert found[path].dtype == np.float32
        assert abs(found[path] - gradient).max() <= MODEL_ERROR * abs(gradient).max(), path


def assert_same(found, wanted, path):
    """Equal but for the order in which XLA adds up sums; in most programs it is the same."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=MODEL_ERROR * abs(wanted).max(), err_msg=path)


@pytest.mark.slow
def test_a_state_has_the_gradients_of_its_module(models, gradients):
    model = models[0]
    module = functools.partial(type(model), model.config)
    state = nnx.state(model)
    found = jax.jit(grad(lambda state: (perparam.apply(module, NARROW, state, IDS) ** 2).mean()))(state)
    found = by_path(found)
    assert found.keys() == gradients[0].keys()
    for path, gradient in found.items():
        assert_same(gradient, gradients[0][path], path)


def test_proxies_have_them_under_plain_nnx(models, gradients):
    model = nnx.clone(models[0])
    structure = jax.tree.structure(nnx.state(model))
    add_proxies(model)
    found = by_path(nnx.jit(nnx.grad(loss))(model))
    assert {path.removesuffix("_proxy") for path in found} == gradients[0].keys()
    for path, gradient in found.items():
        assert_same(gradient, gradients[0][path.removesuffix("_proxy")], path)
    remove_proxies(model)
    assert jax.tree.structure(nnx.state(model)) == structure


def test_only_chosen_parameters_have_gradients_and_the_module_is_as_before():
    model = Qwen3(DENSE, policy=NARROW, rngs=nnx.Rngs(0))
    structure = jax.tree.structure(nnx.state(model))
    found = by_path(nnx.jit(grad(loss, trainable=["**/down_proj/kernel", "norm/*"]))(model))
    assert sorted(found) == ["layers/0/mlp/down_proj/kernel", "norm/scale"]
    with pytest.raises(UnmatchedRule, match=r"'\*\*/donw_proj/kernel' \(trainable\) matches none of"):
        grad(loss, trainable="**/donw_proj/kernel")(model)
    with pytest.raises(ZeroDivisionError):
        grad(lambda model: 1 / 0)(model)
    assert jax.tree.structure(nnx.state(model)) == structure


def test_other_state_changes_as_under_nnx():
    class Counted(nnx.Module):
        def __init__(self):
            self.linear = Linear(4, 3, policy={"params": {"kernel": "int8"}}, rngs=nnx.Rngs(0))
            self.calls = nnx.Variable(jnp.int32(0))

        def __call__(self, x):
            self.calls[...] += 1
            return self.linear(x)

    model = Counted()
    (_, aux), gradient = value_and_grad(lambda m, x: (m(x).sum(), x.shape), has_aux=True)(model, jnp.ones((2, 4)))
    assert (aux, int(model.calls[...])) == ((2, 4), 1)
    assert gradient["linear"]["kernel"][...].tolist() == [[2.0] * 4] * 3


def test_stacked_layers_in_an_nnx_scan():
    policy = Policy({"kernel": "f8_e4m3fn"}, block=(4, 4))

    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs):
        return Linear(8, 8, policy=policy, rngs=rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(layer, x):
        return jnp.tanh(layer(x))

    layers, x = create(nnx.Rngs(0).split(3)), jnp.ones((2, 8))
    found = nnx.jit(grad(lambda layers: forward(layers, x).sum()))(layers)["kernel"][...]
    weight = jax.vmap(lambda k, s: perparam.dequantize(k, s, (4, 4)))(layers.kernel[...], layers.scale_inv[...])
    wide = jax.grad(lambda w: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w.T), None), x, w)[0].sum())(weight)
    assert found.shape == (3, 8, 8)
    np.testing.assert_allclose(found, wide, rtol=0, atol=1e-6)


class TestProxies:
    def test_they_are_rows_of_the_plan_and_count_their_bytes(self):
        layer = Linear(8, 4, policy={"params": {"kernel": "int8"}}, rngs=nnx.Rngs(0))
        before = Policy().explain(nnx.state(layer)).total_bytes
        add_proxies(layer)
        assert Policy().explain(nnx.state(layer)).total_bytes == before + 4 * 8 * 4
        assert isinstance(layer.kernel_proxy, Proxy)

    def test_mistakes_are_errors(self):
        layer = Linear(8, 4, policy={"params": {"kernel": "int8"}}, rngs=nnx.Rngs(0))
        with pytest.raises(InvalidPolicy, match="proxies are f32, bf16 or f16, found int8"):
            add_proxies(layer, dtype="int8")
        with pytest.raises(UnmatchedRule, match=r"'embedding' \(trainable\) matches none of 1 trainable parameter"):
            add_proxies(layer, "embedding")
        add_proxies(layer)
        with pytest.raises(UnsupportedCast, match="kernel_proxy: the proxy of a narrow kernel, without the kernel"):
            nnx.Optimizer(layer, with_policy(optax.sgd(1.0), Policy()), wrt=nnx.Param)


@pytest.mark.slow
class TestTraining:
    """A tiny model learns a permutation from float8 weights alone, without masters."""

    STEPS = 40

    def losses(self, rounding, proxies):
        policy = NARROW.replace(params={"kernel": "f8_e4m3fn", "embedding": "f8_e4m3fn", "default": "f32"})
        model = Qwen3(DENSE, policy=policy, rngs=nnx.Rngs(0))
        if proxies:
            add_proxies(model)
        tx = with_policy(optax.adam(1e-3), policy, rounding=rounding)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Any(nnx.Param, Narrow))
        differentiate = nnx.value_and_grad if proxies else value_and_grad

        @nnx.jit
        def step(model, optimizer, ids):
            def cross_entropy(model):
                return optax.softmax_cross_entropy_with_integer_labels(model(ids[:, :-1]), ids[:, 1:]).mean()

            value, gradients = differentiate(cross_entropy)(model)
            optimizer.update(model, gradients)
            return value

        start = np.random.default_rng(0).integers(0, 48, (self.STEPS, 8, 1))
        return [float(step(model, optimizer, ids)) for ids in (start + np.arange(8)) % 48]

    @pytest.mark.thorough
    def test_stochastic_rounding_learns_where_rounding_to_nearest_stalls(self):
        nearest, stochastic = self.losses("nearest", False), self.losses("stochastic", False)
        fell = [losses[0] - np.mean(losses[-5:]) for losses in (nearest, stochastic)]
        assert fell[1] > 2 * fell[0]
        assert np.mean(stochastic[-5:]) < np.mean(nearest[-5:]) - 0.3

    def test_proxies_train_alike(self):
        assert self.losses("stochastic", True) == self.losses("stochastic", False)
