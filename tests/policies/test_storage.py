"""`policy.store`: every row of the table "Storage (params)" of the design, in every kind of tree."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict, freeze
from helpers import bits, dtype, reference_dequantize, reference_quantize
from hypothesis import given
from hypothesis import strategies as st

from perparam import Policy
from perparam.policies import InvalidPolicy, InvalidScale, Narrow, UnmatchedRule, UnpairedScale, UnsupportedCast
from perparam.policies.blocks import grid_shape

pytestmark = pytest.mark.optimised

BLOCK = (2, 3)
SHAPE = (5, 7)
GRID = (3, 3)
WEIGHT = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
BIAS = np.random.default_rng(1).normal(size=5).astype(np.float32)
F8 = "float8_e4m3fn"


def plain(weight=WEIGHT):
    return {"kernel": jnp.asarray(weight), "bias": jnp.asarray(BIAS)}


def pair(narrow=F8, block=BLOCK, scale_dtype="float32"):
    kernel, scale_inv = reference_quantize(WEIGHT, narrow, block, scale_dtype)
    return {"kernel": jnp.asarray(kernel), "scale_inv": jnp.asarray(scale_inv), "bias": jnp.asarray(BIAS)}


# Every kind of tree: how the parameters of a layer `a` get into it, and out of it again.


def nested(layer):
    return {"a": layer}


def linen(layer):
    return {"params": {"a": layer}, "batch_stats": {"a": {"mean": jnp.ones(3, jnp.float16)}}}


def frozen(layer):
    return freeze(linen(layer))


def state(layer):
    """NNX: pairs are `Narrow`, which know their block."""
    variables = {"mean": nnx.BatchStat(jnp.ones(3, jnp.float16))}
    for name, array in layer.items():
        narrow = "scale_inv" in layer and name in ("kernel", "scale_inv")
        variables[name] = Narrow(array, block=BLOCK) if narrow else nnx.Param(array)
    return nnx.State({"a": variables})


def layer_of(tree) -> dict:
    if isinstance(tree, nnx.State):
        return {name: leaf[...] for name, leaf in tree["a"].items() if not isinstance(leaf, nnx.BatchStat)}
    return dict(tree["params"]["a"] if "params" in tree else tree["a"])


TREES = (nested, linen, frozen, state)
trees = pytest.mark.parametrize("tree", TREES)


def same(left: dict, right: dict) -> bool:
    return {name: bits(x) for name, x in left.items()} == {name: bits(x) for name, x in right.items()}


def change(policy: Policy, tree) -> dict[str, str]:
    return {row.path: row.change for row in policy.explain(tree).rows}


class TestTheTable:
    @trees
    @pytest.mark.parametrize("layer", [plain(), pair(), pair("int8"), pair(scale_dtype="bfloat16")])
    @pytest.mark.parametrize("params", [None, {"kernel": None, "scale_inv": None, "bias": None}])
    def test_null_keeps_everything_bit_for_bit(self, tree, layer, params):
        policy = Policy(params=params, block=BLOCK)
        stored = layer_of(policy.store(tree(layer)))
        assert same(stored, layer)
        assert all(stored[name] is layer[name] for name in layer)
        assert set(change(policy, tree(layer)).values()) == {"kept"}

    @trees
    def test_float_to_float_is_a_saturating_cast(self, tree):
        weight = WEIGHT.copy()
        weight[0, :2] = 1e6, -1e6
        policy = Policy(params={"kernel": "f16"})
        stored = layer_of(policy.store(tree(plain(weight))))
        assert same(stored, {"kernel": np.clip(weight, -65504, 65504).astype(np.float16), "bias": BIAS})
        assert change(policy, tree(plain(weight))) == {"a/kernel": "cast", "a/bias": "kept"}

    @trees
    @pytest.mark.parametrize("narrow", [F8, "float8_e5m2", "int8"])
    def test_a_pair_asked_for_its_own_type_is_kept_bit_for_bit(self, tree, narrow):
        # Where no variable says which block it is, the policy must.
        layer, policy = pair(narrow), Policy(params={"kernel": narrow}, block=None if tree is state else BLOCK)
        assert same(layer_of(policy.store(tree(layer))), layer)
        assert set(change(policy, tree(layer)).values()) == {"kept"}

    @trees
    @pytest.mark.parametrize(("found", "asked"), [(F8, "float8_e5m2"), (F8, "int8"), ("int8", F8)])
    def test_a_pair_asked_for_another_type_is_requantised_through_f32(self, tree, found, asked):
        layer, policy = pair(found), Policy(params={"kernel": asked}, block=BLOCK)
        weight = reference_dequantize(layer["kernel"], layer["scale_inv"], BLOCK, np.float32)
        kernel, scale_inv = reference_quantize(weight, asked, BLOCK)
        assert same(layer_of(policy.store(tree(layer))), layer | {"kernel": kernel, "scale_inv": scale_inv})
        assert change(policy, tree(layer)) == {
            "a/kernel": "requantised",
            "a/scale_inv": "requantised",
            "a/bias": "kept",
        }

    @pytest.mark.parametrize("block", [(4, 4), (128, 128)])
    def test_a_pair_asked_for_another_block_is_requantised_through_f32(self, block):
        layer, policy = pair(), Policy(params={"kernel": F8}, block=block)
        weight = reference_dequantize(layer["kernel"], layer["scale_inv"], BLOCK, np.float32)
        kernel, scale_inv = reference_quantize(weight, F8, block)
        stored = policy.store(state(layer))
        assert same(layer_of(stored), layer | {"kernel": kernel, "scale_inv": scale_inv})
        assert stored["a"]["kernel"].get_metadata()["block"] == block
        assert stored["a"]["scale_inv"].get_metadata()["block"] == block
        assert change(policy, state(layer))["a/kernel"] == "requantised"

    def test_a_block_alone_asks_for_nothing(self):
        layer = pair()
        stored = Policy(block=(4, 4)).store(state(layer))
        assert same(layer_of(stored), layer)
        assert stored["a"]["kernel"].get_metadata()["block"] == BLOCK

    @trees
    @pytest.mark.parametrize("wide", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("uniform", [True, False])
    def test_a_pair_asked_for_a_float_is_dissolved(self, tree, wide, uniform):
        layer, policy = pair(), Policy(params=wide if uniform else {"kernel": wide, "scale_inv": None}, block=BLOCK)
        kernel = reference_dequantize(layer["kernel"], layer["scale_inv"], BLOCK, np.float32).astype(dtype(wide))
        stored = policy.store(tree(layer))
        assert same(layer_of(stored), {"kernel": kernel, "bias": BIAS.astype(dtype(wide if uniform else "float32"))})
        changed = change(policy, tree(layer))
        assert (changed["a/kernel"], changed["a/scale_inv"]) == ("dequantised", "dissolved")
        if tree is state:
            assert type(stored["a"]["kernel"]) is nnx.Param

    @trees
    @pytest.mark.parametrize("narrow", [F8, "float8_e5m2", "int8"])
    def test_a_float_asked_for_a_narrow_type_is_quantised(self, tree, narrow):
        policy = Policy(params={"kernel": narrow}, block=BLOCK)
        kernel, scale_inv = reference_quantize(WEIGHT, narrow, BLOCK)
        stored = policy.store(tree(plain()))
        assert same(layer_of(stored), {"kernel": kernel, "scale_inv": scale_inv, "bias": BIAS})
        assert change(policy, tree(plain())) == {"a/kernel": "quantised", "a/scale_inv": "made", "a/bias": "kept"}
        if tree is state:
            assert {type(stored["a"][name]) for name in ("kernel", "scale_inv")} == {Narrow}
            assert stored["a"]["kernel"].get_metadata()["block"] == BLOCK
            assert type(stored["a"]["bias"]) is nnx.Param

    def test_what_is_quantised_without_a_block_has_that_of_the_checkpoints(self):
        weight = np.random.default_rng(0).normal(size=(130, 260)).astype(np.float32)
        stored = Policy(params={"kernel": F8}).store({"kernel": jnp.asarray(weight)})
        kernel, scale_inv = reference_quantize(weight, F8, (128, 128))
        assert same(stored, {"kernel": kernel, "scale_inv": scale_inv})

    def test_a_plain_tree_has_the_policys_block(self):
        assert same(Policy().store(pair(block=(128, 128))), pair(block=(128, 128)))
        with pytest.raises(
            InvalidScale, match=r"scales of shape \(3, 3\) do not fit.*in blocks of \(128, 128\), expected \(1, 1\)"
        ):
            Policy().store(pair())

    @given(block=st.tuples(*[st.integers(1, 8)] * 2), other=st.tuples(*[st.integers(1, 8)] * 2))
    def test_another_block_is_an_error_where_the_shape_of_the_scales_shows_it(self, block, other):
        stored, policy = pair(block=block), Policy({"kernel": F8}, block=other)
        if grid_shape(SHAPE, block) != grid_shape(SHAPE, other):
            for call in (policy.store, policy.explain, policy.to_compute, Policy(block=other).explain):
                with pytest.raises(InvalidScale, match=r"do not fit a kernel of shape .* expected"):
                    call(stored)
        else:
            assert same(policy.store(stored), stored)


@pytest.mark.parametrize("call", ["store", "to_compute", "cast"])
def test_shapes_in_place_of_arrays_are_answered_with_explain_and_eval_shape(call):
    policy, tree = Policy({"kernel": F8}, "bf16"), {"kernel": jax.ShapeDtypeStruct((4, 4), "float32")}
    with pytest.raises(UnsupportedCast, match=r"kernel: found ShapeDtypeStruct, expected an array. `explain` shows"):
        getattr(policy, call)(tree, *(["compute"] if call == "cast" else []))
    assert jax.eval_shape(policy.store, tree)["kernel"].dtype == F8


class TestScaleRules:
    @trees
    @pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16"])
    def test_a_scale_is_rounded_before_its_kernel_is_quantised(self, tree, scale_dtype):
        policy = Policy(params={"kernel": F8, "scale_inv": scale_dtype}, block=BLOCK)
        kernel, scale_inv = reference_quantize(WEIGHT, F8, BLOCK, scale_dtype)
        assert same(layer_of(policy.store(tree(plain()))), plain() | {"kernel": kernel, "scale_inv": scale_inv})

    @trees
    @pytest.mark.parametrize("kernel_rule", [F8, None])
    def test_rounding_a_found_scale_requantises_its_kernel(self, tree, kernel_rule):
        layer = pair()
        policy = Policy(params={"kernel": kernel_rule, "scale_inv": "bf16"}, block=BLOCK)
        weight = reference_dequantize(layer["kernel"], layer["scale_inv"], BLOCK, np.float32)
        kernel, scale_inv = reference_quantize(weight, F8, BLOCK, "bfloat16")
        assert same(layer_of(policy.store(tree(layer))), layer | {"kernel": kernel, "scale_inv": scale_inv})
        assert change(policy, tree(layer))["a/kernel"] == "requantised"

    @trees
    def test_widening_a_found_scale_keeps_its_kernel(self, tree):
        layer, policy = pair(scale_dtype="bfloat16"), Policy(params={"scale_inv": "f32"}, block=BLOCK)
        stored = layer_of(policy.store(tree(layer)))
        assert same(stored, layer | {"scale_inv": np.asarray(layer["scale_inv"]).astype(np.float32)})
        assert change(policy, tree(layer)) == {"a/kernel": "kept", "a/scale_inv": "cast", "a/bias": "kept"}

    @pytest.mark.parametrize("params", ["f16", {"default": "f16"}, {"**": "f16"}])
    def test_no_other_rule_reaches_a_scale_of_any_parameter(self, params):
        kernel, scale_inv = reference_quantize(WEIGHT, F8, BLOCK)
        tree = {"a": {"embedding": kernel, "embedding_scale_inv": scale_inv, "scale": BIAS}}
        stored = Policy(params=params, block=BLOCK).store(tree)
        assert set(stored["a"]) == {"embedding", "scale"}
        kept = Policy(params={"a/embedding": None, "a/*": "f16"}, block=BLOCK).store(tree)
        assert bits(kept["a"]["embedding_scale_inv"]) == bits(scale_inv)
        assert kept["a"]["scale"].dtype == np.float16


class TestTrees:
    @trees
    def test_other_collections_and_variables_are_carried_uncast(self, tree):
        found = tree(plain())
        stored = Policy(params={"kernel": F8, "default": "bf16"}).store(found)
        if tree is state:
            assert stored["a"]["mean"][...] is found["a"]["mean"][...]
        elif tree is not nested:
            assert stored["batch_stats"]["a"]["mean"] is found["batch_stats"]["a"]["mean"]

    def test_a_frozen_dict_stays_frozen(self):
        assert isinstance(Policy(params={"kernel": F8}).store(frozen(plain())), FrozenDict)

    def test_scales_stand_beside_their_kernel(self):
        tree = {
            "layers": [{"kernel": jnp.asarray(WEIGHT)}, {"up": {"kernel": jnp.asarray(WEIGHT)}}],
            "embedding": jnp.asarray(WEIGHT),
        }
        stored = Policy(params={"kernel": F8, "embedding": "int8"}, block=BLOCK).store(tree)
        assert list(stored["layers"][0]) == ["kernel", "scale_inv"]
        assert list(stored["layers"][1]["up"]) == ["kernel", "scale_inv"]
        assert list(stored) == ["layers", "embedding", "embedding_scale_inv"]
        assert stored["embedding_scale_inv"].shape == GRID

    def test_where_scales_have_no_place_beside_it_a_kernel_becomes_a_scaled_array(self):
        policy = Policy(params={"a/0": F8}, block=BLOCK)
        (stored,) = policy.store({"a": [jnp.asarray(WEIGHT)]})["a"]
        kernel, scale_inv = reference_quantize(WEIGHT, F8, BLOCK)
        assert (bits(stored.values), bits(stored.scale_inv)) == (bits(kernel), bits(scale_inv))
        assert stored.block == BLOCK
        (back,) = Policy("f32").store({"a": [stored]})["a"]  # it knows its block
        np.testing.assert_array_equal(back, reference_dequantize(kernel, scale_inv, BLOCK, np.float32))

    def test_paths_that_cannot_be_told_apart_are_refused(self):
        with pytest.raises(UnsupportedCast, match=r"a/kernel: two parameters of the tree have this path. Rename one"):
            Policy("bf16").store({"a": {"kernel": jnp.asarray(WEIGHT)}, "a/kernel": jnp.asarray(WEIGHT)})

    def test_boxes_are_kept_and_the_scales_get_one(self):
        box = nn.Partitioned(jnp.asarray(WEIGHT), names=("out", "in"))
        stored = Policy(params={"kernel": F8}, block=BLOCK).store({"params": {"a": {"kernel": box}}})["params"]["a"]
        assert stored["kernel"].names == ("out", "in")
        # Replicated: the axis of a grid need not divide among a mesh's devices.
        assert stored["scale_inv"].names == (None, None)
        kernel, scale_inv = reference_quantize(WEIGHT, F8, BLOCK)
        assert same({name: leaf.unbox() for name, leaf in stored.items()}, {"kernel": kernel, "scale_inv": scale_inv})

    def test_metadata_of_variables_is_kept(self):
        tree = nnx.State({"a": {"kernel": nnx.Param(jnp.asarray(WEIGHT), note="mine")}})
        stored = Policy(params={"kernel": F8}).store(tree)
        assert stored["a"]["kernel"].get_metadata()["note"] == "mine"
        back = Policy(params="f32").store(stored)
        assert type(back["a"]["kernel"]) is nnx.Param
        assert back["a"]["kernel"].get_metadata()["note"] == "mine"
        assert "block" not in back["a"]["kernel"].get_metadata()

    def test_a_pair_of_params_becomes_narrow_variables(self):
        tree = nnx.State({"a": {name: nnx.Param(x) for name, x in pair().items()}})
        stored = Policy(block=BLOCK).store(tree)["a"]
        assert {name: type(leaf) for name, leaf in stored.items()} == {
            "kernel": Narrow,
            "scale_inv": Narrow,
            "bias": nnx.Param,
        }
        assert stored["kernel"].get_metadata()["block"] == stored["scale_inv"].get_metadata()["block"] == BLOCK

    def test_leading_axes_are_a_batch(self):
        weight = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
        kernel, scale_inv = reference_quantize(weight, F8, BLOCK)
        assert same(
            Policy(params={"kernel": F8}, block=BLOCK).store({"kernel": jnp.asarray(weight)}),
            {"kernel": kernel, "scale_inv": scale_inv},
        )

    def test_integers_are_never_quantised(self):
        tree = {"table": jnp.arange(4).reshape(2, 2), "kernel": jnp.asarray(WEIGHT)}
        stored = Policy(params={"table": F8, "default": "bf16"}).store(tree)
        assert stored["table"] is tree["table"]

    def test_under_jit(self):
        stored = jax.jit(Policy(params={"kernel": F8}, block=BLOCK).store)({"kernel": jnp.asarray(WEIGHT)})
        kernel, scale_inv = reference_quantize(WEIGHT, F8, BLOCK)
        assert same(stored, {"kernel": kernel, "scale_inv": scale_inv})


class TestProperties:
    policies = st.builds(
        lambda kernel, scale, default, block: Policy(
            params={
                "kernel": kernel,
                "scale_inv?": scale if kernel in (F8, "int8", None) else None,
                "default": default,
            },
            block=block,
        ),
        st.sampled_from([F8, "int8", "bf16", "f32", None]),
        st.sampled_from(["bf16", "f32", None]),
        st.sampled_from(["bf16", "f32", None]),
        st.sampled_from([BLOCK, (4, 4)]),
    )

    @pytest.mark.parametrize("tree", [linen, state])
    @given(policy=policies)
    def test_storing_again_changes_nothing(self, tree, policy):
        once = policy.store(tree(plain()))
        assert same(layer_of(policy.store(once)), layer_of(once))
        assert set(change(policy, once).values()) == {"kept"}

    @pytest.mark.parametrize("tree", [linen, state])
    @given(policy=policies)
    def test_storing_what_was_found_is_the_identity(self, tree, policy):
        found = policy.store(tree(plain()))
        layer = layer_of(found)
        asked = Policy(params={name: x.dtype.name for name, x in layer.items()}, block=policy.block)
        stored = layer_of(asked.store(found))
        assert same(stored, layer)
        assert all(stored[name] is layer[name] for name in layer)


class TestErrors:
    @trees
    @pytest.mark.parametrize("params", [None, "f32", {"kernel": F8}])
    def test_a_narrow_kernel_without_its_scale(self, tree, params):
        layer = {name: x for name, x in pair().items() if name != "scale_inv"}
        with pytest.raises(UnpairedScale) as caught:
            Policy(params=params).store(tree(layer))
        assert str(caught.value) == (
            "a/kernel: f8_e4m3fn (5, 7) without its scales 'a/scale_inv', so its magnitude is lost. "
            "Add the scales to the tree, or use the kernel in f32 or bf16."
        )

    @trees
    def test_a_scale_without_its_kernel(self, tree):
        layer = {name: x for name, x in pair().items() if name != "kernel"}
        with pytest.raises(
            UnpairedScale,
            match=r"a/scale_inv: scales \(3, 3\) without their kernel. Add the kernel, or remove the scales",
        ):
            Policy().store(tree(layer))

    @trees
    def test_a_scale_beside_a_wide_kernel(self, tree):
        layer = pair() | {"kernel": jnp.asarray(WEIGHT)}
        with pytest.raises(
            UnpairedScale, match=r"a/scale_inv: scales \(3, 3\) beside 'a/kernel', which is f32 and needs none. Remove"
        ):
            Policy().store(tree(layer))

    @trees
    @pytest.mark.parametrize("grid", [(3, 2), (2, 3), (3,), (5, 7)])
    def test_a_grid_that_does_not_fit(self, tree, grid):
        layer = pair() | {"scale_inv": jnp.ones(grid)}
        with pytest.raises(InvalidScale) as caught:
            Policy(block=BLOCK).store(tree(layer))
        assert str(caught.value) == (
            f"a/scale_inv: scales of shape {grid} do not fit a kernel of shape (5, 7) in blocks of (2, 3), "
            "expected (3, 3). Name the block the kernel was quantised with. A ScaledArray includes its block."
        )

    @trees
    @pytest.mark.parametrize("params", [None, {"kernel": F8}, {"kernel": "int8"}, "f32"])
    @pytest.mark.parametrize(("value", "shown"), [(np.nan, "nan"), (0, "0.0"), (-1, "-1.0"), (np.inf, "inf")])
    def test_a_scale_that_is_no_positive_finite_number(self, tree, params, value, shown):
        layer = pair()
        layer["scale_inv"] = layer["scale_inv"].at[1, 2].set(value).at[2, 0].set(value)
        with pytest.raises(InvalidScale) as caught:
            Policy(params=params, block=BLOCK).store(tree(layer))
        assert (
            f"a/scale_inv: scales are positive finite numbers; found {shown} at block (1, 2), and 2 such of 9."
            in str(caught.value)
        )
        assert "fetch or make them again" in str(caught.value)

    @trees
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_weights_that_have_no_scale(self, tree, value):
        weight = WEIGHT.copy()
        weight[3, 4] = value
        with pytest.raises(
            InvalidScale, match=r"a/kernel: the weights of a block hold NaN or infinity.* at block \(1, 1\)"
        ):
            Policy(params={"kernel": F8}, block=BLOCK).store(tree(plain(weight)))

    def test_what_is_wrong_is_reported_together(self):
        kernel = pair()["kernel"]
        with pytest.raises(UnpairedScale) as caught:
            Policy().store({"a": {"kernel": kernel}, "b": {"kernel": kernel}, "c": {"scale_inv": jnp.ones(GRID)}})
        for path in ("a/kernel: ", "b/kernel: ", "c/scale_inv: "):
            assert path in str(caught.value)

    @trees
    def test_a_narrow_dtype_for_one_dimension(self, tree):
        with pytest.raises(
            InvalidPolicy,
            match=r"'bias' \(params\) asks f8_e4m3fn of 'a/bias', whose shape is \(5,\). Use narrow dtypes only for",
        ):
            Policy(params={"bias": F8}).store(tree(plain()))

    @trees
    def test_a_rule_that_matches_nothing(self, tree):
        with pytest.raises(
            UnmatchedRule, match=re.escape("'kernal' (params) matches none of 2 parameters.\n  nearest: a/kernel")
        ):
            Policy(params={"kernal": "f32"}).store(tree(plain()))
