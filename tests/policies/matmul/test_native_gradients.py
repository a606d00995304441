"""Gradients of x by the native library: gradient @ weight, with the kernel read along its other side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bits, dtype
from matmuls import FP8, Case
from native_matmuls import ACTIVATIONS, Factors, assert_within, drawn, factors, required

import perparam
from perparam.policies.matmul import matmul_override, scaled_matmul, scaled_matmuls

pytestmark = required

slow = pytest.mark.slow


def product(case: Case, *pair):
    return lambda x: scaled_matmul(x, *pair, **case.settings)


def gradient_of(case: Case) -> np.ndarray:
    shape = case.rows, case.shape[0]
    return np.random.default_rng(3).normal(size=shape).astype(dtype(case.x))


def pulled_back(run, x, gradient) -> np.ndarray:
    """The gradient of x."""
    with matmul_override("native"):
        return np.asarray(jax.jit(lambda x, gradient: jax.vjp(run, x)[1](gradient)[0])(x, gradient))


def expected(case: Case, gradient, *operands) -> Factors:
    """What a gradient multiplies: the weight of the product, exact or as rounded, the other way round."""
    forward = factors(case, *operands)
    wide = gradient.astype(np.float64)
    return Factors(wide, np.ones(wide.shape), forward.weight.T, forward.scales.T)


def check(case: Case) -> None:
    x, *pair = drawn(case)
    gradient = gradient_of(case)
    found = pulled_back(product(case, *pair), x, gradient)
    assert found.dtype == dtype(case.x)
    assert_within(found, expected(case, gradient, x, *pair))


@pytest.mark.parametrize(
    ("x", "kernel", "compute"),
    [
        ("bfloat16", FP8, None),
        ("float32", FP8, None),
        pytest.param("float16", FP8, None, marks=slow),
        ("bfloat16", FP8, FP8),
        *(pytest.param("bfloat16", FP8, compute, marks=slow) for compute in ACTIVATIONS),
        *(pytest.param("float32", FP8, compute, marks=slow) for compute in (FP8, "bfloat16")),
        *(pytest.param("bfloat16", kernel, None, marks=slow) for kernel in ("int8", "float8_e5m2", "float8_e4m3fnuz")),
        pytest.param("float32", "float32", FP8, marks=slow),
    ],
)
def test_every_dtype_and_mode(x, kernel, compute):
    check(Case(3, (70, 150), x, kernel, (100, 50), compute))


@pytest.mark.parametrize(
    "block",
    [(64, 64), *(pytest.param(block, marks=slow) for block in [(1, 32), (1, 3), (7, 1), (3, 150), (70, 200)])],
    ids=str,
)
def test_every_block(block):
    check(Case(13, (70, 200), block=block))


@pytest.mark.parametrize(
    ("rows", "shape"),
    [
        *[(1, (1, 1)), (1, (63, 33)), (530, (70, 33))],
        *(pytest.param(*one, marks=slow) for one in [(1, (65, 31)), (4, (64, 32)), (12, (2200, 33)), (13, (130, 70))]),
    ],
    ids=str,
)
def test_every_edge_of_panels_runs_and_tasks(rows, shape):
    check(Case(rows, shape))


@pytest.mark.parametrize(("rows", "shape"), [(0, (5, 9)), pytest.param(3, (0, 9), marks=slow), (3, (5, 0))], ids=str)
def test_of_nothing_it_is_zeros(rows, shape):
    case = Case(rows, shape, block=(4, 4))
    x, *pair = case.operands()
    found = pulled_back(product(case, *pair), x, gradient_of(case))
    assert found.shape == x.shape
    assert (found == 0).all()


def test_a_row_alone_has_the_bits_that_it_has_in_a_batch():
    case = Case(40, (70, 150))
    x, *pair = drawn(case)
    gradient = gradient_of(case)
    whole = pulled_back(product(case, *pair), x, gradient)
    for rows in (slice(0, 1), slice(39, 40), slice(10, 22), slice(0, 13)):
        assert bits(pulled_back(product(case, *pair), x[rows], gradient[rows])) == bits(whole[rows])


class TestPrograms:
    case = Case(6, (70, 150))

    @pytest.fixture
    def operands(self):
        return tuple(map(jnp.asarray, (*drawn(self.case), gradient_of(self.case))))

    @pytest.fixture
    def want(self, operands):
        x, *pair, gradient = operands
        return bits(pulled_back(product(self.case, *pair), x, gradient))

    def test_checkpoint(self, operands, want):
        x, *pair, gradient = operands
        assert bits(pulled_back(jax.checkpoint(product(self.case, *pair)), x, gradient)) == want

    def test_vmap(self, operands, want):
        x, *pair, gradient = operands
        assert bits(pulled_back(jax.vmap(product(self.case, *pair)), x, gradient)) == want

    @slow
    def test_vmap_over_kernels(self, operands, want):
        x, *pair, gradient = operands
        two = [jnp.stack([array, array]) for array in pair]
        with matmul_override("native"):
            found = jax.vmap(lambda *pair: jax.vjp(product(self.case, *pair), x)[1](gradient)[0])(*two)
        assert [bits(found[0]), bits(found[1])] == [want, want]

    @slow
    @pytest.mark.parametrize("compute", [None, FP8, "bfloat16"])
    def test_second_derivatives(self, compute):
        case = Case(3, (40, 70), x="float32", compute=compute)
        x, *pair = drawn(case)
        first = jax.grad(lambda x: jnp.sum(jnp.sin(product(case, *pair)(x))))
        found = []
        for name in ("native", "oracle"):
            with matmul_override(name):
                found.append(jax.jit(jax.grad(lambda x: jnp.sum(first(x) ** 2)))(x))
        # Three products of at most 70 numbers, each off by (70 + 6) * 2**-24 of its magnitude.
        assert np.abs(found[0] - found[1]).max() <= 1e-4 * np.abs(found[1]).max()

    def test_scan(self, operands, want):
        x, *pair, gradient = operands
        one = product(self.case, *pair)
        run = lambda x: jax.lax.scan(lambda none, row: (none, one(row)), 0, x)[1]  # noqa: E731
        assert bits(pulled_back(run, x, gradient)) == want

    @slow
    def test_scan_over_layers_with_remat(self):
        case = Case(3, (70, 70), x="float32")
        x, kernel, scale_inv = drawn(case)
        layers = [jnp.stack([array] * 4) for array in (kernel, scale_inv)]

        def loss(x):
            layer = jax.checkpoint(lambda x, layer: (jnp.tanh(scaled_matmul(x, *layer)), None))
            return jnp.sum(jax.lax.scan(layer, x, layers)[0])

        found = []
        for name in ("native", "oracle"):
            with matmul_override(name):
                found.append(np.asarray(jax.jit(jax.grad(loss))(x)))
        # Four products of 70 numbers forward and four backward, each off by at most (70 + 6) * 2**-24 of its magnitude.
        assert np.abs(found[0] - found[1]).max() <= 1e-4 * np.abs(found[1]).max()

    @slow
    def test_several_kernels(self, operands):
        x, kernel, scale_inv, gradient = operands

        def run(x):
            return sum(scaled_matmuls(x, [(kernel, scale_inv)] * 2, **self.case.settings))

        found = pulled_back(run, x, gradient)
        want = expected(self.case, np.asarray(gradient), *map(np.asarray, (x, kernel, scale_inv)))
        twice = Factors(want.x, want.x_scales, want.weight, 2 * want.scales)
        assert_within(found, twice)

    def test_an_override_is_followed_backward_too(self, operands):
        x, *pair, gradient = operands
        texts = {}
        for name in ("native", "slabs"):
            with matmul_override(name):
                run = jax.jit(lambda x, gradient: jax.vjp(product(self.case, *pair), x)[1](gradient)[0])
                texts[name] = run.lower(x, gradient).as_text()
        assert ["perparam_matmul" in text for text in texts.values()] == [True, False]


def test_a_frozen_kernel_in_training_is_read_as_stored():
    """As LoRA does: a narrow kernel beside trainable ones."""
    kernel = perparam.quantize(np.random.default_rng(0).normal(size=(70, 150)).astype(np.float32), "f8_e4m3fn")
    x = np.random.default_rng(1).normal(size=(6, 150)).astype(np.float32)
    down, up = jnp.full((4, 150), 0.1), jnp.full((70, 4), 0.1)

    def loss(adapter, x):
        down, up = adapter
        return jnp.sum((scaled_matmul(x, kernel) + x @ down.T @ up.T) ** 2)

    found = []
    for name in ("native", "oracle"):
        with matmul_override(name):
            found.append(jax.jit(jax.grad(loss))((down, up), x))
    for one, other in zip(*found, strict=True):
        assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()
