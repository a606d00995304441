"""`Policy.to_compute`: plain arrays in compute dtypes, for code that knows nothing of perparam."""

import dataclasses
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import perparam
from perparam import Policy
from perparam.policies import UnknownDtype, UnsupportedCast

eqx = pytest.importorskip("equinox")

POLICY = Policy({"**/{kernel,w,weight}": "f8_e4m3fn"}, {"bias": None, "default": "bf16"}, block=(16, 8))
BOTH = POLICY.replace(compute="bf16")
WEIGHT = np.random.default_rng(0).normal(size=(40, 24)).astype(np.float32)
BIAS = np.ones(40, np.float32)


class Pair(NamedTuple):
    weight: object
    bias: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    weight: object
    bias: object


TREES = {
    "a dict": {"kernel": WEIGHT, "bias": BIAS},
    "Haiku's dicts": {"mlp/~/linear_0": {"w": WEIGHT, "bias": BIAS}},
    "Linen variables": {"params": {"kernel": WEIGHT, "bias": BIAS}, "batch_stats": {"mean": np.zeros(3, np.float32)}},
    "a named tuple": Pair(WEIGHT, BIAS),
    "a dataclass in a list": [Layer(WEIGHT, BIAS)],
}


@pytest.mark.parametrize(("name", "scaled"), [*((name, False) for name in TREES), ("a dict", True)])
def test_pairs_are_dequantised_and_the_rest_is_cast(name, scaled):
    tree = TREES[name]
    computed = POLICY.to_compute(POLICY.store(tree, scaled=scaled))
    expected = perparam.quantize(WEIGHT, "f8_e4m3fn", (16, 8)).dequantize("bf16")
    assert jax.tree.structure(computed) == jax.tree.structure(tree)
    by_shape = {leaf.shape: leaf for leaf in jax.tree.leaves(computed)}
    assert by_shape[40, 24].dtype == jnp.bfloat16
    assert (by_shape[40, 24] == expected).all()
    assert by_shape[40,].dtype == np.float32
    assert name != "Linen variables" or computed["batch_stats"] is tree["batch_stats"]


def test_flax_modules_get_the_same_from_apply():
    policy, x = Policy({"kernel": "f8_e4m3fn"}, "bf16", block=(16, 8)), jnp.ones((2, 24), jnp.bfloat16)
    variables = policy.store({"params": {"kernel": WEIGHT.T, "bias": BIAS}})
    y = perparam.apply(nn.Dense(40), policy, variables, x)
    assert (nn.Dense(40).apply(policy.to_compute(variables), x) == y).all()

    state = policy.store(nnx.State({"kernel": nnx.Param(jnp.asarray(WEIGHT.T)), "bias": nnx.Param(jnp.asarray(BIAS))}))
    computed = policy.to_compute(state)
    assert {type(leaf) for _, leaf in nnx.to_flat_state(computed)} == {nnx.Param}
    module = lambda rngs: nnx.Linear(24, 40, rngs=rngs)  # noqa: E731
    assert (perparam.apply(module, policy, state, x) == y).all()


def test_a_narrow_array_without_a_compute_dtype_has_that_of_the_activations():
    policy = Policy({"kernel": "int8"}, {"kernel": None})
    stored = policy.store({"kernel": WEIGHT, "bias": BIAS})
    assert policy.to_compute(stored)["kernel"].dtype == np.float32
    assert policy.to_compute(stored, activations="f16")["kernel"].dtype == np.float16
    assert policy.to_compute(stored, activations="f16")["bias"].dtype == np.float32
    assert policy.replace(compute="bf16").to_compute(stored, activations="f16")["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize("activations", ["int8", "f8_e4m3fn", "i32"])
def test_activations_are_wide_floats(activations):
    with pytest.raises(UnknownDtype, match=f"activations cannot be {activations}. Write f32, bf16 or f16"):
        Policy().to_compute({"kernel": WEIGHT}, activations)


def test_a_narrow_compute_format_is_refused_with_what_can_do_it():
    policy = Policy({"kernel": "f8_e4m3fn"}, {"kernel": "f8_e4m3fn", "default": "bf16"})
    stored = policy.store({"kernel": WEIGHT})
    with pytest.raises(
        UnsupportedCast, match=r"kernel: computing in f8_e4m3fn \(rule 'kernel'\).*Write bf16.*perparam.scaled_matmul"
    ):
        policy.to_compute(stored)


@pytest.mark.parametrize("kind", [pytest.param("Equinox", marks=pytest.mark.slow), "a plain function"])
def test_wide_weights_exist_only_within_the_program(kind):
    x = jnp.ones(24, jnp.bfloat16)
    if kind == "Equinox":
        mlp = BOTH.store(eqx.nn.MLP(24, 40, 40, 0, key=jax.random.key(0)))
        arrays, static = eqx.partition(mlp, eqx.is_array)

        def run(arrays, x):
            return BOTH.to_compute(eqx.combine(arrays, static))(x)

    else:
        arrays = BOTH.store({"kernel": WEIGHT, "bias": BIAS})

        def run(arrays, x):
            params = BOTH.to_compute(arrays)
            return params["kernel"] @ x + params["bias"]

    compiled = jax.jit(run).lower(arrays, x).compile()
    entry = re.search(r"^ENTRY .*?\{$(.*?)^\}", compiled.as_text(), re.M | re.S).group(1)
    arguments = re.findall(r"= (\w+)\[([\d,]*)\]\S* parameter\(", entry)
    assert ("f8e4m3fn", "40,24") in arguments
    assert not [(dtype, shape) for dtype, shape in arguments if shape == "40,24" and dtype != "f8e4m3fn"]
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    assert compiled.memory_analysis().argument_size_in_bytes == stored + x.nbytes
    assert compiled(arrays, x).dtype == jnp.bfloat16
