"""A Policy is an immutable, hashable value that can be written down and read back."""

import copy
import dataclasses
import pickle
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import policies, policy_fields
from hypothesis import given, settings
from hypothesis import strategies as st

from perparam import Policy
from perparam.policies import Format, InvalidPolicy, ParamSpec, PerparamError, Scope, ShadowedRule, UnknownDtype

FP8 = {"kernel": "f8_e4m3fn", "scale_inv": None, "default": "f32"}


class TestConstructor:
    def test_a_slot_is_null_one_dtype_or_a_map(self):
        policy = Policy(params=FP8, compute="bf16", output="f32")
        assert policy.params.dtype("a/kernel") == np.dtype(ml_dtypes.float8_e4m3fn)
        assert policy.params.dtype("a/scale_inv") is None
        assert policy.params.dtype("a/bias") == np.dtype("float32")
        assert policy.compute.dtype("a/bias") == np.dtype(ml_dtypes.bfloat16)
        assert policy.output == np.dtype("float32")
        assert policy.block is None
        assert Policy().params.dtype("a/bias") is None

    def test_slots_may_be_given_in_order(self):
        assert Policy("f32", "bf16", "f16") == Policy(params="f32", compute="bf16", output="f16")

    def test_dtypes_may_be_types(self):
        assert Policy({"kernel": jnp.float8_e4m3fn}, jnp.bfloat16, np.float32) == Policy(
            {"kernel": "f8_e4m3fn"}, "bf16", "f32"
        )

    def test_the_activations_dtype_is_the_compute_default(self):
        assert Policy(compute={"kernel": None, "default": "bf16"}).activations == np.dtype(ml_dtypes.bfloat16)
        assert Policy(compute="f16").activations == np.dtype("float16")
        assert Policy(compute={"kernel": "bf16"}).activations is None

    @pytest.mark.parametrize("slot", ["params", "compute"])
    def test_a_narrow_dtype_is_refused_for_a_whole_slot(self, slot):
        with pytest.raises(
            UnknownDtype, match=rf"{slot}: f8_e4m3fn needs scales.*Name the parameters: {{kernel: f8_e4m3fn}}"
        ):
            Policy(**{slot: "f8_e4m3fn"})

    @pytest.mark.parametrize("narrow", ["f8_e4m3fn", "f8_e5m2", "int8"])
    @pytest.mark.parametrize("slot", ["params", "compute"])
    def test_a_narrow_dtype_is_refused_as_default(self, slot, narrow):
        with pytest.raises(UnknownDtype, match=f"{slot}: .*cannot be the default of a slot"):
            Policy(**{slot: {"default": narrow}})

    @pytest.mark.parametrize("dtype", ["int8", "i32", "bool", "c64", "f8_e8m0fnu"])
    def test_what_nobody_computes_in_is_refused(self, dtype):
        with pytest.raises(UnknownDtype, match="compute: kernel: "):
            Policy(compute={"kernel": dtype})

    @pytest.mark.parametrize("dtype", ["i32", "bool", "c64", "u8", "float4_e2m1fn"])
    def test_what_no_parameter_can_be_is_refused(self, dtype):
        with pytest.raises(UnknownDtype, match=r"params: kernel: a parameter cannot be .*Write a float"):
            Policy(params={"kernel": dtype})

    def test_int8_is_no_dtype_to_compute_in_and_says_which_are(self):
        with pytest.raises(
            UnknownDtype, match=r"matmuls do not compute in int8. Write f32, bf16, f16, or a float8 type"
        ):
            Policy(compute={"kernel": "int8"})

    def test_a_rule_for_scales_in_compute_is_refused(self):
        with pytest.raises(InvalidPolicy, match=r"compute: scale_inv: scales are always applied in f32. Write null"):
            Policy(compute={"scale_inv": "f32"})

    @pytest.mark.parametrize("key", ["scale_inv", "embedding_scale_inv", "layers/*/{kernel,scale_inv}"])
    def test_scales_are_wide(self, key):
        with pytest.raises(UnknownDtype, match=f"{re.escape(key)}: scales are f32, bf16 or f16, not f8_e4m3fn"):
            Policy(params={key: "f8_e4m3fn"})

    def test_the_text_none_is_answered_with_null(self):
        with pytest.raises(InvalidPolicy, match=r"params: kernel: 'None' is text here.*write null"):
            Policy(params={"kernel": "None"})

    @pytest.mark.parametrize("key", [0, None, True, "", "?"])
    def test_keys_are_text(self, key):
        with pytest.raises(InvalidPolicy, match=r"is not the name or path of a parameter. Write text"):
            Policy(params={key: "f32"})

    def test_the_default_is_never_optional(self):
        with pytest.raises(InvalidPolicy, match="Write it without '\\?'"):
            Policy(params={"default?": "f32"})

    def test_an_unknown_dtype_says_in_which_slot_and_rule(self):
        with pytest.raises(UnknownDtype, match=r"params: kernel: unknown dtype 'fl32'. The nearest name is 'f32'"):
            Policy(params={"kernel": "fl32"})

    def test_output_is_one_dtype(self):
        with pytest.raises(InvalidPolicy, match="output: the slot holds one dtype"):
            Policy(output={"kernel": "f32"})

    @pytest.mark.parametrize(
        "block", [128, [128], [128, 0], [2**31, 1], [1.0, 2], (True, 2), "128x128", [1, 2, 3], {"a": 1}]
    )
    def test_a_malformed_block_is_refused(self, block):
        with pytest.raises(InvalidPolicy, match=r"block: expected two positive integers such as \[128, 128\], found"):
            Policy(block=block)

    def test_every_error_is_perparams(self):
        with pytest.raises(PerparamError):
            Policy(params="nonsense")


