"""The summary of a model and its repr: the sizes, formats and bytes are those of its arrays."""

import json

import checkpoints
import pytest
from checkpoints import fields, tensors, write

import perparam


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = fields()
    return perparam.load_model(write(tmp_path_factory.mktemp("model"), config, tensors(config)))


def test_modules_add_up_to_the_model(model):
    found = json.loads(model.summary().to_json())
    arrays = checkpoints.arrays(model)
    assert found["bytes"] == sum(row["bytes"] for row in found["rows"]) == sum(x.nbytes for x in arrays.values())
    counted = sum(array.size for path, array in arrays.items() if not path.endswith("scale_inv"))
    assert found["parameters"] == sum(row["parameters"] for row in found["rows"]) == counted
    assert any(row["module"].startswith("layers/0-") and "f8_e4m3fn" in row["formats"] for row in found["rows"])


def test_a_model_is_shown_in_about_ten_lines(model):
    lines = repr(model).splitlines()
    assert lines[0] == "Qwen3"
    assert len(lines) == 10
    (policy,) = (line for line in lines if line.startswith("  policy "))
    assert policy.endswith("Policy()")
    assert repr(model) in model.summary().to_text()


def test_a_model_of_shapes_is_shown_too(model):
    from flax import nnx

    assert repr(nnx.eval_shape(lambda: model)) == repr(model)
