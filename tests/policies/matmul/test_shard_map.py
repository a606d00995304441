"""Products inside `shard_map`, which checks over which axes of the mesh results vary, on four devices of one CPU."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

PROGRAM = pathlib.Path(__file__).parent / "sharded_matmuls.py"

FLOAT32_ERROR = 1e-6
"""Sums of 1024 float32 products in another order: sqrt(1024) * 2**-24 rms is 2e-6 of a product, and of their sum, which
is as large as sqrt(1024) of them, 6e-8; gradients add a few more roundings.  Measured: up to 5e-7."""

BFLOAT16_ERROR = 2.0**-8
"""A sum that differs in its last bits is rounded to bfloat16 before shards are added up, or after."""

SHARDS = ("out", "rows", "in", "several kernels", "gradient, rows", "gradient, out")


@pytest.fixture(scope="module")
def lines():
    """What the program printed, by name."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-W", "error", PROGRAM], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return {line["name"]: line for line in map(json.loads, run.stdout.splitlines())}


@pytest.mark.thorough
@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("mode", ["W8A16", "W8A8"])
def test_narrow_kernels_give_what_they_give_without_shards(lines, mode, shards):
    line = lines[f"{mode}, {shards}"]
    assert "raised" not in line, line["raised"]
    assert line["error"] <= (FLOAT32_ERROR if shards in ("out", "rows", "several kernels") else BFLOAT16_ERROR)


@pytest.mark.thorough
@pytest.mark.parametrize("shards", [shards for shards in SHARDS if shards != "several kernels"])
def test_plain_kernels_too(lines, shards):
    line = lines[f"plain, {shards}"]
    assert "raised" not in line, line["raised"]
    assert line["error"] <= FLOAT32_ERROR


@pytest.mark.thorough
def test_groups_of_rows_are_multiplied_with_the_experts_of_their_shard(lines):
    line = lines["experts"]
    assert "raised" not in line, line["raised"]
    assert line["error"] == 0


@pytest.mark.thorough
@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("mode", ["W8A16", "W8A8"])
def test_each_shard_is_one_kernel_on_hopper(lines, mode, shards):
    assert lines[f"{mode}, {shards}"].get("kernels") == 1
