"""What is trained and what is frozen, and optimizers that see no narrow leaf."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import bits

from perparam import apply, init
from perparam.policies import Narrow, UnmatchedRule, UnsupportedCast, parameters
from perparam.policies.dtypes import is_narrow
from perparam.training import combine, partition, refuse_narrow

FP8 = {"params": {"kernel": "f8_e4m3fn", "embedding": "int8", "scale_inv": "bf16", "default": "f32"}}
KEY = jax.random.key(0)
IDS = np.array([[0, 3, 6]])


class Linen(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(7, 4)(ids)
        x = nn.BatchNorm(use_running_average=True)(x)
        boxed = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        return nn.Dense(2, kernel_init=boxed)(x)


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.dense = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, ids):
        return self.dense(self.norm(self.embed(ids)))


def linen():
    return init(Linen(), FP8, KEY, IDS)


def plain():
    return {**linen()["params"], "steps": jnp.arange(3), "key": jax.random.key(1), "layers": [{"bias": jnp.ones(2)}]}


def state():
    return init(Nnx, FP8, KEY)


trees = pytest.mark.parametrize("tree", [plain, linen, state])


def trainable_paths(tree, *choice):
    return set(parameters(partition(tree(), *choice)[0]))


@trees
def test_patterns_and_functions_choose_what_is_trained_by_path(tree):
    every = trainable_paths(tree)
    biases = {path for path in every if path.endswith("bias")}
    assert biases
    assert biases < every
    assert trainable_paths(tree, "bias") == trainable_paths(tree, lambda path: path.endswith("bias")) == biases
    assert trainable_paths(tree, ["bias", "lora_a?"]) == biases
    assert trainable_paths(tree, ("bias", "**")) == every
    assert trainable_paths(tree, []) == set()
    chex.assert_trees_all_equal(combine(*partition(tree(), "bias")), tree())


@trees
def test_a_pattern_that_matches_no_trainable_parameter_is_an_error(tree):
    with pytest.raises(UnmatchedRule, match=r"'kernel' \(trainable\) matches none of \d+ trainable"):
        partition(tree(), "kernel")  # narrow, so it is frozen


def leaves(tree) -> list[str]:
    return [
        bits(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for x in jax.tree.leaves(tree)
    ]


@trees
def test_splitting_and_joining_is_the_identity(tree):
    variables = tree()
    joined = combine(*partition(variables))
    assert type(joined) is type(variables)
    chex.assert_trees_all_equal_structs(joined, variables)
    assert leaves(joined) == leaves(variables)


@trees
def test_every_leaf_is_on_one_side(tree):
    variables = tree()
    trainable, frozen = partition(variables)
    assert len(jax.tree.leaves(trainable)) + len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(variables))


def test_what_is_trained_are_the_wide_floats_that_are_no_scales():
    trainable, frozen = partition(linen())
    trained = {"BatchNorm_0": {"bias", "scale"}, "Dense_0": {"bias"}, "Embed_0": set()}
    assert {
        name: {k for k, x in layer.items() if x is not None} for name, layer in trainable["params"].items()
    } == trained
    assert jax.tree.leaves(trainable["batch_stats"]) == []
    held = {"Dense_0": {"kernel", "scale_inv"}, "Embed_0": {"embedding", "embedding_scale_inv"}, "BatchNorm_0": set()}
    assert {name: {k for k, x in layer.items() if x is not None} for name, layer in frozen["params"].items()} == held
    assert len(jax.tree.leaves(frozen["batch_stats"])) == 2


def test_plain_kernels_are_trained():
    trainable, _ = partition({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2, jnp.bfloat16), "ids": jnp.arange(2)})
    assert {name: x is not None for name, x in trainable.items()} == {"kernel": True, "bias": True, "ids": False}


def test_a_state_is_divided_into_two_states():
    trainable, frozen = partition(state())
    assert {"/".join(keys) for keys, _ in nnx.to_flat_state(trainable)} == {"norm/bias", "norm/scale", "dense/bias"}
    kinds = {"/".join(keys): type(leaf) for keys, leaf in nnx.to_flat_state(frozen)}
    assert kinds["dense/kernel"] is kinds["dense/scale_inv"] is kinds["embed/embedding_scale_inv"] is Narrow
    assert kinds["norm/mean"] is nnx.BatchStat


@trees
def test_adamw_keeps_nothing_for_narrow_kernels(tree):
    trainable, _ = partition(tree())
    moments = optax.chain(refuse_narrow(), optax.adamw(1e-3)).init(trainable)
    found = jax.tree.leaves(moments)
    assert not any(is_narrow(x.dtype) for x in found)
    assert len(found) == 1 + 2 * len(jax.tree.leaves(trainable))  # the count of steps, and two moments each


def test_a_step_trains_what_is_trained_and_nothing_else():
    variables = linen()
    trainable, frozen = partition(variables)
    optimizer = optax.chain(refuse_narrow(), optax.adamw(1e-1))

    @jax.jit
    def step(trainable, moments):
        loss, gradient = jax.value_and_grad(
            lambda t: jnp.mean((apply(Linen(), FP8, combine(t, frozen), IDS) - 1.0) ** 2)
        )(trainable)
        with jax.numpy_dtype_promotion("standard"):  # optax divides by integers
            updates, moments = optimizer.update(gradient, moments, trainable)
        return optax.apply_updates(trainable, updates), moments, loss

    moments, losses = optimizer.init(trainable), []
    for _ in range(5):
        trainable, moments, loss = step(trainable, moments)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    trained = combine(trainable, frozen)
    for name in ("kernel", "scale_inv"):
        assert bits(trained["params"]["Dense_0"][name].unbox()) == bits(variables["params"]["Dense_0"][name].unbox())
    assert (trained["params"]["Dense_0"]["bias"] != variables["params"]["Dense_0"]["bias"]).all()


class TestRefuseNarrow:
    @pytest.mark.parametrize(
        ("tree", "path"),
        [
            (lambda: linen()["params"], "Dense_0/kernel: f8_e4m3fn"),
            (linen, "Dense_0/kernel"),
            (state, "dense/kernel: f8_e4m3fn"),
        ],
    )
    def test_it_names_the_leaf_and_the_remedy(self, tree, path):
        with pytest.raises(UnsupportedCast) as caught:
            optax.chain(refuse_narrow(), optax.adam(1e-3)).init(tree())
        message = str(caught.value)
        assert message.startswith(path)
        assert "(4, 2) cannot be trained: its moments would be narrow" in message
        assert (
            "Initialise the optimizer with the first result of perparam.training.partition(variables), or store the "
            "parameter as f32" in message
        )

    def test_it_changes_no_update(self):
        transform, params = refuse_narrow(), {"w": jnp.ones(2)}
        updates, _ = transform.update({"w": jnp.full(2, 3.0)}, transform.init(params), params)
        assert updates["w"].tolist() == [3.0, 3.0]


def test_nnx_optimizers_pass_pairs_by():
    model = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: Nnx(nnx.Rngs(0)))), nnx.state(Nnx(nnx.Rngs(0))))
    model.dense.kernel = Narrow(jnp.ones((4, 2), jnp.float8_e4m3fn), block=(128, 128))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    assert not any(is_narrow(x.dtype) for x in jax.tree.leaves(nnx.state(optimizer)))
