"""Parameters by config.json alone: those of the headers, and those that Qwen publishes."""

import json
import math

import numpy as np
import pytest
from checkpoints import CASES, GOLDEN, fields
from published import CONFIGS, PARAMETERS, VALUES

from perparam.loaders import open_checkpoint, open_config
from perparam.loaders.from_config import config_file
from perparam.policies.errors import InvalidCheckpoint
from perparam.policies.paths import is_scale

OTHER_DTYPES = {
    "fp8_ragged_block128_f16_scales": {"float16"},
    "fp8_untied_f32_scales": {"float32"},
    "llama_fp8_tensor": {"float32"},
}
"""Cases whose files have dtypes that their config.json does not tell: those of scales, and once of all else."""

TASKS = [f"tasks/{path.name}" for path in sorted((GOLDEN / "tasks").iterdir()) if (path / "config.json").is_file()]


@pytest.mark.parametrize("case", [*CASES, *TASKS])
def test_the_parameters_are_those_of_the_headers(case):
    found, exact = open_config(GOLDEN / case / "config.json").infos, open_checkpoint(GOLDEN / case).infos
    if case == "tasks/embedding_fp8":  # as Qwen3-Embedding: a saved …Model, whose config.json names …ForCausalLM
        del found["lm_head/kernel"]
    assert found.keys() == exact.keys()
    assert {path: info.shape for path, info in found.items()} == {path: info.shape for path, info in exact.items()}
    different = {path for path in exact if found[path] != exact[path]}
    assert {exact[path].dtype.name for path in different} == OTHER_DTYPES.get(case, set())
    if case != "fp8_untied_f32_scales":
        assert all(is_scale(path) for path in different)


@pytest.mark.parametrize("name", CONFIGS)
def test_published_models_have_the_published_number_of_parameters(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    infos = open_config(tmp_path / "config.json").infos
    sizes = {path: math.prod(info.shape) for path, info in infos.items()}
    assert sum(size for path, size in sizes.items() if not is_scale(path)) == PARAMETERS[name]
    assert sum(sizes.values()) == VALUES.get(name, sum(sizes.values()))
    narrow = {path for path, info in infos.items() if info.dtype.name == "float8_e4m3fn"}
    assert narrow == {
        path for path in infos if path.startswith("layers/") and path.endswith("_proj/kernel")
    }  # routers are not


def test_a_config_is_a_file_or_a_folder_without_weights(tmp_path):
    file = tmp_path / "config.json"
    assert config_file(tmp_path) is None
    file.write_text("{}")
    assert config_file(file) == config_file(tmp_path) == file
    (tmp_path / "adapter.safetensors").touch()
    assert config_file(tmp_path) is None
    assert config_file(file) == file


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"torch_dtype": None}, r"config\.json: dtype \(torch_dtype\) is missing, and without it the bytes"),
        (
            {"quantization_config": {"quant_method": "fp8", "modules_to_not_convert": ["re:.*gate"]}},
            "modules_to_not_convert has a regular expression, which is not evaluated. Pass the folder with the weights",
        ),
    ],
)
def test_a_config_that_does_not_tell_the_formats_is_refused(changes, text, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields(**changes)))
    with pytest.raises(InvalidCheckpoint, match=text):
        open_config(tmp_path / "config.json")


def test_scales_are_in_the_dtype_of_the_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields(torch_dtype="float16")))
    infos = open_config(tmp_path / "config.json").infos
    assert infos["layers/0/mlp/up_proj/scale_inv"].dtype == np.float16
    assert infos["layers/0/mlp/up_proj/scale_inv"].shape == (5, 3)  # 76×56 in blocks of 16×24
