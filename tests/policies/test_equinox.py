"""Equinox modules, whose fields are fixed: narrow weights become `ScaledArray`s in their place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perparam
from perparam.policies import parameters

eqx = pytest.importorskip("equinox")

POLICY = perparam.Policy({"layers/*/weight": {"dtype": "f8_e4m3fn", "block": [8, 16]}, "default": "bf16"}, "f32", "f32")


@pytest.fixture(scope="module")
def model():
    return eqx.nn.MLP(12, 4, 20, 2, key=jax.random.key(0))


def test_its_weights_are_stored_planned_and_kept(model):
    stored = POLICY.store(model)
    assert isinstance(stored, eqx.nn.MLP)
    assert [layer.weight.format.block for layer in stored.layers] == [(8, 16)] * 3
    assert {layer.bias.dtype.name for layer in stored.layers} == {"bfloat16"}
    plan = POLICY.explain(model)
    assert plan.total_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(eqx.filter(stored, eqx.is_array)))
    assert {row.change for row in POLICY.explain(stored).rows} == {"kept"}
    assert POLICY.store(stored).layers[0].weight.values is stored.layers[0].weight.values


def test_it_runs_after_its_weights_are_dequantised_inside_the_program(model):
    stored, x = POLICY.store(model), jnp.ones(12)

    @eqx.filter_jit
    def run(stored, x):
        return POLICY.to_compute(stored)(x)

    wide = perparam.Policy("f32").store(stored)
    np.testing.assert_allclose(run(stored, x), wide(x), rtol=1e-6)  # the same float32 sums, fused otherwise
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(wide(x), model(x), rtol=1e-6)


def test_its_parameters_have_the_paths_that_rules_name(model):
    paths = list(parameters(POLICY.store(model)))
    assert paths[:3] == ["layers/0/weight", "layers/0/weight_scale_inv", "layers/0/bias"]


def test_a_checkpoint_of_leaves_reads_back(model, tmp_path):
    stored = POLICY.store(model)
    as_bits = jax.tree.map(lambda x: np.asarray(x).view(np.uint8) if eqx.is_array(x) else x, stored)
    eqx.tree_serialise_leaves(tmp_path / "model.eqx", as_bits)
    like = jax.tree.map(lambda x: np.zeros_like(x) if isinstance(x, np.ndarray) else x, as_bits)
    read = eqx.tree_deserialise_leaves(tmp_path / "model.eqx", like)
    assert read.layers[0].weight.format == stored.layers[0].weight.format
    assert (read.layers[0].weight.values == as_bits.layers[0].weight.values).all()
