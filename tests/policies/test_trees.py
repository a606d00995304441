"""Trees of every kind: what is a parameter, and that nothing is dropped, doubled or passed over in silence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import perparam
from perparam.policies import UnsupportedCast

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


def test_a_container_without_room_for_scales_is_refused_not_passed_over():
    with pytest.raises(UnsupportedCast, match="a: scales cannot be added to or taken from a Layer"):
        NARROW.store({"a": layer(), "b": {"kernel": jnp.ones((4, 4))}})


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


def test_keys_and_integers_are_carried_through():
    tree = {"key": jax.random.key(0), "steps": jnp.arange(3), "w": jnp.ones(3)}
    stored = NARROW.store(tree | {"a": {"kernel": jnp.ones((2, 2))}})
    assert stored["key"] is tree["key"]
    assert stored["steps"].dtype == jnp.int32
    assert stored["w"].dtype == jnp.bfloat16
