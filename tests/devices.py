"""Programs that run on several virtual devices of a CPU, in a process of their own."""

import os
import pathlib
import subprocess
import sys

TESTS = pathlib.Path(__file__).parent


def run_on_devices(count, program, *arguments, timeout=300, **environment):
    """What a program of tests/ printed; `environment` has further variables."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip(), "PYTHONPATH": path} | environment
    command = [sys.executable, "-W", "error", TESTS / program, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout
