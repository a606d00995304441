"""What the command line prints where something is wrong: a typo, an output that fails, an error of perparam itself."""

import os
import sys

import jax
import pytest

from perparam.commands import main
from perparam.examples.make_checkpoint import make_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "demo"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["generate", "x", "--promt", "hi"], "there is no option --promt. Did you mean --prompt?"),
        (["generate", "x", "--max-new=3", "--tokens", "1"], "no option --max-new. Did you mean --max-new-tokens?"),
        (["--versoin"], "there is no option --versoin. Did you mean --version?"),
        (["paln", "x"], "there is no command paln. Did you mean plan?"),
        (["xyz"], "there is no command xyz. There are: plan, chat,"),
    ],
)
def test_a_typo_is_named_with_the_nearest_name(arguments, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["plan", "FOLDER", "--policy", "bf17"], "--policy: 'bf17' is neither"),
        (["plan", "FOLDER", "--policy", "params=i8"], "--policy: params: dtype 'i8' is ambiguous"),
        (["plan", "FOLDER", "--policy", "bad.yaml"], "--policy: bad.yaml:2: 'kernal' (params) matches none"),
        (["plan", "FOLDER", "--target", "gpu"], "--target: 'gpu' is not a target"),
        (["generate", "FOLDER", "--tokens", "1,99999"], "--tokens: input_ids[0, 1] is 99999"),
        (["generate", "FOLDER", "--tokens", "1", "--top-p", "2"], "--top-p: expected a number from"),
        (["generate", "FOLDER", "--tokens", "1", "--max-new-tokens", "-1"], "--max-new-tokens: expected an integer"),
        (
            ["generate", "FOLDER", "--tokens", "1", "--temperature", "1", "--seed", "9" * 30],
            "--seed: expected an integer",
        ),
        (["generate", "FOLDER", "--file", "nowhere.txt"], "--file: nowhere.txt: No such file or directory"),
        (["compare", "FOLDER", "--policy", "f32", "--text", "latin1.txt"], "--text: latin1.txt: cannot be read as"),
        (
            ["compare", "FOLDER", "--policy", "f32", "--plot", "x.jpgg"],
            "--plot: x.jpgg: the extension .jpgg",
        ),
        (["convert", "FOLDER", "new", "--max-shard-size", "much"], "--max-shard-size: "),
        (["demo", "--folder", "/dev/null/x"], "--folder: /dev/null/x: Not a directory"),
    ],
)
def test_an_error_names_its_option(arguments, text, folder, tmp_path, monkeypatch, capsys):
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("params:\n  kernal: bf16\n")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    assert main([folder if word == "FOLDER" else word for word in arguments]) == 2
    assert capsys.readouterr().err.startswith(f"perparam: error: {text}")


def test_a_full_output_is_named(folder, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["plan", folder]) == 2
    assert capsys.readouterr().err == "perparam: error: standard output: No space left on device\n"


def test_a_closed_input_is_named(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["compare", folder, "--policy", "f32", "--text", "-"]) == 2
    assert capsys.readouterr().err == "perparam: error: --text: standard input is closed.\n"


def test_a_closed_output_is_named(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["plan", folder]) == 2
    assert capsys.readouterr().err == "perparam: error: standard output is closed\n"


def no_memory():
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nand much more")


def no_backend():  # as jax fails with JAX_PLATFORMS=cuda where there is no plugin
    exec(compile("assert not 'a backend'", f"{os.path.dirname(jax.__file__)}/_src/no_such_file.py", "exec"))


@pytest.mark.parametrize(
    ("failure", "text"),
    [(no_memory, "RESOURCE_EXHAUSTED: out of memory"), (no_backend, "AssertionError")],
)
def test_an_error_of_jax_is_one_line(failure, text, folder, capsys, monkeypatch):
    monkeypatch.setattr("perparam.commands.plan.open_parameters", lambda *_, **__: failure())
    assert main(["plan", folder]) == 2
    assert capsys.readouterr().err == f"perparam: error: JAX could not run this: {text}\n"


def test_an_internal_error_has_its_traceback_and_is_not_put_down_to_jax(folder, capsys, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("no such thing")

    monkeypatch.setattr("perparam.commands.plan.open_parameters", fail)
    assert main(["plan", folder]) == 1
    printed = capsys.readouterr().err
    assert "in fail" in printed
    assert "AssertionError: no such thing\nperparam: internal error: please report" in printed
    assert "JAX" not in printed
