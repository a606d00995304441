"""Programs over eight devices of a CPU: XLA cannot partition the native product; inside `shard_map` it need not."""

import json
import os
import subprocess
import sys

import pytest
from native_matmuls import required

pytestmark = [pytest.mark.slow, required]

PROGRAM = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from matmuls import Case, ON_CPU
from native_matmuls import assert_within, drawn, factors
from perparam.policies.matmul import scaled_matmul

case = Case(8, (256, 384), block=(32, 32))
operands = drawn(case)
expected = factors(case, *operands)
mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
product = lambda *operands: scaled_matmul(*operands, **case.settings)
gradient = lambda x, *pair: jax.grad(lambda x: jnp.sum(product(x, *pair).astype(jnp.float32)))(x)
single = np.asarray(jax.jit(product)(*operands))
single_gradient = np.asarray(jax.jit(gradient)(*operands)).astype(np.float32)

def report(name, run, operands):
    text = run.lower(*operands).as_text()
    y = np.asarray(run(*operands))
    assert_within(y, expected)
    same = bool(y.tobytes() == single.tobytes())
    print(json.dumps({"name": name, "native": "perparam_matmul" in text, "same": same}))

report("one device", jax.jit(product), operands)
for name, specs in {
    "rows": (P("d"), P(), P()), "out": (P(), P("d"), P("d")), "replicated": (P(), P(), P()),
}.items():
    placed = [jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in zip(operands, specs)]
    report(f"jit, {name}", jax.jit(product), placed)
    out = {"rows": P("d"), "out": P(None, "d"), "replicated": P()}[name]
    shard_map = jax.jit(jax.shard_map(product, mesh=mesh, in_specs=specs, out_specs=out))
    report(f"shard_map, {name}", shard_map, placed)
    if name == "rows":
        run = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=out))
        text, dx = run.lower(*placed).as_text(), np.asarray(run(*placed)).astype(np.float32)
        line = {"native": "perparam_matmul" in text, "same": bool((dx == single_gradient).all())}
        print(json.dumps({"name": "shard_map, gradient", **line}))
"""


@pytest.fixture(scope="module")
def lines() -> dict[str, dict]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags.strip(), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


def test_of_one_device_it_is_in_the_program(lines):
    assert lines["one device"]["native"]


@pytest.mark.parametrize("shards", ["rows", "out", "replicated"])
def test_a_partitioned_program_has_slabs(lines, shards):
    assert not lines[f"jit, {shards}"]["native"]


@pytest.mark.parametrize("shards", ["rows", "out", "replicated", "gradient"])
def test_inside_shard_map_each_device_has_the_bits_of_one(lines, shards):
    line = lines[f"shard_map, {shards}"]
    assert (line["native"], line["same"]) == (True, True)
