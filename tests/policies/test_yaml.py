"""Policies as YAML: what is read, and what every error says."""

import os

import numpy as np
import pytest

from perparam import Policy
from perparam.policies import InvalidPolicy, MissingFile, ShadowedRule, UnknownDtype, UnmatchedRule

EXAMPLE = """\
params:                       # storage
  kernel: f8_e4m3fn
  scale_inv: null
  default: f32
compute:
  kernel: null
  scale_inv: null
  default: bf16
output: f32
"""


def test_the_example_of_the_design_is_read():
    policy = Policy(
        params={"kernel": "f8_e4m3fn", "scale_inv": None, "default": "f32"},
        compute={"kernel": None, "scale_inv": None, "default": "bf16"},
        output="f32",
    )
    assert Policy.loads(EXAMPLE) == policy


def test_rules_know_their_file_and_line():
    policy = Policy.loads(EXAMPLE, "policy.yaml")
    assert [rule.source for rule in policy.params.rules] == ["policy.yaml:2", "policy.yaml:3"]
    assert policy.params.default.source == "policy.yaml:4"
    assert policy.compute.default.source == "policy.yaml:8"
    assert Policy.loads("\nparams: f32", "p").params.default.source == "p:2"


@pytest.mark.parametrize("null", ["null", "~", "", "Null", "NULL"])
def test_every_way_yaml_has_to_write_null_is_null(null):
    assert Policy.loads(f"params:\n  kernel: {null}\n") == Policy(params={"kernel": None})
    assert Policy.loads(f"compute: {null}\noutput: bf16\n") == Policy(output="bf16")


def test_a_block_is_read():
    assert Policy.loads("block: [128, 64]") == Policy(block=(128, 64))
    assert Policy.loads("block:\n- 128\n- 64\n").block == (128, 64)
    assert Policy.loads("block: null\nparams: f32").block is None


def test_quoted_keys_are_read():
    text = 'params:\n  "**/kernel": bf16\n  \'{q,k}_proj/kernel\': f16\n  "on": f32\n  "0": f32\n'
    assert Policy.loads(text) == Policy(
        params={"**/kernel": "bf16", "{q,k}_proj/kernel": "f16", "on": "f32", "0": "f32"}
    )


