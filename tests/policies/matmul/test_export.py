"""Programs that are lowered on one machine and run on another: `jax.export` for one platform and for several."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bits
from jax import export
from matmuls import FP8, Case

from perparam.policies.matmul import matmul_override, scaled_matmul

serialised = pytest.param(
    lambda exported: export.deserialize(exported.serialize()),
    id="serialised",
    marks=pytest.mark.skipif(
        importlib.util.find_spec("flatbuffers") is None, reason="JAX writes exported programs with flatbuffers"
    ),
)
AS_IT_IS_OR_SERIALISED = pytest.mark.parametrize("through", [pytest.param(lambda it: it, id="as it is"), serialised])
MODES = pytest.mark.parametrize("compute", [None, FP8])


def exported(case: Case, *platforms: str, target: str | None = None) -> export.Exported:
    with matmul_override(target=target):
        run = functools.partial(scaled_matmul, **case.settings)
        return export.export(jax.jit(run), platforms=platforms)(*case.operands())


def run_portably(case: Case, *operands) -> jax.Array:
    """The product by the implementation of a program without kernels: XLA does not know the native library either."""
    with matmul_override("slabs"):
        return jax.jit(functools.partial(scaled_matmul, **case.settings))(*operands)


def has_kernel(program: export.Exported) -> bool:
    return "mosaic_gpu" in program.mlir_module() or "perparam_matmul" in program.mlir_module()


@AS_IT_IS_OR_SERIALISED
@MODES
@pytest.mark.parametrize("platforms", [("cpu",), ("cpu", "cuda"), ("cuda", "cpu", "rocm", "tpu")])
def test_runs_on_a_cpu_as_slabs_do_without_export(platforms, compute, through):
    case = Case(8, compute=compute)
    program = through(exported(case, *platforms))
    assert program.platforms == platforms
    assert not has_kernel(program)
    operands = case.operands()
    assert bits(program.call(*operands)) == bits(run_portably(case, *operands))


@AS_IT_IS_OR_SERIALISED
@MODES
def test_for_several_platforms_a_cpu_runs_the_same_whatever_the_gpu(compute, through):
    case = Case(70, compute=compute)
    program = through(exported(case, "cpu", "cuda", target="cuda:9.0"))
    assert not has_kernel(program)  # Pallas lowers for a single platform
    operands = case.operands()
    assert bits(program.call(*operands)) == bits(run_portably(case, *operands))


@MODES
@pytest.mark.parametrize("target", [None, "cuda", "cuda:8.0"])
def test_for_a_gpu_that_is_not_known_there_is_no_kernel(compute, target):
    program = exported(Case(8, compute=compute), "cuda", target=target)
    assert program.platforms == ("cuda",)
    assert not has_kernel(program)


@AS_IT_IS_OR_SERIALISED
@pytest.mark.parametrize("case", [Case(8), Case(8, compute=FP8), Case(70, compute=FP8)], ids=str)
def test_for_hopper_alone_there_is_one(case, through):
    assert has_kernel(through(exported(case, "cuda", target="cuda:9.0")))


@pytest.mark.parametrize("platform", ["tpu", "rocm"])
def test_for_other_platforms(platform):
    assert exported(Case(8), platform).platforms == (platform,)


def test_a_gradient_is_exported_too():
    case = Case(8, x="float32")
    operands = case.operands()
    loss = jax.jit(jax.grad(lambda x, *pair: jnp.sum(scaled_matmul(x, *pair) ** 2)))
    program = export.export(loss, platforms=("cpu", "cuda"))(*operands)
    assert not has_kernel(program)
    with matmul_override("slabs"):
        np.testing.assert_array_equal(program.call(*operands), loss(*operands))


def test_for_any_number_of_rows():
    case = Case(8)
    x, kernel, scale_inv = case.operands()
    (rows,) = export.symbolic_shape("rows")
    of_any = jax.ShapeDtypeStruct((rows, x.shape[1]), x.dtype)
    program = export.export(jax.jit(scaled_matmul))(of_any, kernel, scale_inv)
    assert bits(program.call(x, kernel, scale_inv)) == bits(run_portably(case, x, kernel, scale_inv))
