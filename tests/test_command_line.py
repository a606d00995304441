"""The command line: what it prints, and how it fails."""

import io
import json
import pathlib
import re
import subprocess
import sys
import time

import checkpoints
import numpy as np
import pytest
from checkpoints import fields, tensors, write
from small_tokenizer import small_tokenizer, write_tokenizer

import perparam
from perparam.__main__ import main
from perparam.commands.demo import POLICIES, TINY
from perparam.examples.make_checkpoint import DEMO, make_checkpoint
from perparam.loaders.compare import TEXT
from perparam.loaders.families import family_of, read_config

POLICY = str(pathlib.Path(__file__).parent.parent / "examples" / "policy.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "demo"))


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    """A checkpoint of one layer, without a tokenizer."""
    size = small_tokenizer().get_vocab_size(with_added_tokens=True)
    config = fields(num_hidden_layers=1, vocab_size=size, eos_token_id=None, pad_token_id=None)
    return write(tmp_path_factory.mktemp("layer"), config, tensors(config))


@pytest.fixture(scope="module")
def texts(layer, tmp_path_factory):
    """The same with a tokenizer."""
    folder = tmp_path_factory.mktemp("texts")
    for path in layer.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    write_tokenizer(folder)
    return str(folder)


def test_plan_prints_the_table_without_reading_weights(folder, capsys, monkeypatch):
    def refuse(tensor, *_):
        raise AssertionError(f"{tensor.name} was read")

    monkeypatch.setattr("perparam.loaders.safetensors.reader.Tensor.read", refuse)
    assert main(["plan", folder, "--policy", POLICY]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == str(perparam.Policy.load(POLICY).explain(perparam.checkpoint_tree(folder)))
    assert "layers/0-3/mlp/up_proj/kernel ×4" in printed


def test_plan_writes_json(folder, capsys):
    assert main(["plan", folder, "--policy", "bf16", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {row["storage"] for row in plan["rows"]} == {"bf16", None}
    assert plan["bytes"] == sum(row["bytes"] for row in plan["rows"])


@pytest.mark.slow
def test_generate_prints_the_new_ids(folder, capsys):
    assert main(["generate", folder, "--policy", POLICY, "--tokens", "1,2,3", "--max-new-tokens", "4"]) == 0
    printed = capsys.readouterr().out
    model = perparam.load_model(folder, POLICY)
    expected = np.asarray(perparam.generate(model, [[1, 2, 3]], max_new_tokens=4))[0].tolist()
    assert [int(word) for word in printed.split(",")] == expected


SUMMARY = r"\n(\d+) tokens, the first after [\d.]+ s(?:, then [\d.]+ tokens/s)?, [\d.]+ GiB on the (?:host|device)\n"


def generated(folder, capsys, *arguments):
    """What `generate` prints, and the count of tokens that its summary on stderr tells."""
    assert main(["generate", folder, "--max-new-tokens", "12", *arguments]) == 0
    printed = capsys.readouterr()
    return printed.out, int(re.fullmatch(SUMMARY, printed.err).group(1))


@pytest.fixture
def continued(texts):
    """How the model goes on from "hello", the likeliest token each time."""
    made = perparam.load_model(texts)
    tokenizer = perparam.load_tokenizer(texts)
    tokens = np.asarray(perparam.generate(made, [tokenizer.encode("hello")], max_new_tokens=12))[0]
    assert not set(tokens.tolist()) & set(tokenizer.eos_ids)
    return tokenizer.decode(tokens)


def test_generate_continues_a_text_and_tells_the_rest_on_stderr(texts, continued, capsys, tmp_path, monkeypatch):
    assert generated(texts, capsys, "--prompt", "hello") == (continued, 12)
    (tmp_path / "prompt.txt").write_text("hello", encoding="utf-8")
    assert generated(texts, capsys, "--file", str(tmp_path / "prompt.txt")) == (continued, 12)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    assert generated(texts, capsys, "--file", "-") == (continued, 12)


def test_generate_stops_at_a_text(texts, continued, capsys):
    for length in (1, 3):
        stop = continued[len(continued) // 2 :][:length]
        text, count = generated(texts, capsys, "--prompt", "hello", "--stop", "never so", "--stop", stop)
        assert text == continued[: continued.index(stop)]
        assert 1 <= count <= 12


@pytest.mark.slow
def test_a_seed_repeats_what_was_drawn(texts, continued, capsys):
    drawn = [generated(texts, capsys, "--prompt", "hello", "--temperature", "0.7", "--seed", "1") for _ in range(2)]
    assert drawn[0] == drawn[1]
    others = {generated(texts, capsys, "--prompt", "hello", "--temperature", "0.7", "--seed", seed)[0] for seed in "23"}
    assert len(others | {drawn[0][0], continued}) == 4


@pytest.mark.slow
def test_a_penalty_alone_draws_nothing(texts, capsys):
    options = ["--prompt", "hello", "--repetition-penalty", "1.3", "--seed"]
    assert len({generated(texts, capsys, *options, seed) for seed in "123"}) == 1


def test_generate_draws_as_generation_config_says_unless_told(texts, continued, capsys, tmp_path):
    folder = tmp_path / "draws"
    folder.mkdir()
    for path in pathlib.Path(texts).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"do_sample": True, "temperature": 1.5}))
    assert generated(str(folder), capsys, "--prompt", "hello")[0] != continued
    assert generated(str(folder), capsys, "--prompt", "hello", "--temperature", "0")[0] == continued
    assert generated(str(folder), capsys, "--prompt", "hello", "--top-k", "1")[0] == continued


@pytest.mark.slow
def test_compare_prints_a_table(texts, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["perparam.loaders.compare"], "_speed", lambda *_: 1234.5)  # takes four programs
    (tmp_path / "text.txt").write_text("hello world, what is the weather there?", encoding="utf-8")
    policies = ["--policy", "f32", "--policy", "bf16"]
    assert main(["compare", texts, *policies, "--text", str(tmp_path / "text.txt")]) == 0
    head, first, second, _, blank, last = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["policy", "perplexity"]
    assert first.split()[0] == "f32"
    assert "0.00e+00  100.00%" in first
    assert second.split()[0] == "bf16"
    assert second.endswith(" 1234.5")
    count = len(perparam.load_tokenizer(texts).encode("hello world, what is the weather there?"))
    assert (blank, last) == ("KL and top-1 are relative to f32", f"{count} tokens of text")


@pytest.mark.slow
def test_compare_reads_its_own_text_or_ids_and_plots(texts, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["compare", texts, "--policy", "bf16", "--plot", str(tmp_path / "x.png")]) == 0
    printed = capsys.readouterr().out
    count = len(perparam.load_tokenizer(texts).encode(TEXT))
    assert f"\n{count} tokens of text\nplot written to {tmp_path / 'x.png'}\n" in printed
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert main(["compare", texts, "--policy", "bf16", "--tokens", "1,2,3"]) == 0
    assert "\n3 tokens of text\n" in capsys.readouterr().out


def test_convert_saves_a_checkpoint_or_says_what_it_would_save(texts, capsys, tmp_path):
    target = tmp_path / "saved"
    assert main(["convert", texts, str(target), "--policy", "bf16", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    plan = str(perparam.get_policy("bf16").explain(perparam.checkpoint_tree(texts)))
    assert plan.splitlines()[1] in printed
    size, files = re.search(rf"would write (.*) to {re.escape(str(target))} in (.*)\n$", printed).groups()
    assert files == "1 file"
    assert not list(tmp_path.iterdir())
    assert main(["convert", texts, str(target), "--policy", "bf16"]) == 0
    assert re.match(rf"{re.escape(str(target))}: {re.escape(size)} from .* in [\d.]+ s\n$", capsys.readouterr().out)
    assert not {array.dtype.name for array in checkpoints.arrays(perparam.load_model(target)).values()} - {"bfloat16"}
    assert (target / "tokenizer.json").is_file()


def test_convert_writes_as_many_files_as_the_dry_run_said(texts, capsys, tmp_path):
    options = [texts, str(tmp_path / "saved"), "--policy", "f32", "--max-shard-size", "100KB"]
    assert main(["convert", *options, "--dry-run"]) == 0
    count = int(re.search(r" in (\d+) files, the largest ", capsys.readouterr().out).group(1))
    assert main(["convert", *options]) == 0
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == count > 1


@pytest.mark.slow
def test_audit_prints_what_a_policy_costs(folder, capsys):
    assert main(["audit", folder, "--policy", "bf16", "--tokens", "5,6,7,8"]) == 0
    printed = capsys.readouterr().out
    assert "4 tokens against float32" in printed
    assert "dequantised" in printed


@pytest.mark.thorough
def test_the_demo_shows_text_a_plan_and_the_cost_of_policies(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["demo", "--folder", str(tmp_path / "kept")]) == 0
    printed = capsys.readouterr().out
    plan = str(perparam.Policy.load(POLICY).explain(perparam.checkpoint_tree(TINY)))
    assert plan in printed
    # The plan is folded on a terminal only.
    assert max(map(len, printed.replace(plan, "").splitlines())) <= 80
    table = re.findall(r"^(\S+) +([\d.]+) +(\S+) +([\d.]+)% +([\d.]+ MiB)$", printed, re.MULTILINE)
    assert [row[0] for row in table] == list(POLICIES)
    assert table[0][2:4] == ("0.00e+00", "100.00")
    assert printed.count("  And it came to pass|") == 1 + len(POLICIES)
    assert "\nthe most likely token is the same for " in printed
    kept = perparam.checkpoint_tree(tmp_path / "kept")
    assert kept["layers"]["0"]["mlp"]["up_proj"]["kernel"].dtype == "float8_e4m3fn"
    assert (tmp_path / "kept" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["plan", "./nowhere"], "./nowhere: neither a folder nor a name on the hub"),
        (["plan", "FOLDER", "--policy", "fp8_dynamc"], "Did you mean 'fp8_dynamic'"),
        (["audit", "FOLDER", "--tokens", "99999"], "outside the vocabulary of 2048"),
        (["generate", "LAYER", "--prompt", "hello"], "tokenizer.json"),
        (["generate", "FOLDER", "--file", "latin1.txt"], "latin1.txt"),
        (["chat", "LAYER"], "tokenizer.json"),
        (["compare", "LAYER", "--policy", "bf16"], "tokenizer.json"),
        (["compare", "FOLDER", "--policy", "bf16", "--tokens", "1"], "expected two token ids or more"),
        (["compare", "LAYER", "--policy", "bf16", "--tokens", f"{'1,' * 40}9999"], "outside the vocabulary"),
    ],
)
def test_an_error_is_one_paragraph_and_exit_code_2(arguments, text, folder, layer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    assert main([{"FOLDER": folder, "LAYER": str(layer)}.get(word, word) for word in arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("perparam: error: ")
    assert text in printed
    assert "Traceback" not in printed
    assert "\n\n" not in printed


def test_the_demo_leaves_a_folder_with_files_alone(folder, capsys):
    before = (pathlib.Path(folder) / "config.json").read_bytes()
    assert main(["demo", "--folder", folder]) == 2
    assert "the folder is not empty. Choose a new one." in capsys.readouterr().err
    assert (pathlib.Path(folder) / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "x", "--tokens", "1,b"],
        ["generate", "x"],
        ["generate", "x", "--prompt", "hello", "--file", "-"],
        ["generate", "x", "--prompt", "hello", "--tokens", "1,2"],
        ["generate", "x", "--tokens", "1,2", "--stop", "so"],
        ["compare", "x"],
        ["convert", "x"],
        ["plan"],
        [],
    ],
)
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
    decoder = read_config(config)
    for name, (path, shape, _) in family_of(decoder).tensors(decoder).items():
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
    while len(seconds) < 3 and not min(seconds, default=5) < 5:  # the machine is shared, the limit not about neighbours
        start = time.perf_counter()
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds.append(time.perf_counter() - start)
    assert "399 parameters and 252 grids of scales" in printed
    assert min(seconds) < 5
