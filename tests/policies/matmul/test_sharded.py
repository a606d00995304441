"""Products with kernels that are divided over a mesh, against one device."""

import json

import jax
import jax.numpy as jnp
import pytest
from devices import run_on_devices
from jax.sharding import AxisType

from perparam.policies.formats import quantize
from perparam.policies.matmul.sharded import Part, Split, sharded_matmuls


@pytest.mark.slow
def test_they_are_those_of_one_device_for_any_shape_block_and_mesh():
    lines = [json.loads(line) for line in run_on_devices(8, "policies/matmul/split_matmuls.py").splitlines()]
    assert len(lines) >= 50
    divided = [line for line in lines if line["case"][2]]
    assert divided
    assert any(not line["same"] for line in divided)  # sums in another order, so the error is one that can be seen
    assert sum(line["same"] for line in lines) > len(lines) / 4


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
    assert split.parts(split.batch_of(batch), (None, None)) == (rows, columns)


def test_columns_stay_whole_where_a_cut_would_divide_a_block_of_activations():
    assert Part(("t",), (), 4, unit=128).of(1024) == Part(("t",), (), 4, unit=128)
    assert Part(("t",), (), 4, unit=128).of(768) == Part((), (), 1)
    assert Part((), ("t",), 4, unit=128).of(768) == Part((), ("t",), 4, unit=128)  # it is gathered anyway


def test_it_is_differentiable_and_exact_on_one_device():
    mesh = jax.make_mesh((1,), ("t",), axis_types=(AxisType.Auto,))
    kernel = quantize(jnp.arange(32.0).reshape(4, 8), "f8_e4m3fn", (2, 4))
    split = Split(mesh, (), (("t",), ()))
    x = jnp.ones((2, 8))
    (found,) = sharded_matmuls(x, [kernel], [split])
    assert (found == x @ kernel.dequantize().T).all()
    gradient = jax.grad(lambda x: sharded_matmuls(x, [kernel], [split])[0].sum())(x)
    assert jnp.allclose(gradient, kernel.dequantize().sum(axis=0), rtol=1e-6, atol=0)
