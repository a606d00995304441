"""`Embedding` and `RMSNorm`: gathers that dequantise as they go, and where the norm rounds.

`Linear` has its own file.
"""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import perparam
from perparam.models import Embedding, RMSNorm

BF16 = ml_dtypes.bfloat16
VOCABULARY, FEATURES, BLOCK = 45, 20, (16, 8)
NARROW = ["f8_e4m3fn", "f8_e5m2", "int8"]
IDS = jnp.array([[0, 15, 16, 44], [31, 32, 3, 3]])


def embedding(storage=None, compute=None):
    params = None if storage is None else {"embedding": storage}
    policy = perparam.Policy(params, {"embedding": compute[0], "default": compute[1]} if compute else None, block=BLOCK)
    return Embedding(VOCABULARY, FEATURES, policy=policy, rngs=nnx.Rngs(0))


def table(layer) -> np.ndarray:
    """The rows in float32."""
    if layer.embedding_scale_inv is None:
        return np.asarray(layer.embedding[...].astype(jnp.float32))
    return np.asarray(perparam.dequantize(layer.embedding[...], layer.embedding_scale_inv[...], BLOCK))


@pytest.mark.parametrize("storage", [None, "bf16", *NARROW])
def test_a_gather_gives_the_rows_of_the_table(storage):
    layer = embedding(storage, ("f32", "f32"))
    np.testing.assert_array_equal(layer(IDS), table(layer)[np.asarray(IDS)])


@pytest.mark.parametrize("storage", NARROW)
def test_a_narrow_table_has_a_scale_a_block(storage):
    layer = embedding(storage)
    assert layer.embedding[...].dtype == perparam.policies.dtypes.as_dtype(storage)
    assert layer.embedding_scale_inv[...].shape == (3, 3)
    assert layer.embedding.block == BLOCK


def test_rows_are_rounded_to_their_compute_dtype_and_then_to_the_activations():
    layer = embedding(None, ("bf16", "f32"))
    rows = layer(IDS)
    assert rows.dtype == jnp.float32
    np.testing.assert_array_equal(rows, table(layer)[np.asarray(IDS)].astype(BF16).astype(np.float32))
    assert embedding(None, (None, "bf16"))(IDS).dtype == jnp.bfloat16


@pytest.mark.parametrize("storage", [None, "bf16", *NARROW])
@pytest.mark.parametrize("outside", [VOCABULARY, 10**6, -1, -(10**6)])
def test_an_id_outside_the_table_gives_nan_and_not_a_neighbour(storage, outside):
    rows = np.asarray(embedding(storage, (None, "f32"))(jnp.array([[3, outside, 44]])))
    assert np.isnan(rows[0, 1]).all()
    assert np.isfinite(rows[0, [0, 2]]).all()


@pytest.mark.parametrize("storage", [None, *NARROW])
def test_a_tied_head_is_the_transposed_table(storage):
    layer = embedding(storage, (None, "f32"))
    x = np.random.default_rng(0).normal(size=(2, FEATURES)).astype(np.float32)
    # Twenty products a sum, each rounded to 2**-24.
    np.testing.assert_allclose(layer.attend(x), x @ table(layer).T, atol=20 * 2**-24 * 4)


def test_a_tied_head_computes_as_the_rule_of_embedding_says():
    rounded = embedding(None, ("bf16", "f32"))
    x = np.random.default_rng(0).normal(size=(2, FEATURES)).astype(np.float32)
    exact = x.astype(BF16).astype(np.float32) @ table(rounded).astype(BF16).astype(np.float32).T
    logits = rounded.attend(x)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, exact, atol=20 * 2**-24 * 4)


# RMSNorm.


def norm(compute=None, features=24):
    layer = RMSNorm(features, eps=1e-6, policy=perparam.Policy(compute=compute), rngs=nnx.Rngs(0))
    scale = np.random.default_rng(1).uniform(0.5, 1.5, features).astype(np.float32)
    layer.scale[...] = jnp.asarray(scale)
    return layer, scale


def normalised(x) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(3, 24)).astype(np.float32) * [[1e-3], [1.0], [1e3]]


def test_rows_are_divided_by_their_root_mean_square(x):
    layer, scale = norm("f32")
    np.testing.assert_allclose(layer(x.astype(np.float32)), normalised(x) * scale, rtol=2**-20)


def test_epsilon_holds_zero_rows_at_zero():
    layer, _ = norm("f32")
    np.testing.assert_array_equal(layer(np.zeros((2, 24), np.float32)), np.zeros((2, 24)))


def test_the_normalised_row_is_rounded_before_the_product_as_in_the_reference(x):
    layer, scale = norm("bf16")
    x = x.astype(BF16)
    exact = (
        normalised(x).astype(np.float32).astype(BF16).astype(np.float32) * scale.astype(BF16).astype(np.float32)
    ).astype(BF16)
    found = layer(jnp.asarray(x))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, exact)
    assert not np.array_equal(exact, (normalised(x) * scale).astype(np.float32).astype(BF16))


def test_a_scale_computed_in_float32_rounds_once(x):
    layer, scale = norm({"scale": "f32", "default": "bf16"})
    x = x.astype(BF16)
    found = layer(jnp.asarray(x))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, (normalised(x) * scale).astype(np.float32).astype(BF16))


def test_without_a_policy_the_result_has_the_dtype_of_the_input(x):
    layer, _ = norm()
    assert layer(jnp.asarray(x, jnp.float32)).dtype == jnp.float32
    assert layer(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
