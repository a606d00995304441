"""State is divided over devices as its parameter is, and a step has the values of one device."""

import json

import pytest
from devices import run_on_devices


@pytest.mark.slow
def test_state_and_masters_are_divided_as_their_parameters_are_and_have_the_bits_of_one_device():
    """And of 8-bit state that is divided by columns, only scales are gathered, one for 256 values."""
    lines = [json.loads(line) for line in run_on_devices(8, "policies/training/sharded_optimizers.py").splitlines()]
    assert [line["name"] for line in lines] == ["adam", "float32", "stochastic", "dynamic8", "f8_e4m3fn", "int8"]
    for line in lines[3:]:
        assert line["gathered"] <= line["size"] / 256
    for line in lines[:3]:
        assert len(line["first"]) >= 2
        for when in ("first", "last"):
            assert set(line[when].values()) == {128 // 8}, (when, line[when])
        assert all(line["same"].values()), line["same"]
