"""`perparam plan` of a config.json, and on a mesh of devices."""

import json
import pathlib
import re
import shlex

import pytest
from checkpoints import GOLDEN
from published import CONFIGS

from perparam.__main__ import main
from perparam.models.sharding.devices import DEVICES
from perparam.policies import tables

ROOT = pathlib.Path(__file__).parent.parent.parent
MIXTURE = GOLDEN / "qwen3_moe_fp8_dense_first"


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for name, config in CONFIGS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(tables, "_terminal", lambda: (80, False))


def read(capsys, *arguments):
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_config_gives_the_plan_of_the_headers(capsys):
    found, exact = (read(capsys, path) for path in (MIXTURE / "config.json", MIXTURE))
    assert found == exact
    assert main(["plan", str(MIXTURE / "config.json")]) == 0
    assert "formats are those that config.json implies; no headers were read." in capsys.readouterr().out


def test_json_has_the_mesh_and_what_each_device_holds(capsys):
    found = read(capsys, MIXTURE, "--mesh", "data=2, model=2", "--batch", 4, "--context", 7)
    rows = {row["path"]: row for row in found["rows"]}
    kernel, router = rows["layers/1/self_attn/q_proj/kernel"], rows["layers/1/mlp/gate/kernel"]
    assert (kernel["device_bytes"], router["device_bytes"]) == (kernel["bytes"] / 2, router["bytes"])
    assert sum(row["device_bytes"] for row in rows.values()) == found["device_bytes"] == found["mesh"]["parameters"]
    assert found["device_bytes"] < found["bytes"]
    mesh = found["mesh"]
    assert mesh["mesh"] == {"data": 2, "model": 2}
    assert (mesh["sharding"], mesh["batch"], mesh["context"]) == ("tensor_parallel", 4, 7)
    assert mesh["cache"] == mesh["token"] * 2 * 8  # two rows of seven tokens and a new one
    assert mesh["needed"] == mesh["parameters"] + mesh["cache"]
    assert mesh["steps"]["decode"]["collectives"]["all-reduce"]["count"] > 0
    assert {each["device"]: each["fits"] for each in mesh["estimates"]}["H200 SXM"]


def test_the_batch_has_a_row_for_each_of_its_parts(capsys):
    assert read(capsys, MIXTURE, "--mesh", "data=3,model=2")["mesh"]["batch"] == 3
    assert read(capsys, MIXTURE, "--mesh", "a=3,b=2", "--sharding", "fsdp")["mesh"]["batch"] == 6


def test_a_model_that_does_not_generate_has_no_decoding_step(capsys):
    found = read(capsys, GOLDEN / "tasks" / "llama_sequence", "--mesh", "model=2")["mesh"]
    assert found["steps"].keys() == {"prefill"}
    assert found["cache"] == 0


def test_notes_say_what_the_estimate_assumes(configs, capsys):
    dense, mixture = configs / "Qwen3-8B-FP8", configs / "Qwen3-30B-A3B-FP8"
    (note,) = read(capsys, dense, "--mesh", "model=16")["mesh"]["notes"]
    assert note == "Each of 8 key-value heads is in the cache of 2 devices, which share it."
    (note,) = read(capsys, mixture, "--mesh", "model=4")["mesh"]["notes"]
    assert note.startswith("Experts that are read: all choices of the router are taken as equally likely")
    (note,) = read(capsys, dense, "--mesh", "model=8", "--policy", "f32")["mesh"]["notes"]
    assert note.startswith("Products of float32 activations are counted at the rate of bf16")


def test_lines_fit_80_columns(configs, capsys, narrow):
    for sharding in ("fsdp_tensor_parallel", "expert_parallel"):
        path = configs / "Qwen3-30B-A3B-FP8"
        assert main(["plan", str(path), "--mesh", "data=4,model=8", "--sharding", sharding, "--batch", "33"]) == 0
        printed = capsys.readouterr().out
        assert max(map(len, printed.splitlines())) <= 80
        assert "33 rows cannot be divided evenly" in printed
        assert "not a measurement" in printed


@pytest.mark.slow
def test_the_documentation_shows_what_is_printed(configs, capsys, narrow, monkeypatch):
    page = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\$ perparam (plan \S+config\.json .*)\n((?:.+\n|\n(?!```))*)```", page, re.MULTILINE)
    monkeypatch.chdir(configs)
    for command, text in shown:
        assert main(shlex.split(command)) == 0
        printed = capsys.readouterr().out
        assert printed[printed.index("\ndevice ") + 1 :].startswith(text)
    assert {command.split()[1].split("/")[0] for command, _ in shown} == set(CONFIGS)


def test_the_documentation_has_the_figures_of_every_device():
    page = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
    for device in DEVICES:
        (line,) = re.findall(rf"^\| {device.name} \| \d+ GB \|.*", page, re.MULTILINE)
        memory, bandwidth, bf16, fp8, links, source = (cell.strip() for cell in line.split("|")[2:8])
        units = {"GB": 1e9, "GB/s": 1e9, "TB/s": 1e12, "TFLOP/s": 1e12}
        figures = [
            float(number.replace(",", "")) * units[unit]
            for number, unit in map(str.split, (memory, bandwidth, bf16, bf16 if fp8 == "as BF16" else fp8, links))
        ]
        assert figures == [device.memory, device.bandwidth, device.bf16, device.fp8, device.links]
        assert device.source.split(",")[0] in source


@pytest.mark.parametrize(
    "mesh", ["", "8", "model", "model=0", "model=-1", "model=two", "model=8,", "a=2,a=4", "1a=2", "a=2;b=3", "a==2"]
)
def test_a_text_that_is_no_mesh(mesh, capsys):
    assert main(["plan", str(MIXTURE), "--mesh", mesh]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "perparam: error: --mesh: expected different names with their sizes, such as data=2,model=8"
    )
    assert error.endswith(f"found {mesh!r}.\n")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([MIXTURE, "--batch", "2"], "--batch: needs a mesh. Add --mesh, such as --mesh data=2,model=8."),
        ([MIXTURE, "--sharding", "fsdp"], "--sharding: needs a mesh."),
        (
            [MIXTURE / "model.safetensors", "--mesh", "model=2"],
            "--mesh: needs a model, and there is none, since a file",
        ),
        ([MIXTURE / "config.json", "--revision", "main"], "is on this machine, and has no revision. Omit it."),
    ],
)
def test_options_that_do_not_apply(arguments, text, capsys):
    assert main(["plan", *map(str, arguments)]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--batch", "0"), ("--context", "many"), ("--sharding", "tensor")])
def test_values_that_no_option_has(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", str(MIXTURE), "--mesh", "model=2", *option])
    assert stopped.value.code == 2
    assert option[0] in capsys.readouterr().err