class TestValue:
    @given(fields=policy_fields)
    def test_equal_fields_are_equal_policies(self, fields):
        assert Policy(**fields) == Policy(**fields)
        assert hash(Policy(**fields)) == hash(Policy(**fields))

    @given(policy=policies, other=policies)
    def test_equal_policies_are_written_alike_and_others_are_not(self, policy, other):
        assert (policy == other) == (repr(policy) == repr(other))

    def test_order_of_rules_counts(self):
        assert Policy(params={"a": "f32", "b": "f32"}) != Policy(params={"b": "f32", "a": "f32"})

    def test_the_place_of_the_default_does_not(self):
        first = Policy(params={"default": "f32", "kernel": None, "bias": "bf16"})
        last = Policy(params={"kernel": None, "bias": "bf16", "default": "f32"})
        assert first == last
        assert hash(first) == hash(last)

    def test_where_a_rule_was_written_does_not(self):
        text = "params: {kernel: bf16, default: f32}\ncompute: bf16\n"
        written = [Policy.loads(text, "a.yaml"), Policy.loads("# a comment\n\n" + text, "b.yaml")]
        assert written[0].params.rules[0].source != written[1].params.rules[0].source
        assert written[0] == written[1]
        assert len(set(written)) == 1

    @pytest.mark.parametrize("slot", ["params", "compute", "output"])
    def test_an_empty_map_is_null_and_a_map_of_a_default_is_its_dtype(self, slot):
        assert Policy(**{slot: {}}) == Policy(**{slot: None}) == Policy()
        assert Policy(**{slot: {"default": None}}) == Policy()
        assert Policy(**{slot: {"default": "bf16"}}) == Policy(**{slot: "bf16"})
        assert hash(Policy(**{slot: {"default": "bf16"}})) == hash(Policy(**{slot: "bf16"}))

    def test_what_differs_is_different(self):
        different = [
            Policy(),
            Policy(params="f32"),
            Policy(compute="f32"),
            Policy(output="f32"),
            Policy(params="bf16"),
            Policy(params={"kernel": "f32"}),
            Policy(params={"kernel?": "f32"}),
            Policy(params={"kernel": None}),
            Policy(params={"kernel": "f32", "default": "f32"}),
            Policy(block=(128, 128)),
            Policy(block=(128, 64)),
        ]
        assert len(set(different)) == len(different)

    def test_it_is_a_key_of_a_dict(self):
        assert {Policy(params=FP8): 1}[Policy(params=dict(FP8))] == 1

    def test_it_is_a_static_argument_of_jit(self):
        traced = []

        def run(policy, x):
            traced.append(policy)
            return policy.cast_output(x)

        run = jax.jit(run, static_argnums=0)
        assert run(Policy(output="bf16"), jnp.ones(2)).dtype == jnp.bfloat16
        assert run(Policy(output=jnp.bfloat16), jnp.ones(2)).dtype == jnp.bfloat16
        assert len(traced) == 1
        assert run(Policy(output="f16"), jnp.ones(2)).dtype == jnp.float16
        assert len(traced) == 2

    @pytest.mark.parametrize("name", ["params", "compute", "output", "block", "other"])
    def test_it_cannot_be_changed(self, name):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(Policy(), name, None)

    def test_changing_the_map_it_was_made_of_changes_nothing(self):
        rules, block = dict(FP8), [2, 3]
        policy = Policy(params=rules, block=block)
        rules["kernel"], block[0] = "f32", 7
        assert policy == Policy(params=FP8, block=(2, 3))

    @given(policy=policies)
    def test_copies_and_pickles_are_equal(self, policy):
        assert copy.deepcopy(policy) == policy
        assert pickle.loads(pickle.dumps(policy)) == policy


