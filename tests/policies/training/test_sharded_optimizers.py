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


@pytest.mark.slow
def test_on_explicit_axes_what_is_stored_has_the_parameters_sharding_and_the_bits_of_one_device():
    """Scales are divided as the kernel where the devices divide their grid, and on every device elsewhere."""
    lines = [json.loads(line) for line in run_on_devices(8, "policies/training/explicit_axes.py").splitlines()]
    assert [line["name"] for line in lines] == ["delayed", "stochastic"]
    for line, grid in zip(lines, ("x", None), strict=True):
        assert all(line["same"].values()), line["same"]
        for when in ("stored", "params"):
            assert line["specs"][f"['{when}']['kernel']"] == ["x", None]
            assert line["specs"][f"['{when}']['scale_inv']"] == [grid, None]
        assert line["specs"]["['state'].inner[0].nu['kernel'].codes"] == ["x", None]
