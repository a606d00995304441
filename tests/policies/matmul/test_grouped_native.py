"""`grouped_matmul` by the native library: the bits of each group's `scaled_matmul`, without reading other kernels."""

import ctypes
import mmap
import os
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bits
from matmuls import FP8
from native_matmuls import required
from native_results import groups

from perparam import quantize
from perparam.policies.matmul import grouped_matmul, grouped_matmuls, matmul_override, scaled_matmul
from perparam.policies.scaled_array import ScaledArray

pytestmark = [pytest.mark.optimised, required]

OUT, IN, BLOCK = 70, 200, (48, 72)

SIZES = ((0, 40, 0), (1, 0, 0), (4, 5, 14), (0, 513, 1))
"""One group with all rows, one row, numbers that some instruction set multiplies at a time, more than a task has."""


def stack(kind: str, groups: int = 3):
    """Kernels of all groups, float32, another float or in a format; their blocks divide neither side."""
    kernel = np.random.default_rng(1).normal(size=(groups, OUT, IN)).astype(np.float32)
    if kind in ("float32", "float16", "bfloat16"):
        return jnp.asarray(kernel, kind)
    return quantize(kernel, kind) if kind == "mxfp8" else quantize(kernel, kind, BLOCK)


def one_of(kernel, group):
    """The kernel of one group."""
    if isinstance(kernel, ScaledArray):
        return ScaledArray(kernel.values[group], kernel.scale_inv[group], kernel.format)
    return kernel[group]


def activations(rows: int, dtype: str = "bfloat16"):
    return jnp.asarray(np.random.default_rng(2).normal(size=(rows, IN)), dtype)


def group_by_group(function, kernel, sizes, *rows):
    """The results of a function for the rows of each group and its kernel, one below the other."""
    starts = np.cumsum(sizes) - sizes
    parts = [
        function(one_of(kernel, group), *(array[start : start + size] for array in rows))
        for group, (start, size) in enumerate(zip(starts, sizes, strict=True))
        if size
    ]
    return np.concatenate([np.asarray(part) for part in parts])


@pytest.mark.parametrize(
    ("kind", "x", "compute"),
    [
        (FP8, "bfloat16", None),
        ("bfloat16", "bfloat16", None),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (FP8, "bfloat16", FP8),
                ("mxfp8", "bfloat16", None),
                (FP8, "float32", "bfloat16"),
            ]
        ),
        *(
            pytest.param(*case, marks=pytest.mark.thorough)
            for case in [
                ("int8", "float16", None),
                ("float16", "float32", None),
                ("float32", "bfloat16", None),
            ]
        ),
    ],
    ids=str,
)
def test_a_group_has_the_bits_of_its_scaled_matmul(kind, x, compute):
    kernel = stack(kind)
    run = jax.jit(lambda x, sizes: grouped_matmul(x, kernel, sizes, compute=compute))
    for sizes in SIZES:
        rows = activations(sum(sizes), x)
        with matmul_override("native"):
            found = run(rows, jnp.array(sizes, jnp.int32))
            want = group_by_group(lambda one, rows: scaled_matmul(rows, one, compute=compute), kernel, sizes, rows)
        assert bits(found) == bits(want), sizes


@pytest.mark.parametrize("compute", [None, pytest.param(FP8, marks=pytest.mark.slow)])
def test_so_does_the_gradient_of_x(compute):
    kernel, sizes = stack(FP8), SIZES[2]
    x, along = activations(sum(sizes)), jnp.asarray(np.random.default_rng(3).normal(size=(sum(sizes), OUT)), "bfloat16")

    @jax.jit
    def gradient(x, along, sizes):
        return jax.vjp(lambda x: grouped_matmul(x, kernel, sizes, compute=compute), x)[1](along)[0]

    def one(kernel, x, along):
        return jax.jit(lambda x, along: jax.vjp(lambda x: scaled_matmul(x, kernel, compute=compute), x)[1](along)[0])(
            x, along
        )

    with matmul_override("native"):
        found = gradient(x, along, jnp.array(sizes, jnp.int32))
        assert "ffi_call" in str(jax.make_jaxpr(gradient)(x, along, jnp.array(sizes, jnp.int32)))
        assert bits(found) == bits(group_by_group(one, kernel, sizes, x, along))


def test_several_stacks_have_the_bits_of_each_by_itself():
    x, kernels, sizes = groups(FP8)
    kernels.append(kernels[1].dequantize(jnp.bfloat16))  # of another format, so in another run
    found = grouped_matmuls(x, kernels, sizes)
    for y, kernel in zip(found, kernels, strict=True):
        assert bits(y) == bits(grouped_matmul(x, kernel, sizes))


@pytest.mark.slow
def test_transformations_keep_the_bits():
    x, (kernel, _), sizes = groups(FP8)
    want = bits(grouped_matmul(x, kernel, sizes))
    both = jax.jit(jax.vmap(grouped_matmul, (0, None, None)))(jnp.stack([x, 2 * x]), kernel, sizes)
    assert bits(both[0]) == want
    assert bits(both[1] / 2) == want
    steps = jax.lax.scan(lambda _, x: (_, grouped_matmul(x, kernel, sizes)), 0, jnp.stack([x, x]))[1]
    assert bits(steps[1]) == want
    assert bits(jax.jit(jax.checkpoint(grouped_matmul))(x, kernel, sizes)) == want


def test_an_exported_program_has_the_loop():
    x, (kernel, _), sizes = groups(FP8)
    module = jax.export.export(jax.jit(lambda x, sizes: grouped_matmul(x, kernel, sizes)))(x, sizes).mlir_module()
    assert "perparam_" not in module  # the prefix of all handlers
    assert "stablehlo.while" in module


def read_with_unreadable_kernels() -> None:
    """Multiplies with the kernels of groups with rows, while memory protection forbids to read others."""
    groups, side, used = 16, 32, (3, 12)  # a kernel of float32, which NumPy can lend to JAX, is one page of 4 KiB
    memory = mmap.mmap(-1, groups * side * side * 4)
    kernels = np.frombuffer(memory, np.float32).reshape(groups, side, side)
    kernels[:] = np.random.default_rng(0).normal(size=kernels.shape)
    sizes = np.zeros(groups, np.int32)
    sizes[list(used)] = 2, 1
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, side)), jnp.float32)
    run = jax.jit(grouped_matmul)
    want = bits(run(x, jnp.asarray(kernels.copy()), sizes))
    alias = jnp.from_dlpack(kernels, copy=False)
    libc = ctypes.CDLL(None, use_errno=True)
    for group in set(range(groups)) - set(used):
        assert libc.mprotect(ctypes.c_void_p(kernels[group].ctypes.data), 4096, 0) == 0
    print("same" if bits(run(x, alias, sizes)) == want else "different", flush=True)
    os._exit(0)  # arrays of unreadable memory are better not freed


@pytest.mark.skipif(mmap.PAGESIZE != 4096 or not sys.platform.startswith("linux"), reason="protects pages of 4 KiB")
def test_kernels_of_groups_without_rows_may_be_unreadable():
    code = "import test_grouped_native; test_grouped_native.read_with_unreadable_kernels()"
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "same\n", (done.returncode, done.stderr[-2000:])
