"""The native products, element by element: every dtype, mode, block and shape within the bound of rounding errors."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import bits, dtype, largest
from hypothesis import given, settings
from hypothesis import strategies as st
from matmuls import FP8, Case
from native_matmuls import (
    ACTIVATIONS,
    NARROW,
    assert_within,
    drawn,
    factors,
    multiply,
    of_arrays,
    required,
    saturated,
)

import perparam
from perparam.policies.matmul import matmul_override, quantize_rows, scaled_matmul, scaled_matmuls

pytestmark = required


def quick(names, first):
    """The names as parameters, those after the first few in the slow run alone: each is a program to compile."""
    return [pytest.param(one, id=str(one), marks=[pytest.mark.slow] * (i >= first)) for i, one in enumerate(names)]


MODES = [
    *(pytest.param("float8_e4m3fn", compute, id=f"e4m3 in {compute}") for compute in (None, FP8, *ACTIVATIONS)),
    *(pytest.param(kernel, None, id=kernel) for kernel in (*NARROW[1:], *ACTIVATIONS)),
    *(
        pytest.param(kernel, compute, id=f"{kernel} in {compute}", marks=pytest.mark.slow)
        for kernel, compute in [
            *(("int8", FP8), ("float8_e5m2", "float8_e5m2"), ("bfloat16", FP8)),
            *(("float32", "bfloat16"), ("float32", "float16"), ("float16", "bfloat16")),
        ]
    ),
]

BLOCKS = [(128, 128), (64, 64), (1, 32), (100, 50), (1, 3), (7, 1), (1, 150), (70, 200), (128, 1)]
"""Blocks that fit the panels and runs of the library, and such as cut them at each row and column."""


def check(case: Case, seed: int = 0) -> None:
    operands = drawn(case, seed)
    y = multiply(case, *operands)
    assert y.dtype == dtype(case.x)
    assert_within(y, factors(case, *operands))


class TestProducts:
    @pytest.mark.parametrize("x", quick(ACTIVATIONS, 1))
    @pytest.mark.parametrize(("kernel", "compute"), MODES)
    def test_every_dtype_and_mode(self, x, kernel, compute):
        check(Case(3, (70, 150), x, kernel, (100, 50), compute))

    @pytest.mark.parametrize("block", BLOCKS, ids=str)
    @pytest.mark.parametrize("compute", quick([None, FP8], 1))
    def test_every_block(self, block, compute):
        check(Case(5, (70, 200), block=block, compute=compute))

    @pytest.mark.parametrize("x", quick(["bfloat16", "float32"], 1))
    @pytest.mark.parametrize(
        ("rows", "shape"),
        [
            *((1, shape) for shape in [(1, 1), (1, 64), (33, 1), (31, 63), (32, 64), (33, 65), (64, 130)]),
            *((rows, (40, 70)) for rows in (4, 13)),
            *(pytest.param(rows, (40, 70), marks=pytest.mark.slow) for rows in (5, 12, 24, 29)),
            pytest.param(2, (5, 2200), marks=pytest.mark.slow),
            (20, (33, 2200)),  # more columns than are packed at once
            (530, (33, 70)),  # more rows than a task has
        ],
        ids=str,
    )
    def test_every_edge_of_panels_runs_and_tasks(self, rows, shape, x):
        check(Case(rows, shape, x=x))

    @pytest.mark.parametrize(("rows", "shape"), [(0, (5, 9)), (3, (0, 9)), (3, (5, 0)), (0, (0, 0))], ids=str)
    @pytest.mark.parametrize("mode", quick([(FP8, None), (FP8, FP8), ("bfloat16", None), (FP8, "float16")], 1))
    def test_nothing_is_zeros(self, rows, shape, mode):
        kernel, compute = mode
        case = Case(rows, shape, kernel=kernel, block=(4, 4), compute=compute)
        y = multiply(case, *case.operands())
        assert y.shape == (rows, shape[0])
        assert (y == 0).all()

    @settings(max_examples=25)
    @given(
        rows=st.integers(1, 30),
        shape=st.tuples(st.integers(1, 80), st.integers(1, 140)),
        x=st.sampled_from(ACTIVATIONS),
        mode=st.sampled_from([mode.values for mode in MODES]),
        block=st.tuples(st.integers(1, 90), st.integers(1, 150)),
        seed=st.integers(0, 99),
    )
    @pytest.mark.slow
    def test_any_shape_block_and_dtype(self, rows, shape, x, mode, block, seed):
        kernel, compute = mode
        check(Case(rows, shape, x, kernel, block, compute), seed)

    @pytest.mark.parametrize("x", quick(ACTIVATIONS, 1))
    @pytest.mark.parametrize("compute", quick([None, "mxfp8", FP8, "bfloat16"], 1))
    def test_mxfp8(self, x, compute):
        random = np.random.default_rng(0)
        kernel = perparam.quantize(random.normal(size=(40, 100)).astype(np.float32), "mxfp8")
        rows = random.normal(size=(5, 100)).astype(dtype(x))
        with matmul_override("native"):
            y = np.asarray(scaled_matmul(rows, kernel, compute=compute))
        if compute == "bfloat16":  # powers of two: the weight is exact in bfloat16
            rows = rows.astype(dtype("bfloat16"))
        elif compute is not None:
            rows = quantize_rows(rows, kernel.format.of_rows(dtype(FP8)))
        assert_within(y, of_arrays(rows, kernel))

    @pytest.mark.parametrize("block", quick([(1, -1), (-1, -1), (-1, 32)], 1))
    def test_blocks_of_a_whole_axis(self, block):
        weight = np.random.default_rng(0).normal(size=(40, 100)).astype(np.float32)
        kernel = perparam.quantize(weight, {"dtype": "f8_e4m3fn", "block": list(block)})
        x = np.random.default_rng(1).normal(size=(5, 100)).astype(ml_dtypes.bfloat16)
        with matmul_override("native"):
            y = np.asarray(scaled_matmul(x, kernel))
        assert_within(y, of_arrays(x, kernel))

    @pytest.mark.parametrize("scale", quick(["bfloat16", "float16"], 1))
    def test_scales_of_16_bits(self, scale):
        case = Case(3, (40, 70), block=(32, 32))
        x, kernel, scale_inv = case.operands()
        scale_inv = scale_inv.astype(dtype(scale))
        assert_within(multiply(case, x, kernel, scale_inv), factors(case, x, kernel, scale_inv.astype(np.float32)))

    def test_a_float32_result_is_not_rounded(self):
        case = Case(3, (40, 70))
        operands = drawn(case)
        with matmul_override("native"):
            y = np.asarray(scaled_matmul(*operands, result="f32", **case.settings))
        assert_within(y, factors(case, *operands))
        assert (y.astype(ml_dtypes.bfloat16) == multiply(case, *operands)).all()


class TestSeveral:
    """One x with several kernels, in one call of the library if their formats are equal."""

    @pytest.mark.parametrize("rows", quick([1, 20], 1))
    def test_each_has_the_bits_that_it_has_alone(self, rows):
        cases = [Case(rows, (out, 150), block=(50, 64)) for out in (70, 1, 128, 33)]
        pairs = [drawn(case, seed)[1:] for seed, case in enumerate(cases)]
        x = cases[0].operands()[0]
        with matmul_override("native"):
            together = scaled_matmuls(x, pairs, block=(50, 64))
        for case, pair, y in zip(cases, pairs, together, strict=True):
            assert bits(y) == bits(multiply(case, x, *pair))

    @pytest.mark.slow
    def test_of_other_formats_too(self):
        cases = [
            Case(5, (40, 70), kernel=kernel) for kernel in (FP8, "int8", "bfloat16", "float32", "float8_e5m2", FP8)
        ]
        pairs = [drawn(case)[1:] for case in cases]
        x = cases[0].operands()[0]
        with matmul_override("native"):
            together = scaled_matmuls(x, pairs)
        for case, pair, y in zip(cases, pairs, together, strict=True):
            assert bits(y) == bits(multiply(case, x, *pair))


def identity(size: int, of: str) -> np.ndarray:
    return np.eye(size, dtype=np.float32).astype(dtype(of))


class TestValues:
    """x is the identity: results are single weights, without any rounding of sums."""

    @pytest.mark.parametrize("rows", quick([1, 64], 1))
    @pytest.mark.parametrize("x", quick(ACTIVATIONS, 1))
    @pytest.mark.parametrize("kernel", NARROW)
    def test_every_code_is_decoded_exactly(self, kernel, x, rows):
        # Code k is in row k of one column, so that it meets no other; it is in every lane of a panel once.
        codes = np.zeros((256, 64), np.uint8)
        codes[np.arange(256), np.arange(256) % 64] = np.arange(256)
        values = codes.view(dtype(kernel))
        case = Case(rows, values.shape, x, kernel, None)
        eye = identity(64, x) if rows == 64 else np.ones((1, 64), dtype(x))
        found = multiply(case, eye, values, np.ones((1, 1), np.float32)).astype(np.float32)
        found = found[np.arange(256) % 64 % rows, np.arange(256)]
        with np.errstate(invalid="ignore"):
            expected = np.arange(256, dtype=np.uint8).view(dtype(kernel)).astype(dtype(x)).astype(np.float32)
        np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize("compute", ACTIVATIONS)
    @pytest.mark.parametrize("rows", quick([40, 1], 1))
    @pytest.mark.parametrize("kernel", quick([FP8, "float32", "int8", "float16", "bfloat16"], 2))
    def test_the_weight_is_rounded_as_the_definition_says(self, kernel, compute, rows):
        case = Case(40, (70, 40), "float32", kernel, (9, 7), compute)
        random = np.random.default_rng(0)
        _, weight, scale_inv = drawn(case)
        if scale_inv is None:  # up to what saturates float16 and bfloat16, down to what is subnormal in float16
            limit = np.finfo(np.float32).max if dtype(kernel).itemsize == 4 else largest(dtype(kernel))
            weight = np.where(random.random(weight.shape) < 0.1, limit, weight.astype(np.float32))
            weight = weight * np.float32(2) ** random.integers(-24, 1, weight.shape).astype(np.float32)
            weight = weight.astype(dtype(kernel))
        else:
            scale_inv = (scale_inv * 2.0 ** random.integers(-20, 21, scale_inv.shape)).astype(np.float32)
        eye = identity(40, "float32")
        found = [multiply(case, eye[i : i + rows], weight, scale_inv) for i in range(0, 40, rows)][: 40 // rows]
        want = factors(case, eye, weight, scale_inv)
        np.testing.assert_array_equal(np.concatenate(found), want.weight.T.astype(np.float32))

    def test_ties_are_rounded_to_even_and_what_is_too_large_saturates(self):
        largest_bfloat16, last = largest(dtype("bfloat16")), 2.0**127
        wide = np.array(
            [[1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 3.4e38, -3.4e38, np.inf, -np.inf, last, 0.0, -0.0]]
        )
        x = identity(10, "float32")
        for compute in ("bfloat16", "float16"):
            y = multiply(Case(10, (1, 10), "float32", "float32", None, compute), x[:1], wide.astype(np.float32), None)
            assert np.isnan(y).all()  # 0 * inf
            finite = np.where(np.isfinite(wide), wide, 1).astype(np.float32)
            y = multiply(Case(10, (1, 10), "float32", "float32", None, compute), x, finite, None)
            np.testing.assert_array_equal(y[:, 0], saturated(finite[0], compute).astype(np.float32))
        assert saturated(np.float32([3.4e38]), "bfloat16") == largest_bfloat16

    @pytest.mark.parametrize("rows", quick([1, 20], 1))
    @pytest.mark.parametrize("x", quick(ACTIVATIONS, 1))
    def test_what_is_not_finite_in_x_makes_its_row_nan_or_infinite(self, x, rows):
        case = Case(rows, (40, 70), x)
        operands = list(drawn(case))
        clean = multiply(case, *operands)
        for value in (np.nan, np.inf, -np.inf):
            operands[0] = operands[0].copy()
            operands[0][-1, 33] = value
            y = multiply(case, *operands).astype(np.float32)
            with np.errstate(invalid="ignore"):  # 0 * inf
                np.testing.assert_array_equal(y[-1], operands[1].astype(np.float32)[:, 33] * np.float32(value))
            assert bits(y[:-1]) == bits(clean[:-1].astype(np.float32))

    @pytest.mark.parametrize("rows", quick([1, 20], 1))
    @pytest.mark.parametrize("compute", quick([None, FP8, *ACTIVATIONS], 2))
    def test_a_nan_in_the_kernel_makes_its_column_nan(self, rows, compute):
        case = Case(rows, (40, 70), compute=compute)
        x, kernel, scale_inv = drawn(case)
        clean = multiply(case, x, kernel, scale_inv)
        kernel.view(np.uint8)[[3, 35], 41] = 0x7F, 0xFF
        y = multiply(case, x, kernel, scale_inv)
        rest = ~np.isin(np.arange(40), (3, 35))
        assert np.isnan(y[:, ~rest].astype(np.float32)).all()
        assert bits(y[:, rest]) == bits(clean[:, rest])

    @pytest.mark.parametrize("rows", quick([1, 20], 1))
    @pytest.mark.parametrize("x", quick(ACTIVATIONS, 1))
    @pytest.mark.parametrize("kernel", quick([FP8, "bfloat16", "float8_e5m2", "float16", "float32"], 2))
    def test_subnormal_numbers_are_as_they_are_or_zero(self, kernel, x, rows):
        case = Case(rows, (40, 70), x, kernel)
        random = np.random.default_rng(0)
        size = dtype(kernel).itemsize, dtype(x).itemsize
        mantissas = {"bfloat16": 0x7F, "float16": 0x3FF, "float32": 0x7FFFFF, FP8: 7, "float8_e5m2": 3}
        weight, rows_of_x = (
            random.integers(0, mantissas[of] + 1, shape).astype(f"u{bytes_}").view(dtype(of))
            for of, shape, bytes_ in ((kernel, case.shape, size[0]), (x, (rows, 70), size[1]))
        )
        scale_inv = np.full((1, 1), 2.0, np.float32) if case.is_narrow else None
        ordinary = random.normal(size=rows_of_x.shape).astype(rows_of_x.dtype)
        for row in (rows_of_x, ordinary):
            assert_within(multiply(case, row, weight, scale_inv), factors(case, row, weight, scale_inv))

    def test_subnormal_codes_of_float8_are_never_zero(self):
        kernel = np.arange(8, dtype=np.uint8).view(dtype(FP8))[:, None]
        y = multiply(Case(1, (8, 1)), np.ones((1, 1), dtype("bfloat16")), kernel, np.ones((1, 1), np.float32))
        np.testing.assert_array_equal(y[0].astype(np.float32), np.arange(8) * 2.0**-9)


def test_the_plan_of_a_cpu_names_it():
    choice = perparam.policies.matmul_plan(1, (256, 256), target="cpu")
    assert choice.implementation == "native"
    assert choice.checks == ()


def test_programs_call_the_library_and_widen_nothing():
    text = jax.jit(lambda *operands: scaled_matmul(*operands)).lower(*map(jnp.asarray, Case(8).operands())).as_text()
    assert "perparam_matmul" in text
    assert "while" not in text
