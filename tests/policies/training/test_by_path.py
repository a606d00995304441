"""Choices by path: filters for NNX, masks and labels for optax, all strict."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import bits
from hypothesis import given
from hypothesis import strategies as st

from perparam import Policy, bind, dequantize, init
from perparam.policies import Narrow, ShadowedRule, UnmatchedRule, UnpairedScale, parameters
from perparam.training import partition, path_labels, path_mask, trainable, with_policy

FP8 = {"params": {"kernel": "f8_e4m3fn"}}


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.body = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)])
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        for layer in self.body:
            x = layer(x)
        return self.head(x)


X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
TREE = {
    "a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    "b": [{"kernel": jnp.ones((2, 2))}, {"kernel": jnp.ones((2, 2))}],
}


def linen():
    return {"params": TREE, "batch_stats": {}}


def in_nnx():
    return nnx.state(Model(nnx.Rngs(0)), nnx.Param)


class TestTrainable:
    def test_gradients_and_moments_are_those_of_the_patterns(self):
        model = Model(nnx.Rngs(0))
        only = trainable(model, ["head/*", "body/{0..1}/bias"])
        paths = {"head/kernel", "head/bias", "body/0/bias", "body/1/bias"}
        gradient = nnx.grad(lambda model: (model(X) ** 2).sum(), argnums=nnx.DiffState(0, only))(model)
        assert set(parameters(gradient)) == paths
        optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=only)
        assert len(jax.tree.leaves(nnx.state(optimizer))) == 1 + len(paths)
        before = {path: bits(x) for path, x in parameters(model).items()}
        optimizer.update(model, gradient)
        changed = {path for path, x in parameters(model).items() if bits(x) != before[path]}
        # Of a bias before a batch norm the gradient is zero, and so it may round to nothing.
        assert {"head/kernel", "head/bias"} <= changed <= paths

    def test_narrow_pairs_and_statistics_are_frozen(self):
        bound = bind(Model(nnx.Rngs(0)), FP8)
        chosen = nnx.state(bound, trainable(bound))
        assert {type(leaf) for _, leaf in nnx.to_flat_state(chosen)} == {nnx.Param}
        assert set(parameters(chosen)) == {"body/0/bias", "body/1/bias", "body/1/scale", "head/bias"}
        assert set(parameters(nnx.state(bound, Narrow))).isdisjoint(parameters(chosen))

    def test_equal_choices_are_equal(self):
        model = Model(nnx.Rngs(0))
        assert trainable(model, "head/*") == trainable(model, ["head/{kernel,bias}"])
        assert hash(trainable(model, "head/*")) == hash(trainable(model, ["head/{kernel,bias}"]))
        assert trainable(model, "head/*") != trainable(model)

    def test_a_pattern_of_nothing_that_can_be_trained_is_an_error(self):
        bound = bind(Model(nnx.Rngs(0)), FP8)
        with pytest.raises(UnmatchedRule, match=r"'\*\*/kernel' \(trainable\) matches none of 4 trainable parameters"):
            trainable(bound, "**/kernel")
        assert trainable(bound, ["head/*", "lora?"]) == trainable(bound, "head/*")


class TestMask:
    @pytest.mark.parametrize("tree", [linen, in_nnx, lambda: TREE], ids=["linen", "nnx", "dict"])
    def test_it_is_true_where_a_pattern_matches(self, tree):
        mask = path_mask(["kernel", "missing?"])(tree())
        flat = {path: path.endswith("kernel") for path in parameters(tree())}
        assert jax.tree.leaves(mask) == list(flat.values())
        assert not all(flat.values())

    @given(st.sets(st.sampled_from(["a/kernel", "a/bias", "b/0/kernel", "b/1/kernel"])))
    def test_it_is_true_for_the_paths_that_partition_would_train(self, paths):
        chosen, _ = partition(TREE, paths)
        expected = jax.tree.map(lambda x: x is not None, chosen, is_leaf=lambda x: x is None)
        assert path_mask(paths)(TREE) == expected

    def test_weight_decay_reaches_the_kernels_alone(self):
        transform = optax.add_decayed_weights(0.5, mask=path_mask("kernel"))
        zeros = jax.tree.map(jnp.zeros_like, TREE)
        updates, _ = transform.update(zeros, transform.init(TREE), TREE)
        assert {path: float(x.max()) for path, x in parameters(updates).items()} == {
            "a/bias": 0.0,
            "a/kernel": 0.5,
            "b/0/kernel": 0.5,
            "b/1/kernel": 0.5,
        }

    def test_it_is_a_mask_in_an_nnx_optimizer(self):
        model = Model(nnx.Rngs(0))
        transform = optax.adamw(0.1, weight_decay=0.5, mask=path_mask("kernel"))
        optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
        before = parameters(model)
        gradient = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
        with jax.numpy_dtype_promotion("standard"):
            optimizer.update(model, gradient)
        changed = {path for path, x in parameters(model).items() if bits(x) != bits(before[path])}
        assert changed == {"body/0/kernel", "head/kernel"}

    def test_a_pattern_that_matches_nothing_is_an_error(self):
        with pytest.raises(
            UnmatchedRule, match=r"'kernal' \(True\) matches none of 4 parameters, such as a/bias. Correct"
        ):
            path_mask("kernal")(TREE)


class TestLabels:
    def test_they_freeze_and_train_in_multi_transform(self):
        labels = path_labels({"fast": "a/*", "slow": "kernel"}, default="frozen")
        transform = optax.multi_transform(
            {"fast": optax.sgd(1.0), "slow": optax.sgd(0.5), "frozen": optax.set_to_zero()}, labels
        )
        ones = jax.tree.map(jnp.ones_like, TREE)
        updates, _ = transform.update(ones, transform.init(TREE), TREE)
        assert {path: float(x.min()) for path, x in parameters(updates).items()} == {
            "a/bias": -1.0,
            "a/kernel": -1.0,
            "b/0/kernel": -0.5,
            "b/1/kernel": -0.5,
        }

    def test_a_mask_within_a_group_sees_the_paths_of_the_others(self):
        inner = optax.add_decayed_weights(0.5, mask=path_mask(["kernel", "bias"]))
        transform = optax.multi_transform(
            {"decayed": inner, "frozen": optax.set_to_zero()}, path_labels({"decayed": "kernel"}, default="frozen")
        )
        updates, _ = transform.update(TREE, transform.init(TREE), TREE)
        assert float(updates["a"]["kernel"].max()) == 1.5

    def test_the_halves_of_a_partition_have_labels_for_what_is_trained(self):
        variables = init(nn.Dense(2), FP8, jax.random.key(0), X)
        half, _ = partition(variables)
        chex.assert_trees_all_equal_structs(path_labels({"all": "bias"})(half), half)
        assert jax.tree.leaves(path_labels({"all": "bias"})(half)) == ["all"]

    @pytest.mark.parametrize(
        ("labels", "error", "message"),
        [
            (
                {"x": "a/*"},
                UnmatchedRule,
                "^b/0/kernel: no pattern matches this parameter. Add one for it, or give a d",
            ),
            (
                {"x": "**", "y": "a/*"},
                ShadowedRule,
                r"^'a/\*' \(y\) decides nothing: earlier labels have a pattern for a/",
            ),
            ({"x": "**", "y": "c/*"}, UnmatchedRule, r"^'c/\*' \(y\) matches none of 4 parameters"),
        ],
    )
    def test_labels_without_effect_and_parameters_without_label_are_errors(self, labels, error, message):
        with pytest.raises(error, match=message):
            path_labels(labels)(TREE)


class TestScales:
    NARROW = Policy({"**/kernel": "int8"}, block=(2, 2)).store({"a": TREE["a"], "c": {"kernel": jnp.ones((2, 2))}})

    def test_they_have_the_label_of_their_kernel(self):
        labels = path_labels({"fast": "a/kernel"}, default="slow")(self.NARROW)
        assert labels["a"] == {"bias": "slow", "kernel": "fast", "scale_inv": "fast"}
        assert labels["c"] == {"kernel": "slow", "scale_inv": "slow"}
        assert path_mask("**/kernel")(self.NARROW)["a"] == {"bias": False, "kernel": True, "scale_inv": True}

    def test_a_group_trains_both(self):
        group = with_policy(optax.sgd(0.5), Policy())
        transform = optax.multi_transform(
            {"trained": group, "frozen": optax.set_to_zero()}, path_labels({"trained": "a/kernel"}, default="frozen")
        )
        ones = jax.tree.map(jnp.ones_like, self.NARROW)
        ones = {name: layer | {"kernel": jnp.ones((2, 2))} for name, layer in ones.items()}
        updates, _ = transform.update(ones, transform.init(self.NARROW), self.NARROW)
        after = optax.apply_updates({"a": self.NARROW["a"]}, {"a": updates["a"]})["a"]
        wide = dequantize(after["kernel"], after["scale_inv"], (2, 2))
        np.testing.assert_allclose(wide, 0.5, rtol=2.0**-22)  # quantised and dequantised, two float32 operations

    @pytest.mark.parametrize("scales", [{"scale_inv": optax.MaskedNode()}, {"scale_inv": None}, {}])
    def test_a_kernel_without_them_is_an_error(self, scales):
        params = {"kernel": self.NARROW["a"]["kernel"], **scales}
        with pytest.raises(UnpairedScale, match=r"^kernel: int8 \(2, 2\) without its scales 'scale_inv', so it cannot"):
            with_policy(optax.sgd(1.0), Policy({"kernel": "int8"})).init(params)
