"""The command line: what it prints, and how it fails."""

import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

import perparam
from perparam.__main__ import main
from perparam.examples.make_checkpoint import DEMO, make_checkpoint
from perparam.loaders.names import expected

POLICY = str(pathlib.Path(__file__).parent.parent / "examples" / "policy.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "demo"))


def test_plan_prints_the_table_without_reading_weights(folder, capsys, monkeypatch):
    def refuse(tensor, *_):
        raise AssertionError(f"{tensor.name} was read")

    monkeypatch.setattr("perparam.loaders.safetensors_file.Tensor.read", refuse)
    assert main(["plan", folder, "--policy", POLICY]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == str(perparam.Policy.load(POLICY).explain(perparam.checkpoint_tree(folder)))
    assert "layers/0-3/mlp/up_proj/kernel ×4" in printed


def test_plan_writes_json(folder, capsys):
    assert main(["plan", folder, "--policy", "bf16", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {row["storage"] for row in plan["rows"]} == {"bf16", None}
    assert plan["bytes"] == sum(row["bytes"] for row in plan["rows"])


def test_generate_prints_the_new_ids(folder, capsys):
    assert main(["generate", folder, "--policy", POLICY, "--tokens", "1,2,3", "--max-new-tokens", "4"]) == 0
    printed = capsys.readouterr().out
    model = perparam.load_model(folder, POLICY)
    expected = np.asarray(perparam.generate(model, [[1, 2, 3]], max_new_tokens=4))[0].tolist()
    assert [int(word) for word in printed.split(",")] == expected


def test_audit_prints_what_a_policy_costs(folder, capsys):
    assert main(["audit", folder, "--policy", "bf16", "--tokens", "5,6,7,8"]) == 0
    printed = capsys.readouterr().out
    assert "4 tokens against float32" in printed
    assert "dequantised" in printed


@pytest.mark.slow
def test_the_demo_runs(capsys, tmp_path):
    assert main(["demo", "--folder", str(tmp_path / "kept")]) == 0
    printed = capsys.readouterr().out
    assert "Under the policy" in printed
    assert "Under f32" in printed
    assert (tmp_path / "kept" / "config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["plan", "nowhere"], "nowhere: there is no such folder"),
        (["plan", "FOLDER", "--policy", "fp8_dynamc"], "Did you mean 'fp8_dynamic'"),
        (["plan", "FOLDER", "--policy", "bad.yaml"], "bad.yaml:2: 'kernal' (params) matches none of 75 parameters"),
        (["generate", "FOLDER", "--tokens", "1,99999"], "outside the vocabulary of 2048"),
        (["audit", "FOLDER", "--tokens", "99999"], "outside the vocabulary of 2048"),
    ],
)
def test_an_error_is_one_paragraph_and_exit_code_2(arguments, text, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("params:\n  kernal: bf16\n")
    assert main([folder if word == "FOLDER" else word for word in arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("perparam: error: ")
    assert text in printed
    assert "Traceback" not in printed
    assert "\n\n" not in printed


def test_the_demo_leaves_a_folder_with_files_alone(folder, capsys):
    before = (pathlib.Path(folder) / "config.json").read_bytes()
    assert main(["demo", "--folder", folder]) == 2
    assert "there are files in it already" in capsys.readouterr().err
    assert (pathlib.Path(folder) / "config.json").read_bytes() == before


def test_what_jax_cannot_do_is_one_paragraph(folder, capsys, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand much more")

    monkeypatch.setattr("perparam.__main__.generate", fail)
    assert main(["generate", folder, "--tokens", "1"]) == 2
    assert capsys.readouterr().err == "perparam: error: JAX could not run this: RESOURCE_EXHAUSTED: out of memory\n"


@pytest.mark.parametrize("arguments", [["generate", "x", "--tokens", "1,b"], ["plan"], ["paln", "x"], []])
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: perparam" in capsys.readouterr().err


def headers_of_8b(folder):
    """The config and headers of a checkpoint of Qwen3-8B's shape, its data a hole in the file."""
    config = DEMO | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, (path, shape) in expected(perparam.Qwen3Config.from_json(config)).items():
        narrow = path.startswith("layers") and path.endswith("kernel")
        parts = [(name, "F8_E4M3" if narrow else "BF16", shape, 1 if narrow else 2)]
        if narrow:
            parts.append((f"{name}_scale_inv", "BF16", tuple(-(-dim // 128) for dim in shape), 2))
        for part, dtype, dims, size in parts:
            count = size * int(np.prod(dims))
            header[part] = {"dtype": dtype, "shape": list(dims), "data_offsets": [end, end + count]}
            end += count
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def test_the_plan_of_an_8b_checkpoint_comes_within_five_seconds_of_pressing_return(tmp_path):
    folder = headers_of_8b(tmp_path / "8b")
    command = [sys.executable, "-m", "perparam", "plan", str(folder), "--policy", "fp8_weight_only"]
    seconds = []
    for _ in range(3):  # the best of three: the machine is shared, the limit is not about its neighbours
        start = time.perf_counter()
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds.append(time.perf_counter() - start)
    assert "399 parameters and 252 grids of scales" in printed
    assert min(seconds) < 5
