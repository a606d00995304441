"""`include:` in YAML: rules of a preset or another file, after those of the file that includes them."""

import os

import pytest

from perparam import Policy, get_policy
from perparam.policies import InvalidPolicy, MissingFile, PerparamError, UnknownDtype


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_the_rules_of_a_preset_follow_those_of_the_file(write):
    file = write("p.yaml", "params:\n  embedding: bf16\n  kernel: int8\ninclude: fp8_weight_only\noutput: f32\n")
    policy = Policy.load(file)
    assert policy == get_policy("fp8_weight_only").merge(
        {"params": {"embedding": "bf16", "kernel": "int8"}, "output": "f32"}
    )
    assert [(rule.key, rule.source) for rule in policy.params.rules] == [
        ("embedding", f"{file}:2"),
        ("kernel", f"{file}:3"),
        ("{lm_head,score}/kernel?", "fp8_weight_only.yaml:3"),
        ("**/gate/kernel?", "fp8_weight_only.yaml:4"),
        ("scale_inv", "fp8_weight_only.yaml:6"),
    ]
    assert Policy.loads(policy.dumps()) == policy


@pytest.mark.parametrize(
    "text", ["params: {default: bf16}", "params: {kernel: int8}\noutput: f32", "block: [64, 64]", "kv_cache: int8"]
)
def test_including_a_policy_is_merging_the_file_into_it(write, text):
    file = write("over.yaml", text)
    included = Policy.loads(f"include: fp8_weight_only\n{text}")
    assert get_policy("fp8_weight_only").merge(Policy.load(file)) == included


def test_a_slot_of_one_dtype_replaces_that_of_the_included_policy():
    assert Policy.loads("include: fp8_dynamic\ncompute: f32\n").compute == Policy(compute="f32").compute
    assert Policy.loads("include: fp8_dynamic\ncompute: null\nblock: null\n").compute == Policy().compute
    changed = Policy.loads("include: fp8_dynamic\ncompute: {default: f32}\n").compute
    assert changed.default.format.values == "float32"
    assert changed.rules == get_policy("fp8_dynamic").compute.rules


def test_a_path_is_relative_to_the_file(write, monkeypatch, tmp_path):
    write("base/base.yaml", "params: {kernel: f8_e4m3fn}\nblock: [64, 64]\n")
    write("base/middle.yaml", "include: base.yaml\nparams: {bias: f32}\n")
    file = write("top.yaml", "include: base/middle.yaml\ncompute: bf16\n")
    monkeypatch.chdir("/")
    policy = Policy.load(file)
    assert policy == Policy({"bias": "f32", "kernel": "f8_e4m3fn"}, "bf16", block=(64, 64))
    assert policy.params.rules[1].source == f"{tmp_path}/base/base.yaml:1"


def test_an_error_in_an_included_file_has_both_places(write):
    write("base.yaml", "params:\n  kernel: f33\n")
    with pytest.raises(UnknownDtype, match=r"top.yaml:2: .*base.yaml:2: params: kernel: unknown dtype 'f33'"):
        Policy.load(write("top.yaml", "output: f32\ninclude: base.yaml\n"))


@pytest.mark.parametrize("name", ["fp8_weight_onyl", "other.yaml", ".", "/dev/zero", "pipe", "x" * 5000, '"a\\0"'])
def test_a_name_that_is_no_preset_and_no_file_is_refused(write, name, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MissingFile, match=r"p.yaml:1: include: .* is neither a preset \(bf16, .*\) nor a file; paths "):
        Policy.load(write("p.yaml", f"include: {name}\n"))


def test_text_includes_presets_only(write, monkeypatch, tmp_path):
    write("base.yaml", "output: f32\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFile, match="possible only in a policy that is a file itself"):
        Policy.loads("include: base.yaml")


@pytest.mark.parametrize("value", ["[bf16]", "null", "{bf16: f32}", "3"])
def test_one_policy_is_included(value):
    with pytest.raises(
        InvalidPolicy, match=r"<text>:1: include: expected one preset or file, found .* Write include: "
    ):
        Policy.loads(f"include: {value}")


def test_a_cycle_is_refused(write, tmp_path):
    write("a.yaml", "include: b.yaml\n")
    os.symlink(tmp_path / "a.yaml", tmp_path / "c.yaml")
    with pytest.raises(InvalidPolicy, match=r"a.yaml:1: .*b.yaml:1: include: 'c.yaml' includes itself"):
        Policy.load(write("b.yaml", "include: c.yaml\n").with_name("a.yaml"))


def test_files_that_include_one_another_are_bounded(write):
    files = [write(f"{i}.yaml", f"include: {i + 1}.yaml\nparams: {{a{i}: f32}}\n") for i in range(9)]
    write("9.yaml", "output: f32\n")
    assert len(Policy.load(files[2]).params.rules) == 7
    with pytest.raises(InvalidPolicy, match="more than 8 files include one another"):
        Policy.load(files[1])


def test_the_rules_of_all_files_are_bounded_together(write):
    write("base.yaml", "params:\n" + "".join(f'  "**/*{i}*/*": f32\n' for i in range(200)))
    file = write("top.yaml", "include: base.yaml\nparams:\n" + "".join(f'  "**/*{i}*/b": f32\n' for i in range(200)))
    with pytest.raises(PerparamError, match="params: more than 256 patterns"):
        Policy.load(file)
