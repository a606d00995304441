"""First match and strictness of a slot, against an independent reference."""

import re

import jax
import numpy as np
import pytest
from flax import linen as nn
from helpers import reference_matches, written_out
from hypothesis import given, settings
from hypothesis import strategies as st

from perparam import Policy, apply, init
from perparam.policies import InvalidPolicy, ShadowedRule, UnmatchedRule
from perparam.policies.decisions import decide

PATHS = (
    "embed/embedding",
    "layers/0/mlp/kernel",
    "layers/0/mlp/scale_inv",
    "layers/0/attn/q/kernel",
    "layers/0/attn/q/bias",
    "layers/1/mlp/kernel",
    "head/kernel",
)


def reaches(pattern: str, path: str) -> bool:
    """A scale is reached only by a pattern that names it."""
    named = any(alternative.endswith("scale_inv") for alternative in written_out(pattern))
    return (named or not path.endswith("scale_inv")) and reference_matches(pattern, path)


def reference_resolve(slot: dict, paths: list[str]):
    """What each path gets, or the type of the error: the definition in design.md, rule by rule."""
    rules = {key: value for key, value in slot.items() if key != "default"}
    hits = {path: [key for key in rules if reaches(key.rstrip("?"), path)] for path in paths}
    for key, value in rules.items():
        if not any(first[:1] == [key] for first in hits.values()):
            if any(key in later for later in hits.values()):
                return ShadowedRule
            if not key.endswith("?") and (key, value) != ("scale_inv", None):
                return UnmatchedRule
    default = slot.get("default")
    return {p: slot[h[0]] if h else None if p.endswith("scale_inv") else default for p, h in hits.items()}


keys = st.sampled_from(
    ["kernel", "bias", "scale_inv", "**/kernel", "layers/*/mlp/*", "layers/0/**", "head/*?", "**", "bias?", "kernel?",
     "layers/{0,1}/mlp/kernel", "layers/*/attn/q/{kernel,bias}", "nothing?", "scale_inv?", "{head,embed}/*"]
)  # fmt: skip
slots = st.lists(st.tuples(keys, st.sampled_from(["f32", "bf16", None])), max_size=4).map(dict)


def add_default(slot: dict, default: str | None, place: int) -> dict:
    items = list(slot.items())
    return dict([*items[:place], ("default", default), *items[place:]])


