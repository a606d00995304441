"""Documentation holds: code blocks run as they stand, docstring examples are true."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import jax
import numpy as np
import pytest

import perparam

ROOT = pathlib.Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
MODULES = [
    module.name
    for module in pkgutil.walk_packages(perparam.__path__, "perparam.")
    if module.name.split(".")[1] in ("policies", "models", "loaders")
]


def run_blocks(path):
    """Runs the Python blocks of a page from top to bottom, as a reader would, and returns what they defined."""
    blocks = BLOCK.findall(path.read_text(encoding="utf-8"))
    assert blocks, f"{path} has no code"
    names = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, str(path), "exec"), names)
    return names


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # a page shows what readers see, their own warnings settings included
def test_the_page_on_your_own_model_runs(capsys):
    with jax.numpy_dtype_promotion("standard"):
        names = run_blocks(ROOT / "docs" / "your-own-model.md")
    printed = capsys.readouterr().out
    assert "nearest: Dense_0/kernel" in printed
    assert "Conv multiplies wide arrays" in printed
    assert names["y"].dtype == "float32"


@pytest.mark.filterwarnings("ignore")
def test_the_page_on_the_matmul_runs(capsys):
    with jax.numpy_dtype_promotion("standard"):
        names = run_blocks(ROOT / "docs" / "matmul.md")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("hopper columns (")
    assert printed[1].startswith("widen, then dot (")
    assert "hopper rows: 4000×4096 is no multiple of 128×128" in printed[1]
    assert float(printed[2]) < 0.1
    assert names["z"].dtype == jax.numpy.bfloat16


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_on_generation_runs(capsys):
    with jax.numpy_dtype_promotion("standard"):
        names = run_blocks(ROOT / "docs" / "generation.md")
    assert capsys.readouterr().out.endswith("layers/0/mlp (2, 6, 4, 4)\n")
    assert names["drawn"].shape == (6, 8)
    assert (names["tokens"] == names["again"]).all()
    assert len(names["answers"]) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_on_embeddings_runs(capsys):
    with jax.numpy_dtype_promotion("standard"):
        names = run_blocks(ROOT / "docs" / "embeddings.md")
    embedding, scores, label = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\(1, 32\) [01]", embedding)
    assert scores == "(2,) float32"
    assert label.split(" ", 1)[0] in names["labels"]
    assert label.endswith("(1, 2)")


@pytest.mark.filterwarnings("ignore")
def test_the_page_on_loading_runs(capsys):
    with jax.numpy_dtype_promotion("standard"):
        names = run_blocks(ROOT / "docs" / "loading.md")
    files, *summary, own = capsys.readouterr().out.splitlines()
    assert summary[0] == "2 parameters and 1 grid of scales: 1 cast, 1 made, 1 quantised"
    assert own == "float8_e4m3fn (2, 3)"
    assert files == "['config.json', 'model.safetensors', 'policy.yaml', 'tokenizer.json', 'tokenizer_config.json']"
    assert perparam.load_model(names["small"], names["small"] / "policy.yaml").config.quantization is not None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_on_training_runs(capsys):
    with jax.numpy_dtype_promotion("standard"):
        names = run_blocks(ROOT / "docs" / "training.md")
    printed = capsys.readouterr().out
    assert "mu:dynamic8, nu:dynamic8" in printed  # the plan
    assert "layers merged; the largest" in printed
    np.testing.assert_allclose(names["w"], 0.8, rtol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_the_page_on_several_devices_runs(capsys):
    with jax.numpy_dtype_promotion("standard"):
        names = run_blocks(ROOT / "docs" / "several-devices.md")
    assert capsys.readouterr().out == "P('model', None)\n"
    assert names["tokens"].shape == (1, 4)
    assert names["model"].embed_tokens.embedding[...].sharding.spec == jax.sharding.PartitionSpec("model", "data")


@pytest.mark.slow
def test_the_readme_runs(tmp_path, monkeypatch, capsys):
    from perparam.commands import demo

    demo.save(tmp_path / "demo")
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy.yaml").write_text((ROOT / "examples" / "policy.yaml").read_text())
    names = run_blocks(ROOT / "README.md")
    assert len(names["answer"].tokens) == 16
    shown = re.search(
        r"^prints\n\n```text\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.M
    )
    assert all(len(line) <= 80 for line in shown.group(1).splitlines())
    # The numbers of the audit and the text depend on the processor; lines may be folded.
    expected, printed = shown.group(1).split(), capsys.readouterr().out.split()
    assert printed[: expected.index("KL")] == expected[: expected.index("KL")]
    assert names["audit"].top1 >= 0.85


def test_the_readme_shows_the_policy_of_the_examples():
    assert (ROOT / "examples" / "policy.yaml").read_text() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_page_on_policies_runs():
    names = run_blocks(ROOT / "docs" / "policies.md")
    assert names["policy"] == perparam.Policy.loads(names["policy"].dumps())


@pytest.mark.parametrize("name", ["fp8_weight_only", "fp8_dynamic", "bf16", "f32"])
def test_the_presets_stand_in_the_documentation_as_they_are(name):
    preset = (ROOT / "policies" / "presets" / f"{name}.yaml").read_text()
    assert preset in (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_are_true(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_there_are_docstring_examples():
    finder = doctest.DocTestFinder()
    found = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(found) >= 12