class TestComposition:
    base = Policy({"lm_head/kernel?": None, "kernel": "f8_e4m3fn", "default": "f32"}, "bf16", "f32", block=(1, -1))

    def test_replace_changes_whole_slots(self):
        changed = self.base.replace(params="bf16", output=None, kv_cache="int8", block=(64, 64))
        assert changed == Policy("bf16", "bf16", kv_cache="int8", block=(64, 64))
        assert self.base.replace() == self.base

    def test_merge_puts_rules_before_and_repeated_keys_in_place_of_others(self):
        merged = self.base.merge({"params": {"lm_head/kernel": "bf16", "bias": "f16"}})
        assert list(merged.plain()["params"]) == ["lm_head/kernel", "bias", "kernel", "default"]
        assert merged == self.base.merge(Policy({"lm_head/kernel": "bf16", "bias": "f16"}))
        assert merged.replace(params=None) == self.base.replace(params=None)

    @pytest.mark.parametrize(
        ("params", "expected"),
        [
            ("bf16", "bf16"),
            (None, None),
            ({"default": "bf16"}, {"lm_head/kernel?": None, "kernel": "f8_e4m3fn", "default": "bf16"}),
            ({"default": None}, {"lm_head/kernel?": None, "kernel": "f8_e4m3fn"}),
            ({}, {"lm_head/kernel?": None, "kernel": "f8_e4m3fn", "default": "f32"}),
        ],
    )
    def test_one_dtype_replaces_a_slot_and_a_default_only_the_default(self, params, expected):
        assert self.base.merge({"params": params}).params == Policy(expected).params

    @given(first=policies, second=policies, path=st.sampled_from(["kernel", "layers/0/mlp/bias", "scale_inv", "on"]))
    def test_the_rules_of_a_merged_policy_win(self, first, second, path):
        merged = second.merge(first)
        for slot in ("params", "compute"):
            first_rules, second_rules = first.slot(slot), second.slot(slot)
            winner = next((rules for rules in (first_rules, second_rules) if rules.reaching(path)), None)
            if winner is not None:
                assert merged.slot(slot).format(path) == winner.format(path)
            assert merged.slot(slot).default == (first_rules.default or second_rules.default)
            assert {rule.pattern for rule in second_rules.rules} <= {rule.pattern for rule in merged.slot(slot).rules}
        assert merged.output == (first.output or second.output)
        assert merged.block == (first.block or second.block)

    def test_a_merged_policy_replaces_a_default_and_removes_nothing(self):
        expected = self.base.merge({"params": {"default": "bf16"}})
        for other in (Policy("bf16"), Policy({"default": "bf16"}), Policy.loads("params: {default: bf16}")):
            assert self.base.merge(other) == expected
        assert self.base.merge(Policy({"bias": "bf16", "default": None})) == self.base.merge(
            {"params": {"bias": "bf16"}}
        )
        assert self.base.merge(Policy(compute=None)) == self.base

    def test_a_merged_rule_that_hides_others_is_an_error_with_the_remedy(self):
        with pytest.raises(
            ShadowedRule, match=r"(?s)p.yaml:2: 'kernel'.*To replace a rule of another .* repeat its key"
        ) as e:
            Policy.loads("params:\n  kernel: f32\n", "p.yaml").merge({"params": {"*": "bf16"}}).explain(
                {"kernel": np.ones((2, 2), np.float32)}
            )
        assert "earlier rule: '*'." in str(e.value)

    @pytest.mark.parametrize("other", ["bf16", None, 3])
    def test_what_is_no_policy_is_refused(self, other):
        with pytest.raises(
            InvalidPolicy, match=r"merge: expected a Policy or a mapping of slots, found .* Use get_policy"
        ):
            self.base.merge(other)


