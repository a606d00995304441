"""The block-scaled matmul and its gradients in every mode, against products in float64."""

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import bits, dtype, largest, reference_dequantize, reference_quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from perparam import scaled_matmul
from perparam.policies import InvalidScale, PerparamError, UnsupportedCast
from perparam.policies.matmul.cpu import slab_height

pytestmark = pytest.mark.optimised

ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""The unit roundoff of each dtype of results: half the distance of 1 from its neighbour."""

ACTIVATIONS = tuple(ROUNDING)
FP8 = "float8_e4m3fn"
COMPUTES = (None, FP8, *ACTIVATIONS)

SLABS = (2 * slab_height(10**6, 72) + 88, 72)  # (out, in): two whole slabs and a part
RAGGED = (100, 50)  # a block that fits neither the slabs nor the shape


def summation(features: int) -> float:
    """The error bound of a sum of so many products in float32, relative to the sum of their magnitudes.

    Each product and each partial sum is rounded once, in whichever order; W8A8 also rounds both dequantised operands.
    """
    return (features + 2) * ROUNDING["float32"]


def rounded(x, name: str) -> np.ndarray:
    """x in that dtype, saturating, as float64."""
    limit = largest(dtype(name))
    return np.clip(np.asarray(x).astype(np.float64), -limit, limit).astype(dtype(name)).astype(np.float64)


def operands(x, kernel, scale_inv, block, compute):
    """What meets in the matmul of each mode, by the table "Compute" of the design, in float64."""
    x = np.asarray(x)
    weight = np.asarray(kernel)
    weight = (
        weight.astype(np.float32) if scale_inv is None else reference_dequantize(kernel, scale_inv, block, np.float32)
    )
    if compute == FP8:
        flat = x.reshape(-1, x.shape[-1])
        x = reference_dequantize(*reference_quantize(flat, FP8, (1, 128)), (1, 128)).reshape(x.shape)
        if scale_inv is None and dtype(kernel.dtype.name).itemsize > 1:
            weight = reference_dequantize(*reference_quantize(weight, FP8, block), block)
    elif compute is not None:
        x, weight = rounded(x, compute), rounded(weight, compute)
    elif scale_inv is None:
        weight = rounded(weight, x.dtype.name)
    return x.astype(np.float64), weight.astype(np.float64)


def assert_product(y, x, weight):
    """y is x @ weight.T, up to the order of summation and the rounding of the result."""
    want, magnitude = x @ weight.T, np.abs(x) @ np.abs(weight).T
    error = np.abs(np.asarray(y).astype(np.float64) - want)
    bound = summation(x.shape[-1]) * magnitude + ROUNDING[y.dtype.name] * np.abs(want)
    assert y.shape == want.shape
    assert (error <= bound * (1 + 2.0**-10)).all(), f"{(error / np.maximum(bound, 1e-300)).max()} times the bound"


# One program a mode, shape and block, rather than one an operation; TestVariants runs them one by one.
product = jax.jit(scaled_matmul, static_argnames=("block", "compute"))


def pair(shape=SLABS, narrow=FP8, block=RAGGED, scale_dtype="float32", seed=0):
    weight = np.random.default_rng(seed).normal(size=shape)
    return reference_quantize(weight, narrow, block, scale_dtype)


def inputs(*shape, of="float32", seed=1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype(of))


class TestProducts:
    @pytest.mark.parametrize("compute", COMPUTES)
    @pytest.mark.parametrize("activations", ACTIVATIONS)
    def test_a_narrow_kernel_in_every_mode(self, compute, activations):
        (kernel, scale_inv), x = pair(), inputs(2, 72, of=activations)
        y = product(x, kernel, scale_inv, block=RAGGED, compute=compute)
        assert y.dtype == dtype(activations)
        assert_product(y, *operands(x, kernel, scale_inv, RAGGED, compute))

    # Where both are cast to one dtype anyway, which they had before matters little.
    @pytest.mark.parametrize(
        ("compute", "activations", "wide"),
        [
            pytest.param(compute, *both, marks=pytest.mark.slow if cast and both[0] != both[1] else ())
            for compute, cast in [(each, each not in (None, FP8)) for each in COMPUTES]
            for both in [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")]
        ],
    )
    def test_a_plain_kernel_in_every_mode(self, compute, activations, wide):
        kernel, x = inputs(*SLABS, of=wide), inputs(2, 72, of=activations)
        y = product(x, kernel, block=RAGGED, compute=compute)
        assert y.dtype == dtype(activations)
        assert_product(y, *operands(x, kernel, None, RAGGED, compute))

    @pytest.mark.parametrize("narrow", ["int8", "float8_e5m2", "float8_e4m3fnuz"])
    @pytest.mark.parametrize("compute", [None, FP8, pytest.param("bfloat16", marks=pytest.mark.slow)])
    def test_every_narrow_kernel(self, narrow, compute):
        (kernel, scale_inv), x = pair(narrow=narrow), inputs(2, 72)
        y = product(x, kernel, scale_inv, block=RAGGED, compute=compute)
        assert_product(y, *operands(x, kernel, scale_inv, RAGGED, compute))

    @pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16"])
    def test_rounded_scales(self, scale_dtype):
        (kernel, scale_inv), x = pair(scale_dtype=scale_dtype), inputs(2, 72)
        y = product(x, kernel, scale_inv, block=RAGGED)
        assert_product(y, *operands(x, kernel, scale_inv, RAGGED, None))

    # Shapes and blocks are in `matmul/test_backends.py`; here they meet leading axes.
    @settings(max_examples=4)
    @given(
        shape=st.sampled_from([(3, 5), (37, 16), (300, 200)]),
        block=st.sampled_from([(1, 3), (128, 128)]),
        leading=st.sampled_from([(), (4,), (2, 3)]),
        seed=st.integers(0, 99),
    )
    def test_ragged_shapes_any_block_and_leading_axes(self, shape, block, leading, seed):
        (kernel, scale_inv), x = pair(shape, block=block, seed=seed), inputs(*leading, shape[1], seed=seed + 1)
        y = product(x, kernel, scale_inv, block=block)
        assert_product(y, *operands(x, kernel, scale_inv, block, None))

    @given(seed=st.integers(0, 99), compute=st.sampled_from([None, FP8, "bfloat16"]))
    def test_extreme_scales(self, seed, compute):
        (kernel, scale_inv), x = pair((20, 72), block=(8, 16), seed=seed), inputs(3, 72)
        scale_inv = (2.0 ** np.random.default_rng(seed).integers(-20, 21, scale_inv.shape)).astype(np.float32)
        y = product(x, kernel, scale_inv, block=(8, 16), compute=compute)
        assert_product(y, *operands(x, kernel, scale_inv, (8, 16), compute))

    @pytest.mark.parametrize("compute", COMPUTES)
    def test_zero_blocks_and_zero_rows_give_zeros(self, compute):
        weight = inputs(20, 72)
        weight[:8] = 0
        kernel, scale_inv = reference_quantize(weight, FP8, (8, 16))
        x = inputs(3, 72)
        x[1] = 0
        y = np.asarray(product(x, kernel, scale_inv, block=(8, 16), compute=compute))
        assert (y[1] == 0).all()
        assert (y[:, :8] == 0).all()
        assert (y[[0, 2], 8:] != 0).all()

    @pytest.mark.parametrize("compute", [None, FP8])
    def test_an_empty_batch_gives_an_empty_result(self, compute):
        kernel, scale_inv = pair((20, 72), block=(8, 16))
        assert product(inputs(0, 72), kernel, scale_inv, block=(8, 16), compute=compute).shape == (0, 20)

    def test_w8a8_activations_share_a_scale_per_row_and_128_columns(self):
        # Columns of small activations, which one scale a row would lose, meet large weights.
        sizes = np.repeat(np.float32([2.0**-10, 1.0, 2.0**10]), [128, 128, 44])
        kernel, scale_inv = reference_quantize(inputs(20, 300) / sizes, FP8, (128, 128))
        x = inputs(2, 3, 300, seed=2) * sizes
        y = product(x, kernel, scale_inv, compute=FP8)
        assert_product(y, *operands(x, kernel, scale_inv, (128, 128), FP8))

    def test_the_default_block_is_that_of_the_checkpoints(self):
        kernel, scale_inv = pair((130, 140), block=(128, 128))
        x = inputs(2, 140)
        assert_product(product(x, kernel, scale_inv), *operands(x, kernel, scale_inv, (128, 128), None))

    @pytest.mark.parametrize("compute", [None, FP8, "bfloat16"])
    @pytest.mark.parametrize("wide", [FP8, "float32"])
    def test_no_scale_is_the_identity(self, compute, wide):
        kernel, x = inputs(20, 72, of=wide), inputs(2, 72)
        ones = np.ones((3, 5), np.float32)
        without = product(x, kernel, None, block=(8, 16), compute="float32" if wide == "float32" else compute)
        scaled = product(x, kernel, ones, block=(8, 16), compute="float32" if wide == "float32" else compute)
        chex.assert_trees_all_equal(without, scaled)

    def test_doubled_scales_double_the_result(self):
        (kernel, scale_inv), x = pair(), inputs(2, 72)
        once, twice = (product(x, kernel, scale_inv * n, block=RAGGED) for n in np.float32([1, 2]))
        chex.assert_trees_all_equal(once * 2.0, twice)


class TestVariants(chex.TestCase):
    # With jit is what TestProducts and TestGradients have.
    @chex.variants(without_jit=True)
    def test_every_mode(self):
        (kernel, scale_inv), x = pair(), inputs(2, 72)
        for compute in (None, FP8, "bfloat16"):
            y = self.variant(lambda *a, c=compute: scaled_matmul(*a, block=RAGGED, compute=c))(x, kernel, scale_inv)
            assert_product(y, *operands(x, kernel, scale_inv, RAGGED, compute))

    @chex.variants(without_jit=True)
    def test_the_gradient(self):
        (kernel, scale_inv), x, weights = pair(), inputs(3, 72), inputs(3, SLABS[0], seed=2)
        loss = lambda x: jnp.vdot(scaled_matmul(x, kernel, scale_inv, block=RAGGED), weights)  # noqa: E731
        gradient = self.variant(jax.grad(loss))(x)
        assert_product(gradient, weights.astype(np.float64), operands(x, kernel, scale_inv, RAGGED, None)[1].T)


# The quick run has `matmul/test_batching.py`, whose kernels are smaller than a slab.
@pytest.mark.slow
@pytest.mark.parametrize("compute", [None, FP8])
def test_vmap_over_rows_and_over_kernels(compute):
    kernels, scales = zip(*(pair(seed=seed) for seed in range(2)), strict=True)
    x = inputs(2, 3, 72)
    run = lambda *a: scaled_matmul(*a, block=RAGGED, compute=compute)  # noqa: E731
    experts = jax.jit(jax.vmap(run))(x, np.stack(kernels), np.stack(scales))
    rows = jax.jit(jax.vmap(run, in_axes=(0, None, None)))(x, kernels[0], scales[0])
    for i in range(2):
        assert_product(experts[i], *operands(x[i], kernels[i], scales[i], RAGGED, compute))
        assert_product(rows[i], *operands(x[i], kernels[0], scales[0], RAGGED, compute))


def pull_back(y_gradient, run, *primals):
    """The gradients of `primals`, in one program."""

    @jax.jit
    def gradients(y_gradient, *primals):
        y, back = jax.vjp(run, *primals)
        return back(y_gradient.astype(y.dtype))

    return gradients(y_gradient, *primals)


class TestGradients:
    @pytest.mark.parametrize("compute", [FP8, *(pytest.param(c, marks=pytest.mark.slow) for c in COMPUTES if c != FP8)])
    def test_of_x_is_the_transposed_product(self, compute):
        (kernel, scale_inv), x, dy = pair(), inputs(2, 3, 72), inputs(2, 3, SLABS[0], seed=2)
        (dx,) = pull_back(dy, lambda x: scaled_matmul(x, kernel, scale_inv, block=RAGGED, compute=compute), x)
        _, weight = operands(x, kernel, scale_inv, RAGGED, compute)
        assert dx.dtype == np.float32
        # A gradient that flows through a cast of x to 16 bits is rounded there.
        assert_product(dx if compute in (None, FP8, "float32") else dx.astype(compute), dy.astype(np.float64), weight.T)

    @pytest.mark.parametrize("activations", ["bfloat16", "float16"])
    def test_of_x_has_the_dtype_of_x(self, activations):
        (kernel, scale_inv), x = pair(), inputs(2, 72, of=activations)
        dy = inputs(2, SLABS[0], seed=2, of=activations)
        (dx,) = pull_back(dy, lambda x: scaled_matmul(x, kernel, scale_inv, block=RAGGED), x)
        assert dx.dtype == dtype(activations)
        assert_product(dx, dy.astype(np.float64), operands(x, kernel, scale_inv, RAGGED, None)[1].T)

    @pytest.mark.parametrize(
        "compute", [c if c in (FP8, "bfloat16") else pytest.param(c, marks=pytest.mark.slow) for c in COMPUTES]
    )
    def test_of_a_plain_kernel_and_its_x(self, compute):
        kernel, x, dy = inputs(*SLABS), inputs(6, 72), inputs(6, SLABS[0], seed=2)
        dx, dkernel = pull_back(dy, lambda x, k: scaled_matmul(x, k, block=RAGGED, compute=compute), x, kernel)
        # In the W8A8 mode the rounding of both operands is passed straight through.
        x64, weight = operands(x, kernel, None, RAGGED, compute)
        through = compute if compute in ("bfloat16", "float16") else "float32"
        assert dx.dtype == dkernel.dtype == np.float32
        assert_product(dx.astype(through), dy.astype(np.float64), weight.T)
        assert_product(dkernel.astype(through), dy.T.astype(np.float64), x64.T)

    def test_the_scales_of_activations_have_no_gradient_of_their_own(self):
        x, kernel = np.array([[1.0, 0.3]], np.float32), np.array([[1.0, 10.0]], np.float32)
        (dx,) = pull_back(np.ones((1, 1)), lambda x: scaled_matmul(x, kernel, block=(1, 1), compute=FP8), x)
        assert dx.tolist() == [[1.0, 10.0]]

    @pytest.mark.slow
    def test_under_vmap_over_kernels(self):
        kernels, scales = (np.stack(half) for half in zip(*(pair(seed=seed) for seed in range(2)), strict=True))
        x, dy = inputs(2, 3, 72), inputs(2, 3, SLABS[0], seed=2)
        run = jax.vmap(lambda x, k, s: scaled_matmul(x, k, s, block=RAGGED))
        (dx,) = pull_back(dy, lambda x: run(x, kernels, scales), x)
        for i in range(2):
            weight = operands(x[i], kernels[i], scales[i], RAGGED, None)[1]
            assert_product(dx[i], dy[i].astype(np.float64), weight.T)


class TestMemory:
    """Kernels are widened at the use; narrow ones a slab at a time, so that no float array of their shape exists."""

    shape = (16 * slab_height(10**6, 64), 64)

    def compiled(self, run, *arguments):
        return jax.jit(run).lower(*arguments).compile()

    def holds_no_wide_kernel(self, compiled):
        rows, columns = self.shape
        text = compiled.as_text()
        shapes = (f"[{rows},{columns}]", f"[{columns},{rows}]")
        return not any(wide + shape in text for wide in ("f32", "bf16", "f16") for shape in shapes)

    @pytest.mark.skipif(jax.default_backend() != "cpu", reason="slabs are how CPUs are kept from widening everything")
    @pytest.mark.parametrize("compute", [None, FP8, "bfloat16"])
    def test_of_the_product_and_of_its_gradient(self, compute):
        kernel, scale_inv = jnp.zeros(self.shape, FP8), jnp.ones((self.shape[0] // 128, 1))
        run = lambda x, k, s: scaled_matmul(x, k, s, compute=compute)  # noqa: E731
        assert self.holds_no_wide_kernel(self.compiled(run, inputs(1, 64), kernel, scale_inv))
        gradient = jax.grad(lambda *a: run(*a).sum())
        assert self.holds_no_wide_kernel(self.compiled(gradient, inputs(1, 64), kernel, scale_inv))

    @pytest.mark.skipif(jax.default_backend() != "cpu", reason="slabs are how CPUs are kept from widening everything")
    def test_within_a_loop(self):
        kernel, scale_inv = jnp.zeros(self.shape, FP8), jnp.ones((self.shape[0] // 128, 1))

        def decode(x, kernel, scale_inv):
            step = lambda _, x: scaled_matmul(x, kernel, scale_inv)[:, : x.shape[1]]  # noqa: E731
            return jax.lax.fori_loop(0, 10, step, x)

        compiled = self.compiled(decode, inputs(1, 64), kernel, scale_inv)
        assert self.holds_no_wide_kernel(compiled)
        slab = slab_height(*self.shape) * self.shape[1] * 4
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * slab  # a wide copy alone takes sixteen

    def test_a_plain_kernel_is_not_cast_once_and_carried_through_a_loop(self):
        def decode(x, kernel):
            return jax.lax.fori_loop(0, 10, lambda _, x: scaled_matmul(x, kernel, compute="f32")[:, : x.shape[1]], x)

        text = self.compiled(decode, inputs(1, 64), jnp.zeros(self.shape, jnp.bfloat16)).as_text()
        loops = [line for line in text.splitlines() if " while(" in line]
        assert loops
        assert not any(f"f32[{self.shape[0]},{self.shape[1]}]" in line for line in loops)


@pytest.mark.parametrize("narrow", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_float32_result_is_unrounded_and_has_a_gradient_in_the_dtype_of_x(narrow):
    x, kernel, scale_inv = inputs(3, 24).astype(ml_dtypes.bfloat16), inputs(6, 24), None
    if narrow:
        kernel, scale_inv = reference_quantize(kernel, FP8, (4, 8))

    def product(x, result):
        return scaled_matmul(x, kernel, scale_inv, block=(4, 8), result=result)

    wide = product(x, "f32")
    assert wide.dtype == np.float32
    assert_product(wide, *operands(x, kernel, scale_inv, (4, 8), None))
    assert bits(wide.astype(x.dtype)) == bits(product(x, None))
    gradients = jax.jit(lambda x: [jax.grad(lambda x, r=r: product(x, r).sum())(x) for r in ("f32", None)])(x)
    assert bits(gradients[0]) == bits(gradients[1])


class TestErrors:
    x, kernel, scale_inv = inputs(2, 9), np.ones((5, 9), ml_dtypes.float8_e4m3fn), np.ones((2, 3), np.float32)

    def test_a_grid_that_does_not_fit(self):
        with pytest.raises(
            InvalidScale,
            match=r"shape \(2, 3\) do not fit a kernel of shape \(5, 9\) in blocks of \(128, 128\), expected \(1, 1\)",
        ):
            scaled_matmul(self.x, self.kernel, self.scale_inv)

    @pytest.mark.parametrize("shape", [(2, 8), (9, 2), ()])
    def test_shapes_that_do_not_meet(self, shape):
        with pytest.raises(
            UnsupportedCast, match=r"a kernel of shape \(5, 9\) do not match: expected \(..., in\) and \(out, in\)"
        ):
            scaled_matmul(np.ones(shape, np.float32), self.kernel, self.scale_inv, block=(4, 4))

    def test_a_kernel_with_more_axes(self):
        with pytest.raises(UnsupportedCast, match=r"expected \(..., in\) and \(out, in\)"):
            scaled_matmul(self.x, np.ones((3, 5, 9), np.float32))

    @pytest.mark.parametrize("found", ["int32", FP8, "int8"])
    def test_activations_are_wide_floats(self, found):
        with pytest.raises(UnsupportedCast, match=f"activations are f32, bf16 or f16, found {found}. Cast x first"):
            scaled_matmul(self.x.astype(dtype(found)), self.kernel, self.scale_inv, block=(4, 4))

    @pytest.mark.parametrize("found", ["int32", "int8", "bool"])
    def test_an_integer_kernel_without_scales(self, found):
        with pytest.raises(UnsupportedCast, match=f"a kernel is a float, or int8 with scales, found {found}"):
            scaled_matmul(self.x, self.kernel.astype(np.float32).astype(found))

    def test_integers_wider_than_int8_have_no_scales(self):
        with pytest.raises(UnsupportedCast, match="a kernel is a float, or int8 with scales, found int32"):
            scaled_matmul(self.x, np.ones((5, 9), np.int32), self.scale_inv, block=(4, 4))

    @pytest.mark.parametrize("result", ["f8_e4m3fn", "int32"])
    def test_a_result_dtype_that_is_no_wide_float(self, result):
        with pytest.raises(UnsupportedCast, match="result: expected f32, bf16 or f16, found"):
            scaled_matmul(self.x, self.kernel, self.scale_inv, block=(4, 4), result=result)

    @pytest.mark.parametrize("compute", ["int8", "int32", "f64"])
    def test_a_compute_dtype_nobody_computes_in(self, compute):
        with pytest.raises(
            PerparamError, match=r"compute is None, f32, bf16, f16 or a float8 type|needs jax_enable_x64"
        ):
            scaled_matmul(self.x, self.kernel, self.scale_inv, block=(4, 4), compute=compute)
