"""`save_params`, and `load_params` of what it wrote: the same bits, dtypes, paths and blocks, for any tree."""

import functools
import json

import chex
import hypothesis.strategies as st
import jax
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from flax.traverse_util import unflatten_dict
from hypothesis import given, settings

import perparam
from perparam import Policy, quantize
from perparam.policies import ScaledArray
from perparam.policies.errors import InvalidScale, SaveFailed, UnknownDtype, UnpairedScale, UnsupportedExport
from perparam.policies.trees import parameters

DTYPES = [
    np.dtype(getattr(ml_dtypes, name, name))
    for name in "float32 float16 bfloat16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool complex64".split()
]
FORMATS = ["mxfp8", {"dtype": "int8", "block": [1, -1]}, *(
    {"dtype": dtype, "block": block, "scale": scale}
    for dtype, block, scale in (("f8_e4m3fn", [16, 24], "f32"), ("f8_e5m2", [-1, -1], "bf16"))
)]  # fmt: skip


def same_bits(found, wanted) -> bool:
    found, wanted = parameters(found), parameters(wanted)
    return found.keys() == wanted.keys() and all(
        found[path].dtype == wanted[path].dtype
        and found[path].shape == wanted[path].shape
        and np.asarray(found[path]).tobytes() == np.asarray(wanted[path]).tobytes()
        for path in wanted
    )


@functools.cache
def pair(index: int, rows: int, columns: int) -> ScaledArray:
    weight = np.random.default_rng(index).normal(size=(rows, columns)).astype(np.float32)
    return quantize(weight, FORMATS[index])


@st.composite
def leaves(draw):
    if draw(st.booleans()):
        return pair(draw(st.integers(0, len(FORMATS) - 1)), 40, 64)
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([(), (3,), (0, 4), (2, 3), (2, 1, 3)]))
    raw = draw(st.binary(min_size=48 * 8, max_size=48 * 8))
    values = np.frombuffer(raw, np.uint8 if dtype.kind == "b" else dtype)[: int(np.prod(shape))]
    return (values % 2).astype(bool).reshape(shape) if dtype.kind == "b" else values.reshape(shape)


NAMES = st.sampled_from(["kernel", "weight", "bias", "a", "b_c", "0"])
TREES = st.recursive(leaves(), lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3), max_leaves=6)


@settings(max_examples=15, deadline=None)
@given(st.dictionaries(NAMES, TREES, min_size=1, max_size=3), st.sampled_from([100, 4000, "5GB"]))
def test_any_tree_comes_back_bit_for_bit(tmp_path_factory, tree, limit):
    folder = perparam.save_params(tree, tmp_path_factory.mktemp("params") / "saved", max_shard_size=limit)
    again = perparam.load_params(folder, scaled=True)
    assert same_bits(again, tree)
    formats = {path: leaf.format for path, leaf in again.items() if isinstance(leaf, ScaledArray)}
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, ScaledArray))
    paths = {"/".join(str(key.key) for key in keys): leaf for keys, leaf in flat}
    assert formats == {path: leaf.format for path, leaf in paths.items() if isinstance(leaf, ScaledArray)}


def test_without_scaled_a_pair_has_two_paths(tmp_path):
    tree = {"up": {"kernel": pair(2, 40, 64)}, "head": {"weight": pair(2, 40, 64)}}
    found = perparam.load_params(perparam.save_params(tree, tmp_path / "saved"))
    assert list(found) == ["head/weight", "head/weight_scale_inv", "up/kernel", "up/scale_inv"]
    assert same_bits(found, tree)


def test_the_policy_is_applied_while_it_is_saved(tmp_path):
    weight = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32)
    tree, policy = {"up": {"kernel": weight, "bias": weight[0]}}, Policy({"kernel": FORMATS[2], "bias": "bf16"})
    found = perparam.load_params(perparam.save_params(tree, tmp_path / "saved", policy), scaled=True)
    assert same_bits(found, policy.store(tree))
    assert found["up/kernel"].block == (16, 24)


def test_a_mapping_does_not_store_a_block_and_needs_a_policy_that_names_it(tmp_path):
    stored = Policy({"kernel": FORMATS[2]}).store({"up": {"kernel": np.ones((40, 64), np.float32)}})
    with pytest.raises(InvalidScale, match="Name the block the kernel was quantised with"):
        perparam.save_params(stored, tmp_path / "saved")
    folder = perparam.save_params(stored, tmp_path / "saved", Policy({"kernel": FORMATS[2]}))
    assert same_bits(perparam.load_params(folder), stored)


def test_linen_variables_come_back_without_their_collection(tmp_path):
    variables = {"params": {"Dense_0": {"kernel": np.ones((200, 130), np.float32), "bias": np.ones(130, np.float32)}}}
    variables = perparam.get_policy("fp8_weight_only").store(variables)
    found = perparam.load_params(perparam.save_params(variables, tmp_path / "saved"))
    again = {"params": unflatten_dict(found, sep="/")}
    chex.assert_trees_all_equal(again, variables)


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.drop = nnx.BatchNorm(3, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)


