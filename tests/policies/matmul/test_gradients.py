"""Gradients with every implementation, against central differences of the product in float64."""

import contextlib
import math

import interpreter
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import dtype, reference_dequantize, reference_quantize
from matmuls import FP8, ROUNDING, Case, assert_product, takers, widened

from perparam.policies.matmul import matmul_override, scaled_matmul
from perparam.policies.matmul.calls import Operands
from perparam.policies.matmul.gradients import gradient_of_x
from perparam.policies.scaled_array import scaled_array

# The product is linear in each operand, so central differences are exact up to float64's rounding, with any step.
NARROW = (
    Case(1, (41, 72), x="float32", block=(16, 24)),
    Case(2, (128, 256)),
    Case(2, (128, 256), compute=FP8),
    Case(70, (256, 128), compute=FP8),
)
PLAIN = (
    Case(1, (41, 72), x="float32", kernel="float32"),
    Case(2, (41, 72), x="float32", kernel="float32"),
    Case(2, (41, 72), x="float32", kernel="bfloat16"),
    Case(1, (41, 72), kernel="bfloat16"),
)
QUANTISED = (
    Case(2, (128, 256), x="float32", kernel="float32", compute=FP8),
    Case(70, (256, 128), x="float32", kernel="float32", compute=FP8),
)
"""Plain kernels that are quantised on the way."""

SECOND = 1e-5
"""Three float32 sums of up to 256 products, each sqrt(256) * 2**-24 = 1e-6 rms, of numbers that partly cancel."""


@pytest.fixture(scope="module", autouse=True)
def without_a_gpu():
    with contextlib.nullcontext() if interpreter.MISSING else interpreter.interpreted():
        yield


def gradients(name: str, case: Case, y_gradient, x, kernel, scale_inv):
    """`(dx, dkernel)` of the sum of results times `y_gradient`; dkernel is float0 or zeros where it is frozen."""
    with matmul_override(name):

        @jax.jit
        def pull_back(y_gradient, x, kernel):
            y, back = jax.vjp(lambda *both: scaled_matmul(*both, scale_inv, **case.settings), x, kernel)
            return back(y_gradient.astype(y.dtype))

        return pull_back(y_gradient, x, kernel)


def assert_gradient(found, run, operand, y_gradient, axis: int, magnitude) -> None:
    """found is the gradient of the sum of `run(operand) * y_gradient`, along sixteen columns of the operand.

    A row of the operand has results of its own, so a step is taken in all rows at once; `axis` of y is what they share.
    Of as many products in float32, where a weight and its scale were multiplied before, sums are `magnitude` in size.
    Differences lose the bits by which `run` is larger than they: some 2**10 times 2**-53 is nothing beside 2**-24.
    """
    assert found.shape == operand.shape
    terms, found = y_gradient.shape[axis], np.asarray(found)
    for column in range(0, operand.shape[1], math.ceil(operand.shape[1] / 16)):
        step = np.zeros_like(operand)
        step[:, column] = 0.5
        want = np.sum((run(operand + step) - run(operand - step)) * y_gradient, axis=axis)
        bound = (terms + 2) * ROUNDING["float32"] * magnitude[:, column] + ROUNDING[found.dtype.name] * np.abs(want)
        assert (np.abs(found[:, column].astype(np.float64) - want) <= bound * (1 + 2.0**-7)).all()


def y_gradient_of(case: Case) -> np.ndarray:
    return np.random.default_rng(9).normal(size=(case.rows, case.shape[0])).astype(dtype(case.x))


@takers(*NARROW, *PLAIN)  # not `quick_kernels`: kernels have no part in the gradient, and tests of their own
def test_of_x(name, case):
    x, kernel, scale_inv = case.operands()
    dy = y_gradient_of(case)
    dx, _ = gradients(name, case, dy, x, kernel, scale_inv)
    dy, weight = dy.astype(np.float64), widened(kernel, scale_inv, case.sides)
    assert dx.dtype == dtype(case.x)
    # In W8A8 the rounding of x is passed straight through: the gradient is that of the product with x as it is.
    assert_gradient(dx, lambda x: x @ weight.T, x.astype(np.float64), dy, 1, np.abs(dy) @ np.abs(weight))