class TestTextForms:
    @settings(max_examples=100)
    @given(policy=policies)
    def test_repr_reads_back(self, policy):
        assert eval(repr(policy), {"Policy": Policy}) == policy

    def test_repr_is_short(self):
        assert repr(Policy()) == "Policy()"
        assert repr(Policy("f32", "bf16", block=[1, 2])) == "Policy(params='f32', compute='bf16', block=(1, 2))"
        assert repr(Policy({"default": "f32", "kernel?": None})) == "Policy(params={'kernel?': None, 'default': 'f32'})"

    @settings(max_examples=100)
    @given(policy=policies)
    def test_yaml_reads_back(self, policy):
        assert Policy.loads(policy.dumps()) == policy

    @given(policy=policies)
    def test_yaml_is_stable(self, policy):
        assert Policy.loads(policy.dumps()).dumps() == policy.dumps()

    @given(policy=policies)
    def test_a_file_reads_back(self, policy, tmp_path_factory):
        file = tmp_path_factory.mktemp("policies") / "policy.yaml"
        policy.dump(file)
        assert Policy.load(file) == Policy.load(str(file)) == policy

    @given(dtypes=st.tuples(*[st.sampled_from([None, "f32", "bf16", "f16"])] * 3), short=st.booleans())
    def test_one_line_reads_back(self, dtypes, short):
        names = ("p", "c", "o") if short else ("params", "compute", "output")
        line = ",".join(f"{name}={dtype or 'null'}" for name, dtype in zip(names, dtypes, strict=True))
        assert Policy.parse(line) == Policy(*dtypes)

    def test_a_line_may_leave_slots_out_and_hold_blanks(self):
        assert Policy.parse(" c = bf16 , output=float32 ") == Policy(compute="bf16", output="f32")

    @pytest.mark.parametrize("line", ["", "params", "params=f32,", "q=f32", "block=128", "params:f32"])
    def test_a_line_that_is_none_is_answered_with_an_example(self, line):
        with pytest.raises(
            InvalidPolicy, match=r"expected slot=dtype, found '.*'. Write params=f32,compute=bf16,output=f32, or p=f32,"
        ):
            Policy.parse(line)

    def test_a_slot_written_twice_is_refused(self):
        with pytest.raises(InvalidPolicy, match=r"params is written twice. Keep one"):
            Policy.parse("p=f32,params=bf16")

    def test_a_line_with_an_unknown_dtype_says_which(self):
        with pytest.raises(UnknownDtype, match=r"^compute: unknown dtype 'bf61'"):
            Policy.parse("p=f32,c=bf61")


class TestScope:
    """What a module sees: the policy at its own path."""

    policy = Policy(
        params={"a/kernel": "f8_e4m3fn", "kernel": "bf16", "default": "bf16"}, compute={"a/*": None, "default": "f32"}
    )

    def test_a_spec_is_resolved_by_the_whole_path(self):
        bf16, f8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
        f32 = np.dtype("float32")
        assert self.policy.at("b").spec("kernel") == ParamSpec(Format(bf16), Format(f32))
        assert self.policy.at("a").spec("kernel") == ParamSpec(Format(f8, (128, 128), f32))

    def test_scopes_nest(self):
        assert self.policy.at("layers", 0).at("mlp") == self.policy.at("layers", "0", "mlp")
        assert self.policy.at().at("a").spec("kernel") == self.policy.at("a").spec("kernel")

    def test_equal_layers_have_equal_specs(self):
        specs = {self.policy.at("layers", layer, "mlp").spec("kernel") for layer in range(3)}
        assert len(specs) == 1

    def test_a_narrow_spec_knows_its_scales_and_its_block(self):
        policy = Policy(params={"kernel": "int8", "scale_inv": "bf16"}, block=(32, 16))
        assert self.policy.at("a").spec("kernel").storage.scale == np.dtype("float32")
        storage = policy.at("a").spec("kernel").storage
        assert (storage.scale, storage.block) == (np.dtype(ml_dtypes.bfloat16), (32, 16))

    def test_a_parameter_that_is_not_stored_is_an_error_with_its_path(self):
        scope = Scope(self.policy, None, stored={"a/kernel": ParamSpec()})
        assert scope.at("a").spec("kernel") == ParamSpec()
        with pytest.raises(
            InvalidPolicy, match=r"b/kernel: .* is not among the stored variables. Pass the variables of"
        ):
            scope.at("b").spec("kernel")
