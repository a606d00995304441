"""Hostile files: read, or refused by name, within a second; see `run.py`, which runs as many as one likes."""

import pathlib

import pytest
from fuzz import mutations, promise, run
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import perparam


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("fuzz") / "input"


def broken(one: mutations.Input, folder: pathlib.Path) -> str:
    """How the promise was broken, and by what."""
    failures = "\n".join(promise.check(one, folder).failures)
    return failures and f"{one.kind} ({one.label}): {failures}"


NUMBERS = st.integers(0, 2**32)


@pytest.mark.parametrize("kind", [kind for kind in mutations.KINDS if kind not in ("tokenizer", "template")])
@settings(max_examples=50, phases=[Phase.generate])  # a smaller number is no smaller input
@given(number=NUMBERS)
def test_hostile_files_are_read_or_refused(folder, kind, number):
    assert not broken(mutations.make(kind, 0, number), folder)


@pytest.mark.parametrize("kind", ["tokenizer", "template"])
@settings(max_examples=25, phases=[Phase.generate])
@given(number=NUMBERS)
def test_hostile_tokenizers_and_templates_are_used_or_refused(folder, kind, number):
    assert not broken(mutations.make(kind, 0, number), folder)


# What hypothesis itself can grow and shrink.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=40)
@given(field=st.sampled_from(sorted(mutations.config_fields())), value=JSON)
def test_a_config_with_any_field_is_read_or_refused(folder, field, value):
    files = mutations.sound_checkpoint()
    files[mutations.CONFIG] = mutations.with_field(files[mutations.CONFIG], field, value)
    assert not broken(mutations.Input("config", field, files), folder)


@settings(max_examples=40)
@given(header=st.dictionaries(st.text(max_size=10), JSON, max_size=4), data=st.binary(max_size=8))
def test_a_file_with_any_header_is_read_or_refused(folder, header, data):
    files = mutations.sound_checkpoint()
    files[mutations.WHOLE] = mutations.safetensors_of(header, data)
    assert not broken(mutations.Input("safetensors", "header", files), folder)


@settings(max_examples=40)
@given(text=st.text(st.sampled_from("params:{}[]*/kernel?\n -&<|>'\"!#%@`,f32") | st.characters(), max_size=60))
def test_a_policy_of_any_text_is_read_or_refused(folder, text):
    data = text.encode("utf-8", "surrogatepass")
    assert not broken(mutations.Input("policy", "text", {mutations.POLICY: data}), folder)


@settings(max_examples=40)
@given(pattern=st.text("*/{},akernl01?", max_size=40))
def test_a_policy_of_any_pattern_is_resolved_or_refused(folder, pattern):
    try:
        policy = perparam.Policy({pattern: "bf16"})
    except perparam.PerparamError:
        return
    data = policy.dumps().encode()
    assert not broken(mutations.Input("policy", "pattern", {mutations.POLICY: data}), folder)


# That the fuzzer finds something, and the same thing twice.


class _AsWritten(perparam.PerparamError):
    """An error that shows whatever it is given."""

    __str__ = Exception.__str__


def _refuse(text: str, error: type[Exception] = perparam.PerparamError) -> None:
    raise error(text)


def test_an_input_is_the_same_each_time():
    for kind in mutations.KINDS:
        assert mutations.make(kind, 1, 7) == mutations.make(kind, 1, 7)


def test_sound_checkpoints_are_accepted(folder):
    one = mutations.Input("safetensors", "sound", mutations.sound_checkpoint())
    assert promise.check(one, folder, load=True).refused is None


def test_sound_tokenizers_and_templates_are_accepted(folder):
    for kind in ("tokenizer", "template"):
        outcome = promise.check(mutations.Input(kind, "sound", mutations.sound_tokenizer()), folder)
        assert (outcome.refused, outcome.failures) == (None, ())


@pytest.mark.parametrize(
    ("reader", "failure"),
    [
        (lambda: 1 / 0, "ZeroDivisionError"),
        (lambda: __import__("warnings").warn("x", RuntimeWarning, stacklevel=1), "RuntimeWarning"),
        (lambda: _refuse("a\x1b", _AsWritten), "raw in its message"),
        (lambda: _refuse("a" * 20_000, _AsWritten), "20000 characters"),
    ],
)
def test_what_breaks_the_promise_is_noted(reader, failure):
    assert any(failure in line for line in promise.failures_of(reader))


def test_what_is_refused_is_no_failure():
    assert promise.failures_of(lambda: _refuse("policy.yaml:1: no.\n  Write it again.")) == []


def test_a_reader_that_hangs_is_interrupted(monkeypatch):
    monkeypatch.setattr(promise, "HUNG", 0.1)
    assert any("still running" in line for line in promise.failures_of(lambda: [None for _ in iter(int, 1)]))


@pytest.mark.thorough
def test_thousands_of_hostile_files_are_read_or_refused(tmp_path):
    report = run.run(2_500, keep=tmp_path)
    assert not report.failures, f"{report}\n" + "\n".join(map(str, report.failures))