@takers(*PLAIN)
def test_of_a_plain_kernel(name, case):
    x, kernel, _ = case.operands()
    dy = y_gradient_of(case)
    _, dkernel = gradients(name, case, dy, x, kernel, None)
    dy, x = dy.astype(np.float64), x.astype(np.float64)
    assert dkernel.dtype == dtype(case.kernel)
    assert_gradient(dkernel, lambda kernel: x @ kernel.T, kernel.astype(np.float64), dy, 0, np.abs(dy).T @ np.abs(x))


@takers(*QUANTISED)
def test_of_both_operands_that_are_made_narrow(name, case):
    x, kernel, _ = case.operands()
    dy = y_gradient_of(case)
    dx, dkernel = gradients(name, case, dy, x, kernel, None)
    assert dx.dtype == dkernel.dtype == np.float32
    # Each operand's rounding is passed straight through; the other is what it was rounded to.
    weight = reference_dequantize(*reference_quantize(kernel, FP8, case.sides), case.sides)
    rounded = reference_dequantize(*reference_quantize(x, FP8, (1, 128)), (1, 128))
    dy, x, kernel = (array.astype(np.float64) for array in (dy, x, kernel))
    assert_gradient(dx, lambda x: x @ weight.T, x, dy, 1, np.abs(dy) @ np.abs(weight))
    assert_gradient(dkernel, lambda kernel: rounded @ kernel.T, kernel, dy, 0, np.abs(dy).T @ np.abs(rounded))


@pytest.mark.parametrize("of", ["float32", "bfloat16"])
@pytest.mark.parametrize("compute", [None, FP8, "bfloat16"])
def test_of_x_on_other_devices_than_cpus(monkeypatch, of, compute):
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, default, **_: default(*operands))
    case = Case(3, (41, 72), x=of, block=(16, 24), compute=compute)
    x, kernel, scale_inv = map(jnp.asarray, case.operands())
    dy = y_gradient_of(case)
    found = gradient_of_x(case.call, jnp.asarray(dy), Operands(x, scaled_array(kernel, scale_inv, case.sides)))
    dy, weight = dy.astype(np.float64), widened(kernel, scale_inv, case.sides)
    # The weight is rounded to bfloat16 where gradients are, or where the product rounds it, and then so are they.
    roundings = 0 if (of, compute) in (("float32", None), ("float32", FP8)) else 2
    bound = (roundings * ROUNDING["bfloat16"] + (case.shape[0] + 2) * ROUNDING["float32"]) * (
        np.abs(dy) @ np.abs(weight)
    )
    assert found.dtype == np.float32
    assert (np.abs(np.asarray(found).astype(np.float64) - dy @ weight) <= bound).all()


@pytest.mark.slow
@takers(*NARROW[:1], *PLAIN[:2])
def test_second_derivatives_of_a_nonlinear_loss(name, case):
    x, kernel, scale_inv = case.operands()
    x, direction = x / 64, case.operands(seed=3)[0]
    weight = widened(kernel, scale_inv, case.sides)
    bend = np.float32(1 / np.abs(x.astype(np.float64) @ weight.T).max())

    def loss(x):
        return jnp.sum(jnp.sin(scaled_matmul(x, kernel, scale_inv, **case.settings) * bend))

    with matmul_override(name):
        found = jax.jit(jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x), direction)))(x)
    want = (-np.sin(bend * (x.astype(np.float64) @ weight.T)) * (direction @ weight.T)) @ weight * float(bend) ** 2
    assert np.linalg.norm(found - want) <= SECOND * np.linalg.norm(want)


class TestForwardMode:
    @takers(*PLAIN)
    def test_goes_through_plain_kernels(self, name, case):
        x, kernel, _ = case.operands()
        dx, dkernel, _ = case.operands(seed=1)
        with matmul_override(name):
            y, dy = jax.jit(lambda p, t: jax.jvp(scaled_matmul, p, t))((x, kernel), (dx, dkernel))
        x, kernel, dx, dkernel = (array.astype(np.float64) for array in (x, kernel, dx, dkernel))
        both = np.concatenate([dx, x], axis=1), np.concatenate([kernel, dkernel], axis=1)
        assert y.dtype == dy.dtype == dtype(case.x)
        assert_product(dy, *both)

    @pytest.mark.parametrize("case", [Case(2, (41, 72)), QUANTISED[0]], ids=str)
    def test_does_not_go_through_narrow_ones(self, case):
        x, kernel, scale_inv = case.operands()
        with pytest.raises(TypeError, match=r"can't apply forward-mode .* to a custom_vjp function"):
            jax.jvp(lambda x: scaled_matmul(x, kernel, scale_inv, **case.settings), (x,), (x,))
