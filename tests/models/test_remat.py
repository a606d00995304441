"""`remat`: the same results and gradients from fewer values, and nothing else changes."""

import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perparam.models import Linear, Qwen3, Qwen3Config, layers
from perparam.models.plain import plain_class
from perparam.models.transformer import Layer
from perparam.policies import UnmatchedRule
from perparam.training import next_token_loss, remat

CONFIG = Qwen3Config(
    vocab_size=61, hidden_size=24, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8,
)  # fmt: skip
OTHER_FUSION = 96 * 2.0**-24
"""Relative to the largest: XLA fuses the two programs in other ways, and sums up to 96 products in other orders."""

IDS = np.random.default_rng(0).integers(0, 61, (2, 16))


@pytest.fixture(scope="module")
def model():
    return Qwen3(CONFIG, rngs=nnx.Rngs(0))


def residuals(model):
    """Bytes of the values that the backward pass keeps, parameters included."""
    graphdef, state = nnx.split(model)
    _, pull = jax.eval_shape(
        lambda state: jax.vjp(lambda s: next_token_loss(nnx.merge(graphdef, s), IDS), state), state
    )
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))


@pytest.mark.parametrize(
    "paths",
    [
        pytest.param("layers/*", marks=pytest.mark.slow),
        pytest.param(["layers/{0,2}/mlp", "layers/*/self_attn"], marks=pytest.mark.thorough),
    ],
)
def test_loss_and_gradients_are_the_same(model, paths):
    step = nnx.jit(nnx.value_and_grad(lambda m: next_token_loss(m, IDS)))
    (loss, gradients), (plain_loss, plain_gradients) = step(remat(model, paths)), step(model)
    assert loss == plain_loss
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(plain_gradients), strict=True):
        assert jnp.abs(one - other).max() <= OTHER_FUSION * jnp.abs(other).max()


@pytest.mark.thorough
@pytest.mark.parametrize("policy", ["f32", "fp8_weight_only"])
def test_operations_one_by_one_have_the_same_bits(model, policy):
    model = model.with_policy(policy)
    step = nnx.value_and_grad(lambda m: next_token_loss(m, IDS))
    chex.assert_trees_all_equal(step(remat(model, "layers/*")), step(model))


def test_the_backward_pass_keeps_fewer_values(model):
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    whole, parts, layers = (residuals(m) for m in (model, remat(model, "layers/*/mlp"), remat(model, "layers/*")))
    assert layers - parameters < 0.1 * (whole - parameters)
    assert layers < parts < 0.8 * whole


def test_the_model_is_unchanged_and_the_parameters_are_shared(model):
    changed = remat(model, "layers/1")
    assert [type(layer).__name__ for layer in changed.layers] == ["Layer", "RematLayer", "Layer"]
    assert all(type(layer) is Layer for layer in model.layers)
    assert isinstance(changed.layers[1], Layer)
    assert plain_class(changed.layers[1]) is Layer
    chex.assert_trees_all_equal(nnx.state(changed), nnx.state(model))
    assert changed.layers[1].mlp.up_proj.kernel[...] is model.layers[1].mlp.up_proj.kernel[...]


def test_another_policy_leaves_it_where_it_is(model):
    changed = remat(model, ["layers/1", "layers/2/mlp"]).with_policy("bf16")
    assert [plain_class(layer) is not type(layer) for layer in changed.layers] == [False, True, False]
    assert type(changed.layers[2].mlp).__name__ == "RematMLP"


@pytest.mark.slow
def test_values_are_observed_as_before(model):
    changed = remat(model, "layers/*")
    call = {"capture": "layers/*/mlp", "intervene": {"layers/1/mlp": lambda x: 0 * x}}
    run = nnx.jit(lambda m: m.observe(IDS, **call))
    chex.assert_trees_all_equal(run(changed), run(model))


@pytest.mark.slow
def test_a_cache_is_filled_and_continued_as_before(model):
    @nnx.jit
    def run(model):
        _, cache = model.hidden(IDS, cache=model.empty_cache(2, 20), first=True)
        return model.hidden(IDS[:, :1], cache=cache)

    chex.assert_trees_all_equal(run(remat(model, "layers/*")), run(model))


@pytest.mark.slow
def test_state_of_any_module_passes_through():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm, self.dropout = nnx.BatchNorm(4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x, *, scale, deterministic=False):
            return self.dropout(self.norm(x), deterministic=deterministic) * scale

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.block = Block(rngs)

        def __call__(self, x):
            return self.block(x, scale=2.0, deterministic=False)

    x = jax.random.normal(jax.random.key(0), (8, 4))
    plain = Net(nnx.Rngs(0))
    changed = remat(plain, "block")
    for _ in range(2):
        assert (changed(x) == plain(x)).all()
    chex.assert_trees_all_equal(nnx.state(changed), nnx.state(plain))
    assert jnp.any(plain.block.norm.mean[...] != 0)


@pytest.mark.parametrize("paths", ["layer/*", ["layers/*", "layers/0/mlp/up_proj/kernel"]])
def test_a_pattern_that_matches_no_module_is_an_error(model, paths):
    text = paths if isinstance(paths, str) else paths[1]
    with pytest.raises(UnmatchedRule, match=r"\(remat\) matches none of .* modules, such as .*Write the path") as error:
        remat(model, paths)
    assert repr(text) in str(error.value)


def test_no_pattern_at_all_is_an_error(model):
    with pytest.raises(UnmatchedRule, match=r"remat: found no pattern, so nothing would change\. Write 'layers/\*'"):
        remat(model, [])


@pytest.mark.parametrize("paths", ["**", "q"])
def test_projections_that_share_a_launch_still_do_and_are_computed_again(monkeypatch, paths):
    policy, together, product = {"params": {"kernel": "f8_e4m3fn"}, "block": (4, 4)}, [], layers.scaled_matmuls
    plain = nnx.Dict({name: Linear(8, 4, policy=policy, rngs=nnx.Rngs(i)) for i, name in enumerate("qk")})
    changed = remat(plain, paths)
    monkeypatch.setattr(
        layers, "scaled_matmuls", lambda x, kernels, **how: together.append(len(kernels)) or product(x, kernels, **how)
    )
    x = jax.random.normal(jax.random.key(0), (3, 8))

    def run(model):
        return lambda x: layers.project(x, model.q, model.k)

    programs = [jax.make_jaxpr(run(model))(x).eqns for model in (plain, changed)]
    assert together == [2, 2]
    assert ["prevent_cse" in program[0].params for program in programs] == [False, True]
    (q, pull), (expected_q, expected_pull) = jax.vjp(run(changed), x), jax.vjp(run(plain), x)
    chex.assert_trees_all_equal((q, pull(q)), (expected_q, expected_pull(q)))


def test_a_model_is_pickled_with_its_structure(model):
    changed = remat(model, ["layers/1", "layers/2/mlp"])
    again, graphdef = pickle.loads(pickle.dumps((changed, nnx.graphdef(changed))))
    assert [type(layer) for layer in again.layers] == [type(layer) for layer in changed.layers]
    assert type(again.layers[2].mlp) is type(changed.layers[2].mlp) is not type(model.layers[2].mlp)
    assert graphdef == nnx.graphdef(changed)
    chex.assert_trees_all_equal(nnx.state(again), nnx.state(model))
