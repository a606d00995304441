"""Products with kernels that are divided over a mesh, against one device."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import run_on_devices
from jax.sharding import AxisType

from perparam.policies.errors import InvalidSharding
from perparam.policies.formats import as_format
from perparam.policies.matmul.sharded import Part, Split, needs_more, product_plan, sharded_matmuls
from perparam.policies.scaled_array import quantize


@pytest.mark.slow
def test_they_are_those_of_one_device_for_any_shape_block_and_mesh():
    lines = [json.loads(line) for line in run_on_devices(8, "policies/matmul/split_matmuls.py").splitlines()]
    assert len(lines) >= 50
    divided, whole = (
        [line["same"] for line in lines if bool(line["case"][2]) == by_columns] for by_columns in (True, False)
    )
    assert not all(divided)  # sums in another order, so the error is one that can be seen
    assert len(whole) > 10
    assert all(whole)


@pytest.mark.parametrize(
    ("batch", "rows", "columns"),
    [
        (8, Part(("t",), (), 4), Part((), ("d",), 2)),  # FSDP over d
        (
            3,
            Part(("t",), (), 4),
            Part(("d",), (), 2),
        ),  # 3 rows are not divided, so the columns of d stay where they are
    ],
)
def test_an_axis_is_gathered_only_if_it_divides_the_batch(batch, rows, columns):
    mesh = jax.sharding.AbstractMesh((2, 4), ("d", "t"))
    split = Split(mesh, ("d",), (("t",), ("d",)))
    assert split.parts(split.batch_of(batch)) == (rows, columns)


@pytest.mark.parametrize(
    ("width", "wide_kernel", "rounding", "columns"),
    [
        (1024, False, None, ("t",)),
        (768, False, (1, 128), ("t",)),  # 192 columns, one and a half blocks: x is rounded as whole rows before
        (768, True, None, ()),  # the kernel is quantised in the product, so that a device needs whole blocks
        (1024, True, None, ("t",)),
    ],
)
def test_activations_are_rounded_in_whole_blocks(width, wide_kernel, rounding, columns):
    split = Split(jax.sharding.AbstractMesh((4,), ("t",)), (), ((), ("t",)))
    kernel = jnp.ones((128, width), jnp.bfloat16)
    kernel = kernel if wide_kernel else quantize(kernel, "f8_e4m3fn")
    plan = product_plan(np.dtype(jnp.bfloat16), kernel, split, (), as_format("f8_e4m3fn"))
    assert (plan.rounding and plan.rounding.block, plan.parts[1].kept) == (rounding, columns)
    assert needs_more(plan.parts, split) == (columns == ())


def test_a_model_over_one_mesh_is_not_called_inside_another():
    mesh, other = (jax.make_mesh((1,), (name,), axis_types=(AxisType.Auto,)) for name in "tu")
    split, kernel = Split(mesh, (), (("t",), ())), jnp.ones((4, 8))
    with jax.set_mesh(mesh):
        assert sharded_matmuls(jnp.ones((2, 8)), [kernel], [split])[0].shape == (2, 4)
    with jax.set_mesh(other), pytest.raises(InvalidSharding, match=r"inside jax\.set_mesh or shard_map with"):
        sharded_matmuls(jnp.ones((2, 8)), [kernel], [split])


def test_it_is_differentiable_and_exact_on_one_device():
    mesh = jax.make_mesh((1,), ("t",), axis_types=(AxisType.Auto,))
    kernel = quantize(jnp.arange(32.0).reshape(4, 8), "f8_e4m3fn", (2, 4))
    split = Split(mesh, (), (("t",), ()))
    x = jnp.ones((2, 8))
    (found,) = sharded_matmuls(x, [kernel], [split])
    assert (found == x @ kernel.dequantize().T).all()
    gradient = jax.grad(lambda x: sharded_matmuls(x, [kernel], [split])[0].sum())(x)
    assert jnp.allclose(gradient, kernel.dequantize().sum(axis=0), rtol=1e-6, atol=0)
