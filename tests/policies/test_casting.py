"""`policy.cast`: by path, saturating, floats only, and the tree keeps its structure."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict, freeze
from helpers import ACTIVATIONS, bits, reference_quantize
from hypothesis import given
from hypothesis import strategies as st

from perparam import Policy, get_policy
from perparam.policies import InvalidPolicy, Narrow, ShadowedRule, UnmatchedRule, UnsupportedCast

pytestmark = pytest.mark.optimised

KERNEL, SCALE = (jnp.asarray(half) for half in reference_quantize(np.ones((4, 4)), "float8_e4m3fn", (2, 2)))


def plain_tree():
    return {
        "dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2, jnp.float16)},
        "layers": [{"kernel": jnp.ones((2, 2), jnp.bfloat16)}, {"kernel": jnp.ones((2, 2))}],
        "steps": jnp.arange(3),
        "mask": jnp.array([True, False]),
        "key": jax.random.key(0),
        "raw_key": jax.random.PRNGKey(0),
    }


def dtypes(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x.dtype.name
        for path, x in jax.tree.leaves_with_path(tree)
    }


class TestByPath:
    def test_each_leaf_is_cast_as_its_rule_says(self):
        policy = Policy(compute={"layers/0/*": "f32", "kernel": "bf16", "bias": None, "default": "f16"})
        cast = policy.cast(plain_tree(), "compute")
        found = dtypes(cast)
        assert found["dense/kernel"] == "bfloat16"
        assert found["dense/bias"] == "float16"
        assert found["layers/0/kernel"] == "float32"
        assert found["layers/1/kernel"] == "bfloat16"

    def test_the_slot_is_chosen_by_name(self):
        policy = Policy(params="bf16", compute="f16")
        assert policy.cast({"w": jnp.ones(2)}, "params")["w"].dtype == jnp.bfloat16
        assert policy.cast({"w": jnp.ones(2)}, "compute")["w"].dtype == jnp.float16

    @pytest.mark.parametrize("slot", ["output", "param", "grads"])
    def test_another_slot_is_refused(self, slot):
        with pytest.raises(InvalidPolicy, match=f"cast to slot '{slot}': expected 'params' or 'compute'"):
            Policy().cast({"w": jnp.ones(2)}, slot)

    def test_one_array_by_its_path(self):
        policy = Policy(params={"a/kernel": "f16", "kernel": "bf16"})
        assert policy.cast(jnp.ones(2), "params", path="a/kernel").dtype == jnp.float16
        assert policy.cast(jnp.ones(2), "params", path="b/kernel").dtype == jnp.bfloat16
        assert policy.cast(jnp.ones(2), "params", path="b/bias").dtype == jnp.float32

    def test_one_array_is_not_held_to_strictness(self):
        assert (
            Policy(params={"nowhere": "f16", "kernel": "bf16"}).cast(jnp.ones(2), "params", path="kernel").dtype
            == jnp.bfloat16
        )

    @pytest.mark.parametrize(
        ("slot", "error"), [({"kernal": "f16"}, UnmatchedRule), ({"**": "f16", "bias": "f16"}, ShadowedRule)]
    )
    def test_a_tree_is(self, slot, error):
        with pytest.raises(error):
            Policy(params=slot).cast(plain_tree(), "params")


class TestValues:
    def test_a_cast_of_parameters_saturates(self):
        tree = {"w": jnp.array([1e6, -1e6, 0.5, np.nan])}
        np.testing.assert_array_equal(Policy("f16").cast(tree, "params")["w"], np.float16([65504, -65504, 0.5, np.nan]))

    def test_a_cast_of_the_output_does_not(self):
        cast = Policy(output="f16").cast_output({"y": jnp.array([1e6, 0.5])})
        np.testing.assert_array_equal(cast["y"], np.float16([np.inf, 0.5]))

    def test_integers_booleans_and_keys_are_the_same_objects(self):
        tree = plain_tree()
        cast = Policy("bf16").cast(tree, "params")
        for name in ("steps", "mask", "key", "raw_key"):
            assert cast[name] is tree[name]
        assert cast["dense"]["kernel"] is not tree["dense"]["kernel"]

    def test_what_has_the_dtype_already_is_the_same_object(self):
        tree = plain_tree()
        assert Policy("bf16").cast(tree, "params")["layers"][0]["kernel"] is tree["layers"][0]["kernel"]

    def test_without_an_output_nothing_is_cast(self):
        x = {"y": jnp.ones(2, jnp.float16), "n": 3}
        assert Policy("bf16", "bf16").cast_output(x) is x

    def test_the_output_is_cast_wherever_it_is_floating(self):
        result = (jnp.ones(2), {"ids": jnp.arange(2), "p": np.ones(2, np.float16)}, None, jax.random.key(0))
        cast = Policy(output="bf16").cast_output(result)
        assert cast[0].dtype == cast[1]["p"].dtype == jnp.bfloat16
        assert cast[1]["ids"] is result[1]["ids"]
        assert cast[2] is None
        assert cast[3] is result[3]

    def test_numpy_arrays_and_shapes_under_jit_are_cast_too(self):
        assert Policy("bf16").cast({"w": np.ones(2, np.float32)}, "params")["w"].dtype == jnp.bfloat16
        shapes = jax.eval_shape(lambda tree: Policy("bf16").cast(tree, "params"), {"w": jnp.ones(2)})
        assert shapes["w"].dtype == jnp.bfloat16


class TestUniform:
    """The uniform policies of jmp: `p=bf16,c=bf16,o=f32`."""

    policy = Policy.parse("params=bf16,compute=bf16,output=f32")

    @pytest.mark.parametrize("slot", ["params", "compute"])
    def test_every_float_is_cast_and_nothing_else(self, slot):
        cast = self.policy.cast(plain_tree(), slot)
        expected = jax.tree.map(
            lambda x: x.astype("bfloat16") if jnp.issubdtype(x.dtype, jnp.floating) else x, plain_tree()
        )
        chex.assert_trees_all_equal_structs(cast, expected)
        assert dtypes(cast) == dtypes(expected)
        del cast["key"], expected["key"]  # chex compares no keys
        chex.assert_trees_all_equal(cast, expected)

    def test_the_output_is_cast(self):
        assert self.policy.cast_output(jnp.ones(2, jnp.bfloat16)).dtype == jnp.float32

    def test_under_jit_and_grad(self):
        def loss(params):
            return jnp.sum(self.policy.cast_output(self.policy.cast(params, "compute")["w"] ** 2))

        gradient = jax.jit(jax.grad(loss))({"w": jnp.array([1.0, 3.0])})
        assert gradient["w"].dtype == jnp.float32
        assert gradient["w"].tolist() == [2.0, 6.0]


PAIR = {"dense": {"kernel": KERNEL, "scale_inv": SCALE, "bias": jnp.ones(4)}}


class TestPairs:
    @pytest.mark.parametrize("slot", ["params", "compute"])
    @pytest.mark.parametrize("name", ["bf16", "f32", "fp8_weight_only"])
    def test_are_left_whole(self, slot, name):
        cast = get_policy(name).cast(PAIR, slot)
        assert cast["dense"]["kernel"] is KERNEL
        assert cast["dense"]["scale_inv"] is SCALE

    def test_are_left_whole_by_rules_that_name_them(self):
        policy = Policy(params={"kernel": "bf16", "scale_inv": "bf16", "bias": "bf16"})
        cast = policy.cast(PAIR, "params")
        assert cast["dense"]["kernel"] is KERNEL
        assert cast["dense"]["scale_inv"] is SCALE
        assert cast["dense"]["bias"].dtype == jnp.bfloat16

    def test_of_any_parameter(self):
        tree = {"embedding": KERNEL, "embedding_scale_inv": SCALE}
        chex.assert_trees_all_equal(Policy("bf16").cast(tree, "params"), tree)

    def test_a_plain_leaf_cannot_be_cast_narrow(self):
        with pytest.raises(UnsupportedCast) as caught:
            Policy(params={"kernel": "f8_e4m3fn"}).cast({"a": {"kernel": jnp.ones((2, 2))}}, "params")
        assert str(caught.value) == (
            "a/kernel: a plain f32 array cannot be cast to f8_e4m3fn (params, rule 'kernel') without scales, "
            "which a cast cannot add. Use policy.store(tree), perparam.init or perparam.quantize."
        )
        with pytest.raises(UnsupportedCast, match="a/kernel: a plain f32 array cannot be cast to f8_e4m3fn"):
            Policy(params={"kernel": "f8_e4m3fn"}).cast(jnp.ones((2, 2)), "params", path="a/kernel")

    def test_half_a_pair_cannot_be_cast_wide(self):
        with pytest.raises(
            UnsupportedCast,
            match=r"a/kernel: a f8_e4m3fn array cannot be cast without its scales. Add 'a/scale_inv' to the tree",
        ):
            Policy("bf16").cast({"a": {"kernel": KERNEL}}, "params")


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, kernel_init=nn.with_partitioning(nn.initializers.ones, ("in", "out")))(x)


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.dense = nnx.Linear(2, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs)])


class TestStructures:
    @given(
        rules=st.dictionaries(
            st.sampled_from(["dense/kernel", "dense/bias", "layers/0/kernel", "layers/1/*", "steps", "mask"]),
            st.sampled_from([*ACTIVATIONS, None]),
        ),
        default=st.sampled_from([*ACTIVATIONS, None]),
        slot=st.sampled_from(["params", "compute"]),
    )
    def test_no_policy_changes_a_structure_or_a_shape(self, rules, default, slot):
        tree = plain_tree()
        cast = Policy(**{slot: rules | {"default": default}}).cast(tree, slot)
        chex.assert_trees_all_equal_structs(cast, tree)
        chex.assert_trees_all_equal_shapes(cast, tree)

    def test_linen_variables_lose_params_from_their_paths_and_keep_other_collections(self):
        variables = {"params": {"a": {"kernel": jnp.ones((2, 2))}}, "batch_stats": {"a": {"mean": jnp.ones(2)}}}
        cast = Policy(params={"a/kernel": "bf16"}).cast(variables, "params")
        assert dtypes(cast) == {"params/a/kernel": "bfloat16", "batch_stats/a/mean": "float32"}
        assert cast["batch_stats"]["a"]["mean"] is variables["batch_stats"]["a"]["mean"]

    def test_linen_boxes_keep_their_names(self):
        variables = Boxed().init(jax.random.key(0), np.ones((1, 2), np.float32))
        cast = Policy(compute={"Dense_0/kernel": "bf16"}).cast(variables, "compute")
        chex.assert_trees_all_equal_structs(cast, variables)
        kernel = cast["params"]["Dense_0"]["kernel"]
        assert isinstance(kernel, nn.Partitioned)
        assert kernel.names == ("in", "out")
        assert kernel.unbox().dtype == jnp.bfloat16

    def test_frozen_dicts_stay_frozen(self):
        cast = Policy("bf16").cast(freeze({"params": {"a": {"kernel": jnp.ones((2, 2))}}}), "params")
        assert isinstance(cast, FrozenDict)
        assert cast["params"]["a"]["kernel"].dtype == jnp.bfloat16

    def test_an_nnx_state_keeps_its_variables_and_only_params_are_cast(self):
        state = nnx.state(Model(nnx.Rngs(0)))
        cast = Policy(params={"layers/0/kernel": None, "kernel": "bf16", "default": "f16"}).cast(state, "params")
        chex.assert_trees_all_equal_structs(cast, state)
        assert isinstance(cast, nnx.State)
        assert cast["dense"]["kernel"].dtype == jnp.bfloat16
        assert cast["layers"][0]["kernel"].dtype == jnp.float32
        assert cast["norm"]["scale"].dtype == jnp.float16
        assert cast["norm"]["mean"].dtype == jnp.float32
        assert isinstance(cast["norm"]["mean"], nnx.BatchStat)
        assert bits(jax.random.key_data(cast["drop"]["rngs"]["key"][...])) == bits(
            jax.random.key_data(state["drop"]["rngs"]["key"][...])
        )

    def test_an_nnx_module_is_cast_into_a_new_one(self):
        model = Model(nnx.Rngs(0))
        cast = Policy("bf16").cast(model, "params")
        assert isinstance(cast, Model)
        assert cast.dense.kernel.dtype == jnp.bfloat16
        assert cast.norm.mean.dtype == jnp.float32
        assert model.dense.kernel.dtype == jnp.float32

    def test_narrow_variables_are_left_whole(self):
        state = nnx.State({"a": {"kernel": Narrow(KERNEL, block=(2, 2)), "scale_inv": Narrow(SCALE, block=(2, 2))}})
        cast = Policy("bf16").cast(state, "compute")
        assert bits(cast["a"]["kernel"][...]) == bits(KERNEL)
        assert bits(cast["a"]["scale_inv"][...]) == bits(SCALE)
        assert cast["a"]["kernel"].get_metadata()["block"] == (2, 2)
