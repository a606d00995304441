"""Policies by name, and `get_policy`, which every `policy=` argument goes through."""

import os
import pathlib
import re
import types

import jax.numpy as jnp
import numpy as np
import pytest

import perparam
from perparam import Policy, get_policy
from perparam.policies import InvalidPolicy, MissingFile, UnknownDtype, preset_names

FP8 = ("fp8_weight_only", "fp8_dynamic")
EXEMPT = {"{lm_head,score}/kernel?": None, "**/gate/kernel?": None}


class TestPresets:
    def test_their_names(self):
        assert preset_names() == ("bf16", "f32", "fp8_dynamic", "fp8_weight_only")

    @pytest.mark.parametrize("name", preset_names())
    def test_their_yaml_is_shipped_and_reads_back(self, name):
        file = pathlib.Path(perparam.__file__).parent / "policies" / "presets" / f"{name}.yaml"
        assert Policy.load(file) == get_policy(name)
        assert Policy.loads(get_policy(name).dumps()) == get_policy(name)

    @pytest.mark.parametrize("name", ["f32", "bf16"])
    def test_the_plain_ones_are_uniform(self, name):
        assert get_policy(name) == Policy(name, name, name)

    def test_weight_only_stores_fp8_and_computes_in_bf16(self):
        assert get_policy("fp8_weight_only") == Policy(
            params=EXEMPT | {"kernel": "f8_e4m3fn", "scale_inv": None, "default": None},
            compute={"kernel": None, "scale_inv": None, "default": "bf16"},
            output="bf16",
        )

    def test_dynamic_computes_in_fp8_too(self):
        assert get_policy("fp8_dynamic") == Policy(
            params=EXEMPT | {"kernel": "f8_e4m3fn", "scale_inv": None, "default": None},
            compute=EXEMPT | {"kernel": "f8_e4m3fn", "scale_inv": None, "default": "bf16"},
            output="bf16",
        )

    @pytest.mark.parametrize("name", FP8)
    def test_the_fp8_ones_begin_with_what_checkpoints_keep_wide(self, name):
        policy = get_policy(name)
        assert [(rule.key, rule.dtype) for rule in policy.params.rules[:2]] == list(EXEMPT.items())
        # The head and the router enter no narrow matmul either, whatever the rules for compute look like.
        assert policy.compute.dtype("lm_head/kernel") is None
        assert policy.compute.dtype("score/kernel") is None
        assert policy.compute.dtype("layers/0/mlp/gate/kernel") is None

    @pytest.mark.parametrize("name", FP8)
    def test_the_fp8_ones_default_to_null_in_storage(self, name):
        assert get_policy(name).params.default is None

    @pytest.mark.parametrize("name", FP8)
    def test_the_fp8_ones_leave_alone_what_they_do_not_name(self, name):
        tree = {
            "lm_head": {"kernel": np.ones((4, 4), np.float16)},
            "layers": {
                "0": {"gate": {"kernel": np.ones((2, 4), np.float32)}, "up": {"kernel": np.ones((4, 4), np.float32)}}
            },
            "norm": {"scale": np.ones(4, jnp.bfloat16)},
        }
        plan = {row.path: (row.storage.name, row.change) for row in get_policy(name).explain(tree).rows}
        assert plan == {
            "layers/0/gate/kernel": ("float32", "kept"),
            "layers/0/up/kernel": ("float8_e4m3fn", "quantised"),
            "layers/0/up/scale_inv": ("float32", "made"),
            "lm_head/kernel": ("float16", "kept"),
            "norm/scale": ("bfloat16", "kept"),
        }


class TestGetPolicy:
    def test_a_policy_is_itself(self):
        policy = Policy("f32")
        assert get_policy(policy) is policy

    def test_none_changes_nothing(self):
        assert get_policy(None) == Policy()

    @pytest.mark.parametrize("make", [dict, types.MappingProxyType])
    def test_a_mapping_has_slots(self, make):
        mapping = make({"params": {"kernel": "bf16"}, "output": "f32", "block": (2, 2)})
        assert get_policy(mapping) == Policy(params={"kernel": "bf16"}, output="f32", block=(2, 2))

    def test_a_path_is_a_file(self, tmp_path):
        Policy("f16").dump(tmp_path / "policy.yaml")
        assert get_policy(tmp_path / "policy.yaml") == Policy("f16")
        assert get_policy(os.fspath(tmp_path / "policy.yaml")) == Policy("f16")

    def test_a_dtype_is_uniform(self):
        assert get_policy("f16") == get_policy("float16") == Policy("f16", "f16", "f16")

    def test_text_with_an_equals_sign_is_parsed(self):
        assert get_policy("p=f32,c=bf16") == Policy("f32", "bf16")

    def test_the_order_is_preset_dtype_line_file(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("bf16", "f16", "p=f32", "mine"):
            Policy(block=(7, 7)).dump(name)
        assert get_policy("bf16") == Policy("bf16", "bf16", "bf16")
        assert get_policy("f16") == Policy("f16", "f16", "f16")
        assert get_policy("p=f32") == Policy("f32")
        assert get_policy("mine") == Policy(block=(7, 7))
        assert get_policy(pathlib.Path("bf16")) == Policy(block=(7, 7))

    def test_a_misspelt_preset_is_answered_with_the_nearest(self):
        with pytest.raises(InvalidPolicy) as caught:
            get_policy("fp8_weightonly")
        assert str(caught.value) == (
            "'fp8_weightonly' is neither a preset (bf16, f32, fp8_dynamic, fp8_weight_only), a dtype nor a file. "
            "Did you mean 'fp8_weight_only'?"
        )

    def test_a_narrow_dtype_is_no_uniform_policy(self):
        with pytest.raises(UnknownDtype, match=r"f8_e4m3fn needs scales.*Name the parameters"):
            get_policy("f8_e4m3fn")

    @pytest.mark.parametrize(("name", "says"), [("f64", "needs jax_enable_x64"), ("f8", "'f8' is ambiguous")])
    def test_a_dtype_that_is_refused_says_why(self, name, says):
        with pytest.raises((InvalidPolicy, UnknownDtype), match=re.escape(says)):
            get_policy(name)

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(MissingFile, match=r"nowhere.yaml: there is no such policy file"):
            get_policy(tmp_path / "nowhere.yaml")

    def test_an_unknown_slot_is_named(self):
        with pytest.raises(
            InvalidPolicy, match=r"unknown slot 'parms'. A policy has params, compute, output, kv_cache"
        ):
            get_policy({"parms": "f32"})

    @pytest.mark.parametrize("thing", [3, ["f32"], object(), jnp.float32])
    def test_anything_else_is_no_policy(self, thing):
        with pytest.raises(
            InvalidPolicy, match=r"is not a policy. Pass a Policy, a mapping, the name of a preset or a YAML file"
        ):
            get_policy(thing)
