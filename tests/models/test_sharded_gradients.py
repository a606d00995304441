"""Gradients of narrow kernels that are divided over devices: those of one device, divided as their kernels are."""

import json

import pytest
from devices import run_on_devices

FLOAT32_ERROR = 4e-6
"""As of wide kernels in test_sharding.py: sums of up to 768 products and 64 tokens, back through all layers."""

E4M3_ERROR = 8e-2
"""Rows and tokens of a device are blocks of their own, so that operands of e4m3 are rounded otherwise: by 2.4e-2 rms
each, of which a gradient has two, on both sides."""


CASES = (
    ("FSDP and tensor parallel", FLOAT32_ERROR),
    ("narrow embeddings", FLOAT32_ERROR),
    ("tensor parallel, narrow products", E4M3_ERROR),
)


def printed(folder, *names):
    """What the program printed, by name."""
    text = run_on_devices(8, "models/sharded_gradients.py", folder, *names)
    return {line["name"]: line for line in map(json.loads, text.splitlines())}


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    return printed(tmp_path_factory.mktemp("sharded"), *(name for name, _ in CASES))


def assert_those_of_one_device(line, error):
    assert line["same"]
    assert line["narrow"] >= 14
    assert line["loss"] <= FLOAT32_ERROR
    assert line["gradient"] <= error, line["worst"]
    assert line["elsewhere"] == []


@pytest.mark.thorough
def test_they_are_those_of_one_device_and_divided_as_their_kernels(tmp_path):
    assert_those_of_one_device(printed(tmp_path, "tokens travel")["tokens travel"], FLOAT32_ERROR)


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "error"), CASES)
def test_so_it_is_for_other_layouts(lines, name, error):
    assert_those_of_one_device(lines[name], error)