ERRORS = {
    # name: (text, what the message says, as it stands there)
    "an unclosed map": ("params: {kernel: f32\n", InvalidPolicy, ["p.yaml:2: not YAML: ", "expected ',' or '}'"]),
    "tabs": (
        "params:\n\tkernel: f32\n",
        InvalidPolicy,
        ["p.yaml:2: not YAML: ", "'\\\\t'", "The line reads 'kernel: f32'"],
    ),
    "wrong indentation": ("params:\n  kernel: f32\n bias: f32\n", InvalidPolicy, ["p.yaml:3: not YAML: "]),
    "two documents": ("params: f32\n---\noutput: f32\n", InvalidPolicy, ["p.yaml:2: not YAML: "]),
    "a control character": ("params: \x00", InvalidPolicy, ["p.yaml: not readable as YAML: "]),
    "an anchor": (
        "params: f32\ncompute: &wide f32\n",
        InvalidPolicy,
        ["p.yaml:2: the anchor '&wide' is not supported in a policy. Remove it."],
    ),
    "an anchor of a rule": (
        "params:\n  bias: f32\n  kernel: &narrow f8_e4m3fn\n",
        InvalidPolicy,
        ["p.yaml:3: the anchor '&narrow' is not supported in a policy. Remove it."],
    ),
    "an anchor of a map": (
        "params: &slot\n  kernel: f32\n",
        InvalidPolicy,
        ["p.yaml:1: the anchor '&slot' is not supported in a policy. Remove it."],
    ),
    "an alias": (
        "params:\n  kernel: *wide\n",
        InvalidPolicy,
        ["p.yaml:2: the alias '*wide' is not supported in a policy. Write the value itself."],
    ),
    "a tag of a scalar": (
        "params:\n  kernel: !!str f32\n",
        InvalidPolicy,
        ["p.yaml:2: the tag '!!str' is not supported in a policy. Remove it."],
    ),
    "a tag of a key": (
        "params:\n  !!str kernel: f32\n",
        InvalidPolicy,
        ["p.yaml:2: the tag '!!str' is not supported in a policy. Remove it."],
    ),
    "a tag of a number": (
        "block: [128, !!int 128]\n",
        InvalidPolicy,
        ["p.yaml:1: the tag '!!int' is not supported in a policy. Remove it."],
    ),
    "a tag of a null": (
        "params:\n  kernel: !!null ''\n",
        InvalidPolicy,
        ["p.yaml:2: the tag '!!null' is not supported in a policy. Remove it."],
    ),
    "a tag of no name": (
        "params:\n  kernel: ! f32\n",
        InvalidPolicy,
        ["p.yaml:2: the tag '!' is not supported in a policy. Remove it."],
    ),
    "a tag of a map": (
        "params: f32\ncompute: !!map {kernel: f32}\n",
        InvalidPolicy,
        ["p.yaml:2: the tag '!!map' is not supported in a policy. Remove it."],
    ),
    "nothing": (
        "# only a comment\n",
        InvalidPolicy,
        ["p.yaml: empty.", "A policy that changes nothing is written {}."],
    ),
    "a list": ("- params\n", InvalidPolicy, ["p.yaml:1: expected lines of 'name: dtype', found a list."]),
    "a word": ("bf16\n", InvalidPolicy, ["p.yaml:1: expected lines of 'name: dtype', found 'bf16'."]),
    "an unknown slot": (
        "params: f32\n\ncomptue: bf16\n",
        InvalidPolicy,
        [
            "p.yaml:3: unknown slot 'comptue'. A policy has params, compute, output, kv_cache, backward, grads,",
            "Did you mean 'compute'?",
        ],
    ),
    "a slot twice": (
        "params: f32\ncompute: f32\nparams: bf16\n",
        InvalidPolicy,
        ["p.yaml:3: 'params' is written a second time, first at p.yaml:1. Keep one."],
    ),
    "a rule twice": (
        "params:\n  kernel: f32\n  bias: f32\n  kernel: bf16\n",
        InvalidPolicy,
        ["p.yaml:4: 'kernel' is written a second time, first at p.yaml:2. Keep one."],
    ),
    "the key on": (
        "params:\n  on: f32\n",
        InvalidPolicy,
        ["p.yaml:2: YAML reads the key 'on' as bool. Put it in quotes."],
    ),
    "the key 0": ("params:\n  0: f32\n", InvalidPolicy, ["p.yaml:2: YAML reads the key '0' as int. Put it in quotes."]),
    "the key 1.5": ("params:\n  1.5: f32\n", InvalidPolicy, ["p.yaml:2: YAML reads the key '1.5' as float. Put it in"]),
    "the key null": (
        "params:\n  null: f32\n",
        InvalidPolicy,
        ["p.yaml:2: YAML reads the key 'null' as null. Put it in quotes."],
    ),
    "the slot on": ("on: f32\n", InvalidPolicy, ["p.yaml:1: YAML reads the key 'on' as bool. Put it in quotes."]),
    "a key of a double star": (
        "params:\n  kernel: f32\n  **/kernel: f32\n",
        InvalidPolicy,
        ["p.yaml:3: in YAML '*' has a special meaning at the start of a key. Put the key in quotes: \"**/kernel\"."],
    ),
    "a key of a star": (
        "params:\n  */kernel: f32\n",
        InvalidPolicy,
        ["p.yaml:2: in YAML '*' has a special meaning at the start of a key. Put the key in quotes: \"*/kernel\"."],
    ),
    "a key that looks like an alias": (
        "params:\n  *_proj: f32\n",
        InvalidPolicy,
        ["p.yaml:2: ", 'Put the key in quotes: "*_proj".'],
    ),
    "a key that begins with a brace": (
        "params:\n  {q,k}_proj/kernel: f32\n",
        InvalidPolicy,
        ["p.yaml:2: in YAML '{' has a special meaning", 'Put the key in quotes: "{q,k}_proj/kernel".'],
    ),
    "a key that is a map": (
        "params:\n  {q,k}: f32\n",
        InvalidPolicy,
        ["p.yaml:2: a key begins with '{' or '['. Put it in quotes"],
    ),
    "a merge key": (
        "params:\n  <<: f32\n",
        InvalidPolicy,
        ["p.yaml:2: YAML reads the key '<<' as merge. Put it in quotes."],
    ),
    "the value None": (
        "params:\n  kernel: None\n",
        InvalidPolicy,
        ["p.yaml:2: params: kernel: 'None' is text here. To leave a parameter unchanged write null."],
    ),
    "the slot None": (
        "compute: None\n",
        InvalidPolicy,
        ["p.yaml:1: compute: 'None' is text here.", "write null"],
    ),
    "the output None": ("output: None\n", InvalidPolicy, ["p.yaml:1: output: ", "write null"]),
    "a number for a dtype": (
        "params:\n  kernel: 8\n",
        InvalidPolicy,
        ["p.yaml:2: kernel: expected the name of a dtype or null, found '8'."],
    ),
    "a list of dtypes": (
        "params:\n  kernel: [f32, bf16]\n",
        InvalidPolicy,
        ["p.yaml:2: kernel: expected the name of a dtype or null, found a list."],
    ),
    "a map of maps": (
        "params:\n  mlp:\n    kernel: f32\n",
        InvalidPolicy,
        [
            "p.yaml:2: params: mlp: a format has dtype, block and scale, found 'kernel'",
            "as one key, such as dense/kernel",
        ],
    ),
    "an unknown dtype": (
        "params:\n  bias: f32\n  kernel: fl32\n",
        UnknownDtype,
        ["p.yaml:3: params: kernel: unknown dtype 'fl32'. The nearest name is 'f32'."],
    ),
    "an unknown dtype of a slot": (
        "params: f32\ncompute: bfloat\n",
        UnknownDtype,
        ["p.yaml:2: compute: unknown dtype 'bfloat'. The nearest name is 'bfloat16'."],
    ),
    "an ambiguous dtype of the cache": (
        "kv_cache: fp8\n",
        UnknownDtype,
        ["p.yaml:1: kv_cache: dtype 'fp8' is ambiguous. Write f8_e4m3fn."],
    ),
    "a list of rules": (
        "params:\n  - kernel: f8_e4m3fn\n",
        InvalidPolicy,
        ["p.yaml:2: params: found a list. Write 'kernel: f8_e4m3fn' lines, without '-', or one dtype."],
    ),
    "a list of outputs": ("output: [f32]\n", InvalidPolicy, ["p.yaml:1: output: found a list. Write one dtype."]),
    "a regular expression": (
        'params:\n  "layers/\\\\d+/kernel": f32\n',
        InvalidPolicy,
        ["p.yaml:2: ", "has no meaning in a pattern", "Patterns are globs, not regular expressions"],
    ),
    "an ambiguous dtype": (
        "params:\n  kernel: f8\n",
        UnknownDtype,
        ["p.yaml:2: params: kernel: dtype 'f8' is ambiguous."],
    ),
    "f64 without x64": ("output: f64\n", UnknownDtype, ["p.yaml:1: output: float64 needs jax_enable_x64"]),
    "a narrow default": (
        "params:\n  default: f8_e4m3fn\n",
        UnknownDtype,
        [
            "p.yaml:2: params: f8_e4m3fn needs scales",
            "cannot be the default of a slot. Name the parameters: {kernel: f8_e4m3fn}.",
        ],
    ),
    "a narrow slot": (
        "params: f8_e4m3fn\n",
        UnknownDtype,
        ["p.yaml:1: params: f8_e4m3fn needs scales", "Name the parameters"],
    ),
    "a narrow compute slot": ("compute: int8\n", UnknownDtype, ["p.yaml:1: compute: ", "needs scales"]),
    "a narrow output": (
        "params: f32\noutput: f8_e5m2\n",
        UnknownDtype,
        ["p.yaml:2: output: f8_e5m2 needs scales", "Write f32"],
    ),
    "an output by name": (
        "output:\n  kernel: f32\n",
        InvalidPolicy,
        ["p.yaml:1: output: the slot holds one dtype", "Write a dtype such as f32."],
    ),
    "scales in compute": (
        "compute:\n  kernel: null\n  scale_inv: bf16\n",
        InvalidPolicy,
        ["p.yaml:3: compute: scale_inv: scales are always applied in f32. Write null, or leave the rule out."],
    ),
    "narrow scales": (
        "params:\n  scale_inv: f8_e4m3fn\n",
        UnknownDtype,
        ["p.yaml:2: params: scale_inv: scales are f32, bf16 or f16, not f8_e4m3fn."],
    ),
    "int8 in compute": (
        "compute:\n  kernel: int8\n",
        UnknownDtype,
        ["p.yaml:2: compute: kernel: ", "matmuls do not compute in int8. Write f32"],
    ),
    "int32 in params": (
        "params:\n  kernel: i32\n",
        UnknownDtype,
        ["p.yaml:2: params: kernel: a parameter cannot be i32."],
    ),
    "another glob character": (
        'params:\n  "layers/[01]/kernel": f32\n',
        InvalidPolicy,
        ["p.yaml:2: 'layers/[01]/kernel': '[' has no meaning in a pattern. Write '*'"],
    ),
    "an optional default": (
        "params:\n  default?: f32\n",
        InvalidPolicy,
        ["p.yaml:2: params: default", "Write it without '?'."],
    ),
    "a block of one side": (
        "params: f32\nblock: 128\n",
        InvalidPolicy,
        ["p.yaml:2: block: expected two positive integers"],
    ),
    "a block of zero": (
        "block: [128, 0]\n",
        InvalidPolicy,
        ["p.yaml:1: block: expected two positive integers such as [128, 128]"],
    ),
    "a block of text": (
        "block: [a, b]\n",
        InvalidPolicy,
        ["p.yaml:1: block: expected two positive integers such as [128, 128]"],
    ),
    "a block that is a map": ("block: {a: b}\n", InvalidPolicy, ["p.yaml:1: block: expected two positive integers"]),
    "a tag that runs code": (
        "params: !!python/object/apply:os.getcwd []\n",
        InvalidPolicy,
        ["p.yaml:1: the tag '!!python/object/apply:os.getcwd' is not supported in a policy. Remove it."],
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_says_where_what_and_what_to_do(name):
    text, error, says = ERRORS[name]
    with pytest.raises(error) as caught:
        Policy.loads(text, "p.yaml")
    for part in says:
        assert part.replace("\\\\", "\\") in str(caught.value)


TREE = {
    "layers": {"0": {"mlp": {"down_proj": {"kernel": np.ones((2, 3), np.float32), "bias": np.ones(2, np.float32)}}}}
}


class TestErrorsOfResolutionHaveTheLine:
    def test_an_unmatched_rule(self):
        policy = Policy.loads('params:\n  bias: f32\n\n  "layers/*/mlp/down/kernal": bf16\n', "policy.yaml")
        with pytest.raises(UnmatchedRule) as caught:
            policy.explain(TREE)
        message = str(caught.value)
        assert message.startswith("policy.yaml:4: 'layers/*/mlp/down/kernal' (params) matches none of 2 parameters.\n")
        assert "\n  nearest: layers/0/mlp/down_proj/kernel\n" in message
        assert message.endswith("Correct the pattern, remove the rule, or end it with '?' if it may match nothing.")

    @pytest.mark.parametrize(
        ("key", "dtype", "line"),
        [
            (
                "down_proj",
                "bf16",
                "Did you mean '**/down_proj/**'? Rules name parameters, and 'down_proj' is a module.",
            ),
            ("layers", "bf16", "Did you mean 'layers/**'? Rules name parameters, and 'layers' is a module."),
            (
                "layers/0",
                "int8",
                "Did you mean 'layers/0/**/kernel'? Rules name parameters, and 'layers/0' is a module.",
            ),
            ("down_proj/bias", "bf16", "Did you mean '**/down_proj/bias'? Patterns are anchored at the root."),
            (
                "layers/.*/bias",
                "bf16",
                "Patterns are globs, not regular expressions: write '*' for part of a component,",
            ),
        ],
    )
    def test_a_module_or_a_regular_expression_is_answered_with_a_pattern(self, key, dtype, line):
        with pytest.raises(UnmatchedRule) as caught:
            Policy({key: dtype}).explain(TREE)
        assert f"\n  {line}" in str(caught.value)

    def test_a_shadowed_rule(self):
        policy = Policy.loads('compute:\n  kernel: f32\n  "layers/**/kernel?": bf16\n', "policy.yaml")
        with pytest.raises(
            ShadowedRule, match=r"^policy.yaml:3: 'layers/\*\*/kernel\?' \(compute\) decides nothing.*'kernel'"
        ):
            policy.explain(TREE)

    def test_a_narrow_dtype_for_one_dimension(self):
        policy = Policy.loads("params:\n  bias: f8_e4m3fn\n", "policy.yaml")
        with pytest.raises(InvalidPolicy) as caught:
            policy.explain(TREE)
        assert str(caught.value) == (
            "policy.yaml:2: 'bias' (params) asks f8_e4m3fn of 'layers/0/mlp/down_proj/bias', whose shape is (2,). "
            "Use narrow dtypes only for parameters of two or more dimensions."
        )

    def test_a_narrow_compute_dtype_for_one_dimension(self):
        policy = Policy.loads("compute:\n  kernel: f8_e4m3fn\n  bias: f8_e4m3fn\n", "policy.yaml")
        with pytest.raises(
            InvalidPolicy, match=r"^policy.yaml:3: 'bias' \(compute\) asks f8_e4m3fn of 'layers/0/mlp/down_proj/bias'"
        ):
            policy.explain(TREE)


class TestFiles:
    def test_a_rule_read_from_a_file_knows_it(self, tmp_path):
        file = tmp_path / "policy.yaml"
        file.write_text("params:\n  kernal: bf16\n")
        with pytest.raises(UnmatchedRule, match=rf"^{file}:2: 'kernal'"):
            Policy.load(file).store(TREE)

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(
            MissingFile, match=r"nowhere.yaml: there is no such policy file. Check the path; relative paths start in "
        ) as caught:
            Policy.load(tmp_path / "nowhere.yaml")
        assert isinstance(caught.value, FileNotFoundError)

    def test_a_folder_is_no_file(self, tmp_path):
        with pytest.raises(InvalidPolicy, match=r"not a regular file. A policy is a YAML file"):
            Policy.load(tmp_path)

    def test_a_pipe_that_nobody_writes_to_is_refused(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(InvalidPolicy, match=r"not a regular file. A policy is a YAML file"):
            Policy.load(tmp_path / "pipe")

    def test_bytes_that_are_no_text_are_refused(self, tmp_path):
        (tmp_path / "p.yaml").write_bytes(b"params: \xff\xfe")
        with pytest.raises(InvalidPolicy, match=r"p.yaml: cannot be read as UTF-8 text"):
            Policy.load(tmp_path / "p.yaml")

    def test_text_beyond_ascii_is_read(self, tmp_path):
        (tmp_path / "p.yaml").write_text('# größer\nparams: {"größe": f32}\n', encoding="utf-8")
        policy = Policy.load(tmp_path / "p.yaml")
        assert policy == Policy(params={"größe": "f32"})
        policy.dump(tmp_path / "again.yaml")
        assert Policy.load(tmp_path / "again.yaml") == policy