@settings(max_examples=200)
@given(
    slot=slots,
    default=st.sampled_from([None, "f16"]),
    place=st.integers(0, 4),
    paths=st.lists(st.sampled_from(PATHS), min_size=1, unique=True),
)
def test_a_slot_answers_as_the_reference_does(slot, default, place, paths):
    slot = add_default(slot, default, place)
    try:
        rules = decide("params", Policy(params=slot).params, paths)
        got = {path: rule and rule.dtype and {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[rule.dtype.name]
               for path, rule in rules.items()}  # fmt: skip
    except (ShadowedRule, UnmatchedRule) as error:
        got = type(error)
    assert got == reference_resolve(slot, paths)


def answers(slot, *paths):
    rules = decide("params", Policy(params=slot).params, paths or PATHS)
    return {path: rule and rule.dtype and rule.dtype.name for path, rule in rules.items()}


class TestFirstMatch:
    def test_the_rule_written_first_wins(self):
        assert answers({"head/kernel": "f32", "kernel": "bf16"}, "head/kernel", "a/kernel") == {
            "head/kernel": "float32",
            "a/kernel": "bfloat16",
        }

    def test_null_is_an_answer_and_no_fall_through(self):
        assert answers({"head/kernel": None, "kernel": "bf16", "default": "f32"}, "head/kernel", "a/kernel") == {
            "head/kernel": None,
            "a/kernel": "bfloat16",
        }

    def test_the_default_is_tried_last_wherever_it_stands(self):
        first, last = {"default": "f32", "kernel": "bf16"}, {"kernel": "bf16", "default": "f32"}
        assert answers(first) == answers(last)
        assert answers(first)["head/kernel"] == "bfloat16"

    def test_without_a_default_an_unlisted_parameter_is_left_alone(self):
        assert answers({"kernel": "bf16"})["embed/embedding"] is None

    @pytest.mark.parametrize("slot", ["bf16", {"default": "bf16"}, {"**": "bf16"}, {"layers/**": "bf16"}])
    def test_nothing_reaches_scales_that_does_not_name_them(self, slot):
        assert answers(slot)["layers/0/mlp/scale_inv"] is None
        assert answers(slot)["layers/0/mlp/kernel"] == "bfloat16"

    @pytest.mark.parametrize("key", ["scale_inv", "**/scale_inv", "layers/0/mlp/{kernel,scale_inv}", "**/*scale_inv"])
    def test_a_rule_that_names_scales_reaches_them(self, key):
        assert answers({key: "bf16"})["layers/0/mlp/scale_inv"] == "bfloat16"


class TestStrictness:
    def test_a_rule_that_matches_nothing_is_an_error_with_the_nearest_path(self):
        with pytest.raises(UnmatchedRule) as caught:
            answers({"layers/*/mlp/kernal": "f32"})
        assert str(caught.value) == (
            "'layers/*/mlp/kernal' (params) matches none of 7 parameters.\n"
            "  nearest: layers/0/mlp/kernel\n"
            "  Patterns are anchored at the root; '**/…' matches at any depth.\n"
            "  Correct the pattern, remove the rule, or end it with '?' if it may match nothing."
        )

    def test_a_misspelt_bare_name_is_answered_with_the_nearest_name(self):
        with pytest.raises(UnmatchedRule, match=r"'embeding' \(params\).*\n  nearest: embed/embedding\n  Correct"):
            answers({"embeding": "f32"})

    def test_a_question_mark_forgives_matching_nothing(self):
        assert answers({"lm_head/kernel?": None, "kernel": "bf16"})["head/kernel"] == "bfloat16"

    def test_a_question_mark_matches_like_the_rule_without_it(self):
        assert answers({"head/kernel?": "f32", "kernel": "bf16"})["head/kernel"] == "float32"

    @pytest.mark.parametrize("key", ["head/kernel", "head/kernel?", "**/kernel"])
    def test_a_shadowed_rule_is_an_error_that_names_who_shadows(self, key):
        with pytest.raises(ShadowedRule) as caught:
            answers({"kernel": "bf16", key: "f32"})
        assert str(caught.value) == (
            f"{key!r} (params) decides nothing: every parameter that it matches is matched by an earlier "
            "rule: 'kernel'.\n"
            "  The first rule that matches wins. Write the more specific rule first, or remove this rule."
        )

    def test_a_rule_shadowed_by_several_names_all_of_them(self):
        with pytest.raises(ShadowedRule, match=r"matched by an earlier rule: 'head/\*', 'layers/\*\*'\."):
            answers({"layers/**": "f32", "head/*": "f32", "kernel": "bf16"})

    def test_a_rule_shadowed_in_part_is_none(self):
        assert answers({"layers/**": "f32", "kernel": "bf16"})["head/kernel"] == "bfloat16"

    def test_scale_inv_null_may_match_nothing(self):
        assert answers({"scale_inv": None}, "head/kernel") == {"head/kernel": None}

    @pytest.mark.parametrize(("key", "dtype"), [("scale_inv", "bf16"), ("**/scale_inv", None)])
    def test_any_other_rule_for_scales_may_not(self, key, dtype):
        with pytest.raises(UnmatchedRule, match=re.escape(repr(key))):
            answers({key: dtype}, "head/kernel")

    def test_a_rule_matches_nothing_in_an_empty_tree(self):
        with pytest.raises(UnmatchedRule, match="matches none of 0 parameters"):
            decide("params", Policy(params={"kernel": "f32"}).params, [])

    @pytest.mark.parametrize("error", [UnmatchedRule, ShadowedRule])
    def test_the_errors_are_value_errors_of_the_policy(self, error):
        assert issubclass(error, InvalidPolicy)
        assert issubclass(error, ValueError)


TREE = {"dense": {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}}
UNMATCHED = [
    ({"params": {"kernal": "bf16"}}, "params"),
    ({"compute": {"kernal": "bf16"}}, "compute"),
]


class TestEverySlotForItself:
    """Each entry point holds both slots to it; the slot is named."""

    @pytest.mark.parametrize(("fields", "slot"), UNMATCHED)
    def test_in_a_plan(self, fields, slot):
        with pytest.raises(UnmatchedRule, match=rf"'kernal' \({slot}\).*\n  nearest: dense/kernel"):
            Policy(**fields).explain(TREE)

    @pytest.mark.parametrize(("fields", "slot"), UNMATCHED)
    def test_in_a_cast(self, fields, slot):
        with pytest.raises(UnmatchedRule, match=rf"'kernal' \({slot}\)"):
            Policy(**fields).cast(TREE, slot)

    def test_in_storage(self):
        with pytest.raises(UnmatchedRule, match=r"'kernal' \(params\)"):
            Policy(params={"kernal": "bf16"}).store(TREE)

    def test_a_rule_of_one_slot_says_nothing_of_the_other(self):
        policy = Policy(params={"kernel": "bf16"}, compute={"bias": "bf16"})
        rows = {row.path: row for row in policy.explain(TREE).rows}
        assert (rows["dense/kernel"].storage_rule, rows["dense/kernel"].compute_rule) == ("kernel", None)
        assert (rows["dense/bias"].storage_rule, rows["dense/bias"].compute_rule) == (None, "bias")

    def test_in_init_and_apply(self):
        x = np.ones((1, 2), np.float32)
        with pytest.raises(UnmatchedRule, match=r"'kernal' \(params\) matches none of 2 parameters"):
            init(nn.Dense(3), {"params": {"kernal": "bf16"}}, jax.random.key(0), x)
        variables = init(nn.Dense(3), None, jax.random.key(0), x)
        with pytest.raises(UnmatchedRule, match=r"'kernal' \(compute\) matches none of 2 parameters"):
            apply(nn.Dense(3), {"compute": {"kernal": "bf16"}}, variables, x)
