"""Many products at once: of Python's threads, of one program and of several devices, with few threads in XLA's pool."""

import os
import subprocess
import sys

import pytest
from native_matmuls import required

pytestmark = [pytest.mark.thorough, required]

SECONDS = 180
"""A hang fails the test; measured: 10 seconds on two busy cores."""

PROGRAM = """
import concurrent.futures, sys
import jax, jax.numpy as jnp, numpy as np
from matmuls import Case
from native_matmuls import drawn
from perparam.policies.matmul import scaled_matmul, scaled_matmuls

threads, devices = 12, jax.devices()
assert len(devices) == int(sys.argv[1])

def program(x, first, second):
    # Eight products that do not depend on each other, two that depend on them, and gradients.
    ys = [scaled_matmul(x * 2.0**i, *first) for i in range(4)]
    ys += [y for i in range(2) for y in scaled_matmuls(x * 2.0**i, [first, first])]
    zs = [scaled_matmul(y, *second) for y in ys[:2]]
    return ys, zs, jax.grad(lambda x: jnp.sum(scaled_matmul(x, *first) ** 2))(x)

jobs = []
for rows in (1, 6, 70):
    x, *first = drawn(Case(rows, (300, 200), x="float32"))
    _, *second = drawn(Case(rows, (130, 300), x="float32"))
    for device in devices:
        operands = jax.device_put((x, first, second), device)
        run = jax.jit(program)
        jobs.append((run, operands, jax.tree.map(np.asarray, run(*operands))))

def work(number):
    run, operands, want = jobs[number % len(jobs)]
    results = [run(*operands) for _ in range(5)]  # in flight together
    return all(
        np.array_equal(found, expected)
        for result in results for found, expected in zip(jax.tree.leaves(result), jax.tree.leaves(want), strict=True)
    )

with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    print(all(pool.map(work, range(300))))
"""


@pytest.mark.parametrize(("threads", "devices"), [(1, 1), (2, 1), (2, 4), (5, 1)])
def test_nothing_hangs_and_all_results_are_the_same(threads, devices):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "NPROC": str(threads), "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROGRAM, str(devices)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.stdout.split() == ["True"], done.stdout + done.stderr[-2000:]
