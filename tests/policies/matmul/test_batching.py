"""vmap: a batch of x becomes rows of one product, a batch of kernels a loop; and gradients through both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matmuls import FP8, Case, exact, relative_error

from perparam.policies.matmul import matmul_override, scaled_matmul, scaled_matmuls

SAME_SUMS = 1e-6
"""Rows of a larger product are the same sums of 72 float32 products, perhaps in another order: 5e-7 rms."""

CASE = Case(3, (40, 72), x="float32", block=(16, 24))
MODES = pytest.mark.parametrize("compute", [None, FP8])


def multiply(compute):
    return functools.partial(scaled_matmul, block=CASE.sides, compute=compute)


def batch(*leading: int) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(*leading, *CASE.operands()[0].shape)).astype(np.float32)


def several(count: int):
    """`(kernels, scales)`, stacked."""
    _, kernels, scales = zip(*(CASE.operands(seed) for seed in range(count)), strict=True)
    return np.stack(kernels), np.stack(scales)


def products_in(run, *arguments) -> int:
    """Products that a CPU's program has of the oracle's, which is a single dot each."""
    with matmul_override("oracle"):
        return jax.jit(run).lower(*arguments).as_text().count("stablehlo.dot_general")


class TestRows:
    @MODES
    def test_a_batch_is_a_loop_over_it(self, compute):
        x, (_, *pair) = batch(4), CASE.operands()
        found = jax.vmap(multiply(compute), (0, None, None))(x, *pair)
        want = np.stack([multiply(compute)(one, *pair) for one in x])
        assert found.shape == want.shape
        assert relative_error(found, want) <= SAME_SUMS

    @MODES
    def test_so_is_a_batch_of_batches(self, compute):
        x, (_, *pair) = batch(2, 4), CASE.operands()
        run = functools.partial(multiply(compute), kernel=pair[0], scale_inv=pair[1])
        found = jax.vmap(jax.vmap(run))(x)
        want = np.stack([[run(one) for one in some] for some in x])
        assert relative_error(found, want) <= SAME_SUMS

    @MODES
    def test_and_is_one_product(self, compute):
        _, *pair = CASE.operands()
        run = lambda x: multiply(compute)(x, *pair)  # noqa: E731
        assert products_in(run, batch(4)) == 1
        assert products_in(jax.vmap(jax.vmap(run)), batch(2, 4)) == 1

    def test_along_another_axis(self):
        x, (_, *pair) = batch(4), CASE.operands()
        found = jax.vmap(multiply(None), (1, None, None), 1)(np.swapaxes(x, 0, 1), *pair)
        assert relative_error(np.swapaxes(found, 0, 1), multiply(None)(x, *pair)) <= SAME_SUMS

    def test_of_a_vector_each(self):
        x, (_, *pair) = batch(), CASE.operands()
        assert relative_error(jax.vmap(lambda x: multiply(None)(x, *pair))(x), multiply(None)(x, *pair)) <= SAME_SUMS

    def test_of_none(self):
        _, *pair = CASE.operands()
        assert jax.vmap(lambda x: multiply(None)(x, *pair))(batch(0)).shape == (0, 3, 40)

    def test_with_several_kernels(self):
        x, (kernels, scales) = batch(4), several(2)
        pairs = [(kernels[0], scales[0]), (kernels[1][:32], scales[1][:2])]
        found = jax.vmap(lambda x: scaled_matmuls(x, pairs, block=CASE.sides))(x)
        for y, pair in zip(found, pairs, strict=True):
            assert relative_error(y, multiply(None)(x, *pair)) <= SAME_SUMS


class TestKernels:
    @pytest.mark.parametrize("over_x", [None, 0])
    @MODES
    def test_a_batch_of_kernels_is_a_loop_over_them(self, compute, over_x):
        kernels, scales = several(2)
        x = batch() if over_x is None else batch(2)
        found = jax.vmap(multiply(compute), (over_x, 0, 0))(x, kernels, scales)
        for i, y in enumerate(found):
            want = multiply(compute)(x if over_x is None else x[i], kernels[i], scales[i])
            assert relative_error(y, want) <= SAME_SUMS

    @pytest.mark.parametrize("axes", [(None, 0, None), (None, None, 0), (0, None, 0)])
    def test_kernels_or_scales_alone(self, axes):
        kernels, scales = several(2)
        arrays = [
            stack if axis == 0 else stack[0] for stack, axis in zip((batch(2), kernels, scales), axes, strict=True)
        ]
        found = jax.vmap(multiply(None), axes)(*arrays)
        for i, y in enumerate(found):
            one = [array[i] if axis == 0 else array for array, axis in zip(arrays, axes, strict=True)]
            assert relative_error(y, exact(*one, CASE.sides)) <= SAME_SUMS

    def test_a_batch_of_plain_kernels(self):
        kernels = np.random.default_rng(6).normal(size=(2, 40, 72)).astype(np.float32)
        found = jax.vmap(scaled_matmul, (None, 0))(batch(), kernels)
        for kernel, y in zip(kernels, found, strict=True):
            assert relative_error(y, exact(batch(), kernel, None, (1, 1))) <= SAME_SUMS


class TestGradients:
    @staticmethod
    def loss(compute):
        return lambda x, *pair: jnp.sum(jnp.sin(multiply(compute)(x, *pair)))

    @pytest.mark.parametrize(("compute", "jit"), [(None, lambda run: run), (None, jax.jit), (FP8, jax.jit)])
    def test_for_each_example(self, compute, jit):
        x, (_, *pair) = batch(4), CASE.operands()
        found = jit(jax.vmap(jax.grad(self.loss(compute)), (0, None, None)))(x, *pair)
        want = jax.jit(jax.grad(self.loss(compute)))(x, *pair)  # examples share nothing
        assert relative_error(found, want) <= 4 * SAME_SUMS

    @MODES
    def test_of_a_batch(self, compute):
        x, (_, *pair) = batch(4), CASE.operands()
        total = lambda x: jax.vmap(self.loss(compute), (0, None, None))(x, *pair).sum()  # noqa: E731
        found = jax.jit(jax.grad(total))(x)
        assert relative_error(found, jax.jit(jax.grad(self.loss(compute)))(x, *pair)) <= 4 * SAME_SUMS

    @MODES
    def test_of_plain_kernels_for_each_example(self, compute):
        x, kernel = batch(2), np.random.default_rng(6).normal(size=(40, 72)).astype(np.float32)
        of_kernel = jax.grad(lambda kernel, x: self.loss(compute)(x, kernel))
        found = jax.jit(jax.vmap(of_kernel, (None, 0)))(kernel, x)
        for i in range(2):
            assert relative_error(found[i], jax.jit(of_kernel)(kernel, x[i])) <= 4 * SAME_SUMS
