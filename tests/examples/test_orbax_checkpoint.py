"""Orbax keeps the dtypes, bits and shardings of a training state under a policy."""

import os
import subprocess
import sys

import pytest


@pytest.mark.thorough
@pytest.mark.parametrize("devices", [1, 4])
def test_the_example_restores_what_it_saved(devices):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "perparam.examples.orbax_checkpoint"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    first, second = run.stdout.splitlines()
    assert first == f"114 arrays (bfloat16, float32, float8_e4m3fn, int32) on {devices} devices"
    assert second == "bits equal: True; dtypes and shardings equal: True; logits equal: True"
