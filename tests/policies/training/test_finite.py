"""`all_finite` and `select_tree`: NaN and infinities in any dtype; the bits of one of two trees."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from perparam.policies import UnsupportedCast
from perparam.policies.scaled_array import quantize, scaled_array
from perparam.training import all_finite, select_tree

FLOATS = ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e8m0fnu"]
HAS_INFINITY = ["float32", "bfloat16", "float16", "float8_e5m2"]


def every_value(name):
    """All values of an 8-bit or 16-bit dtype, and bits of float32 with NaN, infinities, subnormals and -0.0."""
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    if dtype.itemsize == 4:
        return np.array([0, 1 << 31, 1, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F812345], np.uint32).view(dtype)
    return np.arange(2 ** (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}").view(dtype)


def scaled(weight):
    return scaled_array(*quantize(weight, "f8_e4m3fn", (4, 4)), (4, 4))


def bits(x):
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


# jmp's facts.


@pytest.mark.parametrize("value", [jnp.inf, -jnp.inf, jnp.nan])
def test_one_leaf_that_is_not_finite_decides(value):
    bad, good = jnp.array(value), jnp.ones([])
    assert not all_finite({"a": bad})
    assert not all_finite({"a": good, "b": bad})
    assert not all_finite({"a": bad, "b": good})
    assert all_finite({"a": good, "b": good})


def test_trees_without_leaves_are_finite():
    assert all_finite(None)
    assert all_finite({})


@pytest.mark.parametrize("name", FLOATS)
def test_nan_and_infinity_are_found_in_every_dtype_on_host_and_device(name):
    values = every_value(name)
    expected = np.isfinite(values.astype(np.float32))
    for container in (jnp.asarray, np.asarray):
        assert all_finite(container(values[expected]))
        assert [bool(all_finite(container(each))) for each in values[~expected][:4]] == [False] * min(4, sum(~expected))


def test_other_leaves_are_finite():
    tree = {"int": jnp.arange(3), "key": jax.random.key(0), "number": 3, "none": None, "bool": jnp.array(True)}
    tree["float0"] = np.zeros(3, jax.dtypes.float0)
    assert all_finite(tree)
    assert not all_finite(tree | {"number": float("nan")})
    assert all_finite(np.float64(1e300))  # infinite in float32


def test_scales_and_values_of_a_scaled_array_are_checked():
    array = scaled(jnp.ones((4, 4)))
    assert all_finite({"w": array})
    assert not all_finite(jax.tree.map(lambda x: x if x.dtype.itemsize == 1 else x * jnp.nan, array))
    assert not all_finite(jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if x.dtype.itemsize == 1 else x, array))


# The choice.


def test_trees_without_leaves_are_chosen():
    assert select_tree(jnp.bool_(True), None, None) is None
    assert select_tree(jnp.bool_(False), {}, {}) == {}


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("name", FLOATS)
def test_the_chosen_tree_has_all_its_bits(name, jit):
    left = every_value(name)
    right = np.ascontiguousarray(left[::-1])
    assert (bits(jit(select_tree)(True, left, right)) == bits(left)).all()
    assert (bits(jit(select_tree)(False, left, right)) == bits(right)).all()


def test_keys_integers_none_and_scaled_arrays_are_chosen():
    def tree(seed):
        weight = jax.random.normal(jax.random.key(seed), (4, 4))
        array = scaled(weight)
        return {"key": jax.random.key(seed), "n": seed, "w": array, "none": None, "i": jnp.arange(seed, seed + 2)}

    chosen = jax.jit(select_tree)(jnp.array(False), tree(1), tree(2))
    assert (jax.random.key_data(chosen["key"]) == jax.random.key_data(jax.random.key(2))).all()
    assert chosen["n"] == 2
    assert chosen["i"].tolist() == [2, 3]
    assert type(chosen["w"]) is type(tree(2)["w"])
    assert (bits(chosen["w"].values) == bits(tree(2)["w"].values)).all()
    assert chosen["w"].scale_inv == tree(2)["w"].scale_inv


@pytest.mark.parametrize("condition", [jnp.ones([1], bool), jnp.ones([]), 1])
def test_a_condition_is_a_boolean_scalar(condition):
    with pytest.raises(UnsupportedCast, match=r"condition: expected a boolean scalar, found .*perparam.*all_finite"):
        select_tree(condition, None, None)


def test_trees_that_differ_are_an_error():
    with pytest.raises(UnsupportedCast, match=r"differ in structure: .*Pass trees of one structure"):
        select_tree(True, {"a": 1}, {"b": 1})
    with pytest.raises(UnsupportedCast, match=r"a/0: float32 \(2,\) and bfloat16 \(2,\) differ. Cast both"):
        select_tree(True, {"a": [jnp.ones(2)]}, {"a": [jnp.ones(2, jnp.bfloat16)]})
