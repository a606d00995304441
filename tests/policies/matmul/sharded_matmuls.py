"""A program for four devices: products inside `shard_map`, one line of JSON for each. Run by test_shard_map.py.

A line is `{"name", "error", "kernels"}`: the relative error against the same without shards, and how many kernels there
are in the program for Hopper; or `{"name", "raised"}`.
"""

import functools
import json
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from perparam.policies.matmul import grouped_matmul, matmul_override, scaled_matmul, scaled_matmuls
from perparam.policies.scaled_array import scaled_array

FP8 = "float8_e4m3fn"
OUT, IN, ROWS = 512, 1024, 8

random = np.random.default_rng(0)
x = jnp.asarray(random.normal(size=(ROWS, IN)), jnp.bfloat16)
kernel = jnp.asarray(random.normal(size=(OUT, IN)), FP8)
plain = jnp.asarray(random.normal(size=(OUT, IN)), jnp.float32)
scale_inv = jnp.asarray(random.uniform(0.5, 2, (OUT // 128, IN // 128)), jnp.float32)
mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))

WHOLE, BY_OUT, BY_ROWS, BY_IN = P(), P("d"), P("d"), P(None, "d")


def loss(product, reduce=lambda total: total):
    """The gradient of x of a sum over all results; `reduce` adds up what shards have of it."""
    return jax.grad(lambda x, *pair: reduce(jnp.sum(jnp.sin(product(x, *pair).astype(jnp.float32)))))


def over_shards(product):
    """Partial sums over the shards of the columns, added up."""
    return lambda x, *pair: jax.lax.psum(product(x, *pair).astype(jnp.float32), "d")


def both(compute, x, kernel, scale_inv):
    """Two kernels from one call, side by side."""
    return jnp.concatenate(scaled_matmuls(x, [(kernel, scale_inv), (kernel, scale_inv)], compute=compute), 1)


def cases(compute):
    """`(name, what each shard computes, the same without shards, shards of the operands, shards of the result)`."""
    product = functools.partial(scaled_matmul, compute=compute)
    psum = functools.partial(jax.lax.psum, axis_name="d")
    two = functools.partial(both, compute)
    yield "out", product, product, (WHOLE, BY_OUT, BY_OUT), BY_IN
    yield "rows", product, product, (BY_ROWS, WHOLE, WHOLE), BY_ROWS
    yield "in", over_shards(product), product, (BY_IN, BY_IN, BY_IN), WHOLE
    yield "several kernels", two, two, (BY_ROWS, WHOLE, WHOLE), BY_ROWS
    yield "gradient, rows", loss(product), loss(product), (BY_ROWS, WHOLE, WHOLE), BY_ROWS
    yield "gradient, out", loss(product, psum), loss(product), (WHOLE, BY_OUT, BY_OUT), WHOLE


def experts(x, values, scale_inv, sizes):
    """The products of groups of rows with the experts of a shard, and the gradient of x."""
    kernel = scaled_array(values, scale_inv)
    product, back = jax.vjp(lambda x: grouped_matmul(x, kernel, sizes), x)
    return jnp.concatenate([product, back(jnp.sin(product))[0]], axis=1)


def each_shard(x, values, scale_inv, sizes):
    """The same without shards: a part of the rows, of the experts and of the sizes after the other."""
    parts = [jnp.split(array, 4) for array in (x, values, scale_inv, sizes)]
    return jnp.concatenate([experts(*one) for one in zip(*parts, strict=True)])


def report(name, run, whole, operands, in_specs, out_specs):
    """Prints the line of a case."""
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=in_specs[: len(operands)], out_specs=out_specs))
    try:
        want = np.asarray(jax.jit(whole)(*operands)).astype(np.float64)
        error = np.linalg.norm(np.asarray(sharded(*operands)).astype(np.float64) - want) / np.linalg.norm(want)
        with matmul_override(target="cuda:9.0"):
            lowered = sharded.trace(*operands).lower(lowering_platforms=("cuda",))
        line = {"error": float(error), "kernels": lowered.as_text().count("custom_call @mosaic_gpu")}
    except Exception as problem:  # the others still run
        traceback.print_exc(file=sys.stderr)
        line = {"raised": f"{type(problem).__name__}: {problem}"}
    print(json.dumps({"name": name, **line}))


if __name__ == "__main__":
    assert jax.device_count() == 4, jax.devices()
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    for mode, compute in (("W8A16", None), ("W8A8", FP8)):
        for name, *case in cases(compute):
            report(f"{mode}, {name}", *case[:2], (x, kernel, scale_inv), *case[2:])
    operands = (
        x,
        kernel.reshape(8, 64, IN),
        scale_inv[:, None].repeat(2, 0),
        jnp.array((0, 2, 1, 1, 2, 0, 1, 0), "i4"),
    )
    report("experts", experts, each_shard, operands, (BY_OUT,) * 4, BY_OUT)
    for name, *case in cases(None):
        if name != "several kernels":
            report(f"plain, {name}", *case[:2], (x.astype(jnp.float32), plain), *case[2:])