@pytest.mark.parametrize(
    ("tree", "lost", "remedy"),
    [
        (
            TrainState.create(apply_fn=None, params={"a": np.ones(2)}, tx=optax.adam(1.0)),
            "step, opt_state",
            r"state\.params",
        ),
        ({"a": np.ones(2), "t": 0.5, "rng": jax.random.key(0)}, "rng, t", "a tree of arrays alone"),
        ({"params": {"a": np.ones(2), "n": 3}}, "n", "a tree of arrays alone"),
        ({"a": np.ones(2), "o": optax.adam(1.0).init({"b": np.ones(2)})}, "o/0", "a tree of arrays alone"),
        ({"params": {"a": np.ones(2)}, "batch_stats": {"mean": np.ones(2)}}, "batch_stats", r"variables\['params'\]"),
        (Normed(nnx.Rngs(0)), "norm/mean, norm/var", r"nnx\.state\(model, \(nnx\.Param"),
        (nnx.state(Normed(nnx.Rngs(0))), "norm/mean, norm/var", r"nnx\.state\(model, \(nnx\.Param"),
    ],
    ids=["train state", "scalars", "in params", "optax", "linen", "module", "state"],
)
def test_what_would_be_lost_is_refused(tmp_path, tree, lost, remedy):
    with pytest.raises(UnsupportedExport, match=f"^{lost}: not parameters, and would be lost. Pass {remedy}"):
        perparam.save_params(tree, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_the_parameters_of_an_nnx_model_are_saved(tmp_path):
    state = nnx.state(Normed(nnx.Rngs(0)), (nnx.Param, perparam.policies.Narrow))
    found = perparam.load_params(perparam.save_params(state, tmp_path / "saved"))
    assert list(found) == ["norm/bias", "norm/scale"]


@pytest.mark.parametrize(
    ("tree", "error", "text"),
    [
        ({}, UnsupportedExport, "dict: has no parameters. Pass a tree of arrays"),
        ({"a": {"b": np.ones(2)}, "a.b": np.ones(2)}, UnsupportedExport, "a/b and a.b have no name of their own"),
        ({"a": np.ones(2), "a/b": np.ones(2)}, UnsupportedExport, r"a is a tensor, and a\.b is within it. Rename one"),
        ({"w": pair(1, 40, 64), "w_scale": np.ones(4, "f4")}, UnsupportedExport, "w_scale_inv and w_scale both have"),
        ({"a.b": {"kernel": np.ones(2)}}, UnsupportedExport, r"a\.b/kernel: would have the path a/b/kernel when"),
        ({"\n": np.ones(2)}, UnsupportedExport, r"has no name of their own"),
        ({"a": jax.ShapeDtypeStruct((2,), np.float32)}, UnsupportedExport, "a: ShapeDtypeStruct has no values"),
        ({"a": np.ones(2, np.complex128)}, UnsupportedExport, "a: safetensors files have no dtype c128"),
        ({"a": np.ones((2, 2), ml_dtypes.float8_e4m3fn)}, UnpairedScale, "a: f8_e4m3fn .* without its scales"),
    ],
)  # fmt: skip
def test_what_files_cannot_hold_is_refused_and_nothing_is_written(tmp_path, tree, error, text):
    with pytest.raises(error, match=text):
        perparam.save_params(tree, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_flat_names_with_dots_are_names_of_paths(tmp_path):
    tree = {"layer.0.kernel": pair(2, 40, 64), "layer.0.bias": np.ones(2, np.float32)}
    found = perparam.load_params(perparam.save_params(tree, tmp_path / "saved"), scaled=True)
    assert same_bits(found, {path.replace(".", "/"): leaf for path, leaf in tree.items()})


def test_64_bit_floats_are_saved_and_loaded_under_a_policy_that_casts_them(tmp_path):
    folder = perparam.save_params({"a": np.array([1e300, 0.1, -np.inf]), "b": np.ones(2, np.int64)}, tmp_path / "saved")
    assert perparam.checkpoint_tree(folder)["a"].dtype == np.float64
    for policy in ("f32", Policy({"a": "f32"})):
        found = perparam.load_params(folder, policy)["a"]
        assert found.dtype == np.float32
        assert found.tolist() == [np.finfo(np.float32).max, np.float32(0.1), -np.inf]
    with pytest.raises(UnknownDtype, match=r'^a: float64 needs jax_enable_x64.*such as Policy\(\{"a": "f32"\}\)\.$'):
        perparam.load_params(folder)


@pytest.mark.parametrize("policy", [None, "bf16"])
def test_the_byte_order_is_that_of_the_machine(tmp_path, policy):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = perparam.load_params(perparam.save_params({"a": values.astype(">f4")}, tmp_path / "saved", policy))
    assert (np.asarray(found["a"]).astype(np.float32) == values).all()


def test_a_model_in_the_folder_is_not_deleted(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SaveFailed, match=r"contains config\.json, which saving would delete"):
        perparam.save_params({"a": np.ones(2)}, tmp_path)
    (tmp_path / "config.json").unlink()
    for value in (1, 2):
        perparam.save_params({"a": np.full(2, value)}, tmp_path)
    assert perparam.load_params(tmp_path)["a"].tolist() == [2, 2]


def test_other_programs_read_the_names_and_dtypes(tmp_path):
    import safetensors

    folder = perparam.save_params({"encoder": [{"kernel": np.ones((2, 3), np.float16)}]}, tmp_path / "saved")
    with safetensors.safe_open(folder / "model.safetensors", framework="np") as file:
        assert file.get_tensor("encoder.0.kernel").dtype == np.float16
        assert file.metadata() == {"format": "pt"}
    folder = perparam.save_params({"a": {"kernel": pair(2, 40, 64)}}, tmp_path / "saved")
    with safetensors.safe_open(folder / "model.safetensors", framework="np") as file:
        assert json.loads(file.metadata()["perparam.blocks"]) == {"a.kernel": [16, 24]}
