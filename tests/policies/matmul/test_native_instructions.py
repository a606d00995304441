"""Every instruction set of this processor, each in its own process, since a process has one."""

import functools
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from native_builds import ROOT
from native_matmuls import drawn, factors, required
from native_results import CASES

from perparam.policies.native import library

pytestmark = required
slow = pytest.mark.slow

SETS = ("avx512bf16", "avx512", "avx2", "neonbf16", "neon", "scalar")
HERE = pathlib.Path(__file__).parent


def environment(instructions: str) -> dict[str, str]:
    return {**os.environ, "PERPARAM_CPU": instructions, "PYTHONPATH": os.pathsep.join(sys.path)}


def run(instructions: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(instructions), capture_output=True, text=True, timeout=900)


@functools.cache
def available(instructions: str) -> bool:
    code = "from perparam.policies.native import library; print(library.instructions())"
    return run(instructions, "-c", code).stdout.split() == [instructions]


@pytest.fixture(params=SETS)
def instructions(request) -> str:
    if not available(request.param):
        pytest.skip(f"this processor or build does not have {request.param}")
    return request.param


@slow
def test_this_processor_has_more_than_one():
    assert available("scalar")
    assert sum(map(available, SETS)) >= 2


FILES = [str(HERE / f"test_native{what}.py") for what in ("", "_gradients", "_bits")]


@pytest.mark.thorough
@pytest.mark.parametrize("instructions", SETS, indirect=True)
def test_each_passes_the_quick_tests_of_the_library(instructions):
    if instructions == library.instructions():
        pytest.skip("the quick run has it")
    done = run(instructions, "-m", "pytest", "-q", "-n", "0", *FILES)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr


@pytest.mark.thorough
@pytest.mark.parametrize("file", FILES)
def test_each_passes_the_slow_ones_too(instructions, file):
    done = run(instructions, "-m", "pytest", "-q", "-n", "0", "-m", "slow and not thorough", file)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr


@functools.cache
def products(instructions: str) -> list[np.ndarray]:
    code = "import sys, native_results; native_results.save(sys.argv[1])"
    with tempfile.TemporaryDirectory() as folder:
        done = run(instructions, "-c", code, f"{folder}/results.npz")
        assert done.returncode == 0, done.stderr[-2000:]
        with np.load(f"{folder}/results.npz") as arrays:
            return [arrays[f"arr_{i}"] for i in range(len(arrays.files))]


@slow
def test_sets_agree_within_the_sum_of_their_bounds(instructions):
    """Their products are the same; they differ in the order of sums and in where these are rounded."""
    for case, found, other in zip(CASES, products(instructions), products("scalar"), strict=False):
        bound = 2 * factors(case, *drawn(case)).bound(case.x)
        assert (np.abs(found - other) <= bound).all(), case


PLAN = """
import jax, numpy as np
from perparam import quantize, scaled_matmul
from perparam.policies import matmul_plan
choice = matmul_plan(1, (256, 256), target="cpu")
print(choice.implementation)
print(dict(choice.refused)["native"])
kernel, scale_inv = quantize(np.eye(256, dtype=np.float32), "f8_e4m3fn")
print("perparam_matmul" in jax.jit(scaled_matmul).lower(np.ones((1, 256), np.float32), kernel, scale_inv).as_text())
print(float(scaled_matmul(np.ones((1, 256), np.float32), kernel, scale_inv).sum()))
"""


@slow
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("off", "PERPARAM_CPU=off in the environment"),
        ("nonsense", "this processor or build does not have PERPARAM_CPU=nonsense"),
    ],
)
def test_without_a_set_slabs_serve_and_the_plan_says_why(name, reason):
    done = run(name, "-c", PLAN)
    assert done.stdout.splitlines() == ["slabs", reason, "False", "256.0"], done.stdout + done.stderr
