"""A program for eight devices: `sharded_matmuls` of random shapes, blocks and meshes. Run by test_sharded.py.

It prints a line of JSON for each example, `{"case", "error", "same"}`: what was drawn, the relative error against one
device, and whether all bits are equal, or raises what hypothesis found.
"""

import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from perparam.policies.formats import as_format
from perparam.policies.matmul import scaled_matmuls
from perparam.policies.matmul.sharded import Split, sharded_matmuls
from perparam.policies.scaled_array import quantize

ERROR = 1e-6
"""Sums of up to 128 float32 products in another order: sqrt(128) * 2**-24 = 7e-7."""

MESHES = {"2×4": (2, 4), "4×2": (4, 2), "8×1": (8, 1)}


@st.composite
def cases(draw):
    """A mesh, a kernel's axes, sides in units of their devices, a block, a format, a compute format and a batch."""
    mesh = draw(st.sampled_from(sorted(MESHES)))
    sizes = dict(zip(("data", "model"), MESHES[mesh], strict=True))
    axes = [("data",), ("model",), ("data", "model")]
    rows = draw(st.sampled_from([(), *axes]))
    columns = draw(st.sampled_from([(), *[names for names in axes if not set(names) & set(rows)]]))
    sides = [math.prod(sizes[name] for name in names) * draw(st.integers(1, 16)) for names in (rows, columns)]
    block = [draw(st.sampled_from([1, 3, 8, 16, -1])) for _ in range(2)]
    format = draw(st.sampled_from(["f8_e4m3fn", "int8", "bf16", "f32"]))
    compute = draw(st.sampled_from([None, "f8_e4m3fn"])) if format != "int8" else None
    return mesh, rows, columns, sides, block, format, compute, draw(st.sampled_from([1, 3, 8]))


def operands(sides, block, format, batch, seed=0):
    random = np.random.default_rng(seed)
    kernel = jnp.asarray(random.normal(size=sides), jnp.float32)
    narrow = format in ("f8_e4m3fn", "int8")
    kernel = (
        quantize(kernel, as_format({"dtype": format, "block": block})) if narrow else kernel.astype(format_of(format))
    )
    return jnp.asarray(random.normal(size=(batch, 2, sides[1])), jnp.bfloat16 if seed else jnp.float32), kernel


def format_of(name):
    return {"bf16": jnp.bfloat16, "f32": jnp.float32}[name]


@settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(cases(), st.sampled_from([0, 1]))
def divided_products_are_those_of_one_device(case, seed):
    mesh, rows, columns, sides, block, format, compute, batch = case
    compute = compute and as_format(compute)
    x, kernel = operands(sides, block, format, batch, seed)
    devices = jax.make_mesh(MESHES[mesh], ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    split = Split(devices, ("data",), (rows, columns))

    def both(x, kernel):
        """Two kernels that share x: one whole, one divided."""
        splits = [split, Split(devices, ("data",), ((), columns))]
        return sharded_matmuls(x, [kernel, kernel], splits, compute=compute, result=jnp.float32)

    pair = kernel if hasattr(kernel, "scale_inv") else (kernel, None)
    (wanted,) = scaled_matmuls(x, [pair], compute=compute, result=jnp.float32)
    for found in jax.jit(both)(x, kernel):
        chex.assert_shape(found, (batch, 2, sides[0]))
        error = float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))
        print(json.dumps({"case": case, "error": error, "same": bool((found == wanted).all())}))
        assert error <= ERROR


if __name__ == "__main__":
    assert jax.device_count() == 8, jax.devices()
    divided_products_are_those_of_one_device()
