"""Products with kernels in Flax's layout, (in, out): the transposed pair is exact, and axes fold where blocks allow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import bits, dtype
from hypothesis import given
from hypothesis import strategies as st

from perparam import Format, ScaledArray, quantize, scaled_matmul
from perparam.models import Linear
from perparam.policies import UnsupportedCast, as_format
from perparam.policies.products import NarrowKernel, PromoteOthers, flat_block, scaled_dot_general

E4M3 = as_format("f8_e4m3fn")
RNG = np.random.default_rng(0)

sides = st.integers(1, 5)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def pair(shape, block) -> ScaledArray:
    """A pair whose weight identifies each element: values and scales that numpy draws, so that nothing compiles."""
    grid = (*shape[:-2], *(-(-dim // side) for dim, side in zip(shape[-2:], block, strict=True)))
    values = normal(*shape).astype(dtype("float8_e4m3fn"))
    return ScaledArray(
        values, np.exp2(RNG.integers(-9, 9, grid)).astype(np.float32), Format(E4M3.values, block, dtype("float32"))
    )


def weight(array) -> np.ndarray:
    scales = np.asarray(array.scale_inv)
    for axis, side in zip((-2, -1), array.block, strict=True):
        scales = np.repeat(scales, side, axis)
    return np.asarray(array.values).astype(np.float32) * scales[..., : array.shape[-2], : array.shape[-1]]


@given(shape=st.lists(sides, min_size=2, max_size=4), block=st.tuples(sides, sides), data=st.data())
def test_a_pair_is_folded_and_transposed_exactly_or_refused(shape, block, data):
    contracted = data.draw(st.integers(1, len(shape) - 1))
    array, rows = pair(tuple(shape), block), int(np.prod(shape[:contracted]))
    kernel = NarrowKernel(array, E4M3, "a/kernel")
    if len(shape) > 2 and flat_block(array.block, array.shape, contracted) is None:
        with pytest.raises(UnsupportedCast, match=r"a/kernel: the blocks .* are not blocks of its .*Choose a block"):
            kernel.matrix(contracted)
        return
    matrix = kernel.matrix(contracted)
    assert bits(weight(matrix)) == bits(weight(array).reshape(rows, -1).T)


@given(shape=st.lists(sides, min_size=3, max_size=4), data=st.data())
def test_blocks_of_whole_last_axes_always_fold(shape, data):
    contracted = data.draw(st.integers(1, len(shape) - 1))
    assert flat_block((shape[-2], shape[-1]), tuple(shape), contracted) is not None


@pytest.mark.parametrize("block", [(128, 128), (4, 8), (-1, 3)])
def test_a_matrix_keeps_its_block_turned_round(block):
    matrix = NarrowKernel(quantize(normal(6, 9), "f8_e4m3fn", block), E4M3, "kernel").matrix(1)
    assert matrix.format.block == block[::-1]


@pytest.mark.parametrize("stored", [True, False])
def test_the_product_is_that_of_perparams_linear_with_the_turned_kernel(stored):
    x, kernel = normal(3, 2, 9), normal(9, 6)
    policy = {
        "params": {"kernel": "f8_e4m3fn"} if stored else None,
        "compute": {"kernel": "f8_e4m3fn"},
        "block": (4, 4),
    }
    layer = Linear(9, 6, policy=policy, rngs=nnx.Rngs(0))
    array = quantize(kernel, "f8_e4m3fn", (4, 4)) if stored else jnp.asarray(kernel)
    if stored:
        turned = quantize(kernel.T, "f8_e4m3fn", (4, 4))
        layer.kernel.set_value(turned.values)
        layer.scale_inv.set_value(turned.scale_inv)
    else:
        layer.kernel.set_value(jnp.asarray(kernel.T))
    y = scaled_dot_general(x, NarrowKernel(array, E4M3, "kernel"), (((2,), (0,)), ((), ())))
    assert bits(y) == bits(layer(jnp.asarray(x)))


def test_axes_are_contracted_where_they_stand():
    x, kernel = normal(4, 2, 3), normal(3, 4, 5)
    array = NarrowKernel(jnp.asarray(kernel), E4M3, "kernel")
    y = scaled_dot_general(jnp.asarray(x), array, (((2, 0), (0, 1)), ((), ())))
    rows = np.moveaxis(x, (2, 0), (1, 2)).reshape(2, 12)
    assert bits(y) == bits(scaled_matmul(rows, kernel.reshape(12, 5).T, compute="f8_e4m3fn"))
    wide = scaled_dot_general(
        jnp.asarray(x, jnp.bfloat16), array, (((2, 0), (0, 1)), ((), ())), preferred_element_type=jnp.float32
    )
    assert wide.dtype == jnp.float32


def test_batch_axes_and_shardings_are_refused():
    kernel = NarrowKernel(jnp.ones((2, 3, 4)), E4M3, "a/kernel")
    x = jnp.ones((2, 5, 3))
    with pytest.raises(
        UnsupportedCast, match=r"a/kernel: a product in f8_e4m3fn has neither batch axes nor an out_shar"
    ):
        scaled_dot_general(x, kernel, (((2,), (1,)), ((0,), (0,))))
    with pytest.raises(UnsupportedCast, match=r"found .* and sharding. Write bf16 in compute."):
        scaled_dot_general(x, kernel, (((2,), (0,)), ((), ())), out_sharding="sharding")


@pytest.mark.parametrize(
    "use",
    [lambda k: jnp.ones((4, 2)) @ k, lambda k: k * 2.0, lambda k: k[0], jnp.asarray, lambda k: jnp.sum(k)],
    ids=["matmul", "product", "index", "asarray", "sum"],
)
def test_another_use_of_the_kernel_is_an_error(use):
    kernel = NarrowKernel(jnp.ones((2, 3)), E4M3, "a/kernel")
    with pytest.raises(
        UnsupportedCast,
        match=r"a/kernel: the policy computes this \(2, 3\) kernel in f8_e4m3fn, .* was read as an array. Write bf16",
    ):
        use(kernel)


def test_an_array_is_multiplied_as_flax_does():
    x, kernel = jnp.asarray(normal(2, 3)), jnp.asarray(normal(3, 4))
    numbers = (((1,), (0,)), ((), ()))
    assert bits(scaled_dot_general(x, kernel, numbers)) == bits(jax.lax.dot_general(x, kernel, numbers))


def test_others_are_promoted_and_equal_layers_stay_equal():
    layer, kernel = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), NarrowKernel(jnp.ones((2, 3)), E4M3, "kernel")
    promote = PromoteOthers(layer.promote_dtype)
    assert promote == PromoteOthers(layer.promote_dtype)
    x, same, bias = promote((jnp.ones((1, 2), jnp.bfloat16), kernel, None), dtype=jnp.float32)
    assert (x.dtype, same is kernel, bias) == (jnp.float32, True, None)
