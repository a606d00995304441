"""Trees of every kind: what is a parameter, and that nothing is dropped, doubled or passed over in silence."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn
from flax import nnx

import perparam
from perparam.policies import InvalidScale, ScaledArray, UnsupportedCast, parameters

NARROW = perparam.Policy({"kernel": "f8_e4m3fn", "default": "bf16"})


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: jax.Array
    bias: jax.Array


def layer():
    return Layer(jnp.ones((4, 4)), jnp.ones(4))


def dtypes(tree):
    return jax.tree.map(lambda leaf: leaf.dtype.name, tree)


class Pair(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


CONTAINERS = pytest.mark.parametrize("container", [Layer, Pair])


@CONTAINERS
def test_a_scaled_array_stands_in_the_leafs_place_where_a_container_has_no_room(container):
    tree = {"a": container(jnp.full((4, 4), 3.0), jnp.ones(4)), "b": {"kernel": jnp.ones((4, 4))}}
    stored = NARROW.store(tree)
    assert isinstance(stored["a"], container)
    assert isinstance(stored["a"].kernel, ScaledArray)
    assert set(stored["b"]) == {"kernel", "scale_inv"}
    plan = NARROW.explain(stored)
    assert {row.path: row.change for row in plan.rows} == dict.fromkeys(parameters(stored), "kept")
    assert plan.total_bytes == NARROW.explain(tree).total_bytes == sum(x.nbytes for x in jax.tree.leaves(stored))


@CONTAINERS
def test_scaled_arrays_are_kept_dequantised_and_requantised(container):
    tree = container(jnp.full((4, 4), 3.0), jnp.ones(4, jnp.bfloat16))
    stored = NARROW.store(tree)
    again = NARROW.store(stored)
    assert again.kernel.values is stored.kernel.values
    assert again.kernel.scale_inv is stored.kernel.scale_inv
    np.testing.assert_array_equal(perparam.Policy("f32").store(stored).kernel, tree.kernel)
    other = perparam.Policy({"kernel": {"dtype": "int8", "block": [1, -1]}}).store(stored).kernel
    assert (other.dtype, other.scale_inv.shape) == (np.dtype("int8"), (4, 1))


@CONTAINERS
def test_scaled_arrays_pass_through_casts_and_tree_maps(container):
    stored = NARROW.store({"a": container(jnp.ones((4, 4)), jnp.ones(4))})
    cast = perparam.Policy(compute="f32").cast(stored, "compute")
    assert cast["a"].kernel is stored["a"].kernel
    assert cast["a"].bias.dtype == jnp.float32
    doubled = jax.tree.map(lambda leaf: leaf * 2 if leaf.dtype == jnp.float32 else leaf, stored)
    np.testing.assert_array_equal(doubled["a"].kernel.dequantize(), 2 * np.ones((4, 4)))
    shapes = jax.eval_shape(NARROW.store, {"a": container(jnp.ones((4, 4)), jnp.ones(4))})
    assert NARROW.explain(shapes).total_bytes == NARROW.explain(stored).total_bytes


@CONTAINERS
def test_scaled_arrays_are_saved_by_path(container, tmp_path):
    stored = NARROW.store({"a": container(jnp.full((4, 4), 3.0), jnp.ones(4))})
    safetensors.numpy.save_file(
        {p: np.asarray(x).view(np.uint8) for p, x in parameters(stored).items()}, tmp_path / "x"
    )
    read = safetensors.numpy.load_file(tmp_path / "x")
    assert set(read) == {"a/kernel", "a/scale_inv", "a/bias"}
    assert read["a/kernel"].tobytes() == np.asarray(stored["a"].kernel.values).tobytes()
    names = [
        jax.tree_util.keystr(keys, simple=True) for keys, _ in jax.tree_util.tree_leaves_with_path(stored["a"].kernel)
    ]
    assert names == ["values", "scale_inv"]


def test_a_scaled_array_is_a_whole_in_training():
    stored = NARROW.store(layer())
    trainable, frozen = perparam.training.partition(stored)
    assert (trainable.kernel, frozen.bias) == (None, None)
    joined = perparam.training.combine(trainable, frozen)
    assert joined.kernel.values is stored.kernel.values


def test_scales_in_a_field_of_their_own_stay_there_and_cannot_go():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Both:
        kernel: jax.Array
        scale_inv: jax.Array

    both = Both(*perparam.quantize(jnp.ones((4, 4)), "f8_e4m3fn"))
    stored = perparam.Policy({"kernel": "int8"}).store(both)
    assert dtypes(stored) == Both("int8", "float32")
    with pytest.raises(UnsupportedCast, match=r"scale_inv: the scales cannot be removed from a Both. Store the pair"):
        perparam.Policy("f32").store(both)


def test_pairs_of_mappings_become_scaled_arrays_on_request_and_know_their_block():
    policy = perparam.Policy({"kernel": "f8_e4m3fn"}, block=(200, 200))
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(256, 256)) * np.arange(1, 257), jnp.float32)
    stored = policy.store({"a": {"kernel": weight, "bias": jnp.ones(4)}}, scaled=True)
    assert set(stored["a"]) == {"kernel", "bias"}
    np.testing.assert_allclose(perparam.Policy("f32").store(stored)["a"]["kernel"], weight, rtol=2.0**-3, atol=0.02)
    whole = perparam.Policy().store(policy.store({"a": {"kernel": weight}}), scaled=False)
    # Blocks of 200 and of 128 have the same grid on 256, so that the plain pair, read by another policy, is wrong.
    wrong = perparam.Policy("f32").store(whole)["a"]["kernel"]
    assert np.linalg.norm(wrong - weight) > 0.05 * np.linalg.norm(weight)


def test_a_plain_pair_is_read_in_the_block_of_its_rule_and_refused_where_the_grid_shows_another():
    stored = perparam.Policy({"kernel": {"dtype": "f8_e4m3fn", "block": [64, 64]}}).store(
        {"kernel": jnp.ones((256, 256))}
    )
    assert (
        perparam.Policy({"kernel": {"dtype": "f8_e4m3fn", "block": [64, 64]}}).explain(stored).rows[0].change == "kept"
    )
    for policy in (perparam.Policy(), perparam.Policy(block=(32, 32)), perparam.Policy("bf16")):
        with pytest.raises(InvalidScale, match=r"scales of shape \(4, 4\) do not fit .*Name the block"):
            policy.store(stored)
        with pytest.raises(InvalidScale, match="Name the block"):
            policy.explain(stored)


def test_in_a_container_that_needs_no_room_everything_is_cast():
    policy = perparam.Policy({"b/kernel": "f8_e4m3fn", "default": "bf16"})
    stored = dtypes(policy.store({"a": layer(), "b": {"kernel": jnp.ones((4, 4))}}))
    assert stored["a"] == Layer("bfloat16", "bfloat16")
    assert stored["b"] == {"kernel": "float8_e4m3fn", "scale_inv": "float32"}


def test_lists_and_tuples_may_stand_anywhere_above_a_mapping():
    stored = NARROW.store([{"kernel": jnp.ones((4, 4))}, (jnp.ones(3),)])
    assert dtypes(stored) == [{"kernel": "float8_e4m3fn", "scale_inv": "float32"}, ("bfloat16",)]


def test_two_parameters_of_one_path_are_refused():
    tree = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}
    with pytest.raises(UnsupportedCast, match="a/b: two parameters of the tree have this path"):
        NARROW.explain(tree)


def test_a_flat_dict_gets_scales_by_path():
    stored = NARROW.store({"layers/0/kernel": jnp.ones((4, 4)), "layers/0/bias": jnp.ones(4)})
    assert set(stored) == {"layers/0/kernel", "layers/0/scale_inv", "layers/0/bias"}


def test_scales_in_a_box_are_replicated():
    boxed = {"kernel": nn.Partitioned(jnp.ones((4, 4)), names=("x", None))}
    stored = perparam.Policy({"kernel": "f8_e4m3fn"}).store(boxed)
    assert stored["kernel"].names == ("x", None)
    assert stored["scale_inv"].names == (None, None)
    assert stored["scale_inv"].value.shape == (1, 1)


class Statistics(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True, use_bias=False, use_scale=False)(x)


def test_a_linen_module_without_parameters_keeps_its_statistics():
    x = np.ones((2, 3), np.float32)
    with jax.numpy_dtype_promotion("standard"):
        variables = perparam.init(Statistics(), "bf16", jax.random.key(0), x)
        y = perparam.apply(Statistics(), "bf16", variables, x)
    assert set(jax.tree.leaves(dtypes(variables))) == {"float32"}
    assert y.dtype == jnp.bfloat16


class Table(nnx.Module):
    def __init__(self, *, rngs):
        self.table = jnp.arange(4.0)
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(x + self.table.astype(x.dtype))


def test_an_array_that_is_a_plain_attribute_is_no_parameter():
    state = perparam.init(Table, perparam.Policy({"kernel": "f8_e4m3fn"}, "f32", "f32"), jax.random.key(0))
    policy = perparam.Policy(compute="f32", output="f32")
    assert [row.path for row in policy.explain(state).rows] == ["out/bias", "out/kernel", "out/scale_inv"]
    y = perparam.apply(Table, policy, state, jnp.ones((1, 4)))
    weight = perparam.dequantize(state["out"]["kernel"][...], state["out"]["scale_inv"][...])
    np.testing.assert_allclose(y, (jnp.ones((1, 4)) + jnp.arange(4.0)) @ weight, rtol=1e-6)


class Shared(nnx.Module):
    def __init__(self, *, rngs):
        self.first = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
        self.again, self.itself = self.first, self


def test_a_shared_parameter_counts_once():
    assert perparam.Policy().explain(Shared(rngs=nnx.Rngs(0))).total_bytes == 4 * 4 * 4


def test_a_shared_parameter_of_a_module_is_converted_once_and_stays_shared():
    module = Shared(rngs=nnx.Rngs(0))
    policy = perparam.Policy("bf16", "f16")
    results = policy.store(module), policy.to_compute(module), policy.cast(module, "params")
    for result, dtype in zip(results, ["bfloat16", "float16", "bfloat16"], strict=True):
        assert result.first is result.again
        assert (result.first.kernel.dtype, module.first.kernel.dtype) == (dtype, "float32")


def test_keys_and_integers_are_carried_through():
    tree = {"key": jax.random.key(0), "steps": jnp.arange(3), "w": jnp.ones(3)}
    stored = NARROW.store(tree | {"a": {"kernel": jnp.ones((2, 2))}})
    assert stored["key"] is tree["key"]
    assert stored["steps"].dtype == jnp.int32
    assert stored["w"].dtype == jnp.bfloat16


def test_a_pure_state_is_refused_since_it_does_not_say_what_is_a_parameter():
    layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with pytest.raises(UnsupportedCast, match=r"bias: found \w+ in an nnx.State, expected a variable.*to_pure_dict"):
        perparam.Policy("bf16").explain(nnx.as_pure(nnx.state(layer)))
    assert perparam.Policy("bf16").explain(nnx.to_pure_dict(nnx.state(layer))).total_bytes == 2 * (6 + 3)
