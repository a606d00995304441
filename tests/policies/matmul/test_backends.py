"""What every implementation of the matmul has to be, held against float64 and against the oracle."""

import contextlib

import interpreter
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import dtype, largest
from hypothesis import given, settings
from hypothesis import strategies as st
from matmuls import FP8, ON_CPU, W8A8_ERROR, W8A16_ERROR, Case, exact, marks, relative_error, takers, widened

from perparam.policies import UnsupportedCast
from perparam.policies.matmul import matmul_override, quantize_rows, scaled_matmul, scaled_matmuls
from perparam.policies.matmul.calls import Operands
from perparam.policies.matmul.dispatch import IMPLEMENTATIONS
from perparam.policies.scaled_array import scaled_array

pytestmark = pytest.mark.optimised

ORACLE_ERROR = 1e-5
"""The same float32 products summed in another order: sqrt(n) * 2**-24 rms, 1.2e-6 of 384 and 1e-5 of 25600."""

BY_ELEMENT = 2.0**-7
"""Relative to the sum of magnitudes: the weight and the result may each be rounded to bfloat16, by up to 2**-8."""

E4M3_BY_ELEMENT = 2.0**-4 + BY_ELEMENT
"""The same where activations are rounded to four bits as well, by up to 2**-4."""

GAUSSIAN = {
    "W8A16": (Case(1), Case(8), Case(130)),
    "W8A8": (Case(1, compute=FP8), Case(5, compute=FP8), Case(70, compute=FP8)),
    "other kernels": (
        Case(2, (150, 200), kernel="int8", block=(64, 64)),
        Case(2, (150, 200), kernel="float8_e5m2", block=(100, 50)),
        Case(8, x="float16", block=None),
    ),
    "plain": (
        Case(1, kernel="bfloat16"),
        Case(8, kernel="bfloat16"),
        Case(2, (150, 200), x="float32", kernel="float32"),
        Case(8, x="float16", kernel="float16"),
    ),
}
CASES = [case for group in GAUSSIAN.values() for case in group]


def refusal(name: str, case: Case) -> str | None:
    return IMPLEMENTATIONS[name].refuses(case.call)


EVERYONE = pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in IMPLEMENTATIONS])

# Those that take all ragged shapes compile a program for each, seconds in all; the quick run has what CPUs use.
RAGGED_SLOW = tuple(name for name in ("slabs", "fused reduction", "widen, then dot", "oracle") if name != ON_CPU)


@pytest.fixture(scope="module")
def launches():
    with contextlib.nullcontext([]) if interpreter.MISSING else interpreter.interpreted() as launches:
        yield launches


@pytest.fixture(autouse=True)
def without_races(launches):
    yield
    interpreter.assert_no_races(launches)


def multiply(name: str, case: Case, *operands) -> np.ndarray:
    with matmul_override(implementation=name):
        return np.asarray(scaled_matmul(*operands, **case.settings))


def multiply_if_taken(name: str, case: Case, *operands) -> np.ndarray | None:
    """The product, or None after a refusal that says why and whose."""
    if why := refusal(name, case):
        assert len(why.split()) > 2
        with pytest.raises(
            UnsupportedCast, match=f"'{name}', the implementation in matmul_override, does not accept"
        ) as caught:
            multiply(name, case, *operands)
        assert why in str(caught.value)
        return None
    return multiply(name, case, *operands)


class TestEveryImplementation:
    @takers(*GAUSSIAN["W8A16"], quick_kernels=True)
    def test_w8a16_is_the_product_in_float64_up_to_the_rounding_of_the_result(self, name, case):
        operands = case.operands()
        y = multiply(name, case, *operands)
        assert y.dtype == dtype("bfloat16")
        assert relative_error(y, exact(*operands, case.sides)) <= W8A16_ERROR

    @takers(*GAUSSIAN["W8A8"], quick_kernels=True)
    def test_w8a8_is_the_product_in_float64_up_to_the_rounding_of_activations(self, name, case):
        operands = case.operands()
        y = multiply(name, case, *operands)
        assert y.dtype == dtype(case.x)
        assert relative_error(y, exact(*operands, case.sides)) <= W8A8_ERROR

    @pytest.mark.slow
    @takers(*GAUSSIAN["other kernels"], *GAUSSIAN["plain"])
    def test_other_dtypes_and_blocks(self, name, case):
        operands = case.operands()
        y = multiply(name, case, *operands)
        magnitude = exact(*map(np.abs, operands[:2]), operands[2], case.sides)
        assert y.dtype == dtype(case.x)
        assert (np.abs(y.astype(np.float64) - exact(*operands, case.sides)) <= BY_ELEMENT * magnitude).all()

    @takers(*(Case(rows, x="float32", compute=FP8) for rows in (8, 70)))
    def test_the_same_quantised_activations_give_what_the_oracle_gives(self, name, case):
        x, kernel, scale_inv = case.operands()
        rows = quantize_rows(jnp.asarray(x), dtype(FP8))
        operands = Operands(rows, scaled_array(kernel, scale_inv, case.sides))
        runs = [jax.jit(lambda o, run=IMPLEMENTATIONS[one].run: run((case.call,), (o,))) for one in (name, "oracle")]
        (found,), (want,) = (run(operands) for run in runs)
        assert found.dtype == want.dtype == np.float32
        assert relative_error(found, want) <= ORACLE_ERROR

    @pytest.mark.slow
    @takers(Case(1), Case(8), Case(8, compute=FP8), Case(70, compute=FP8))
    def test_scales_from_2_to_the_minus_20_to_2_to_the_20(self, name, case):
        x, kernel, scale_inv = case.operands()
        scale_inv = (2.0 ** np.random.default_rng(1).integers(-20, 21, scale_inv.shape)).astype(np.float32)
        y = multiply(name, case, x, kernel, scale_inv).astype(np.float64)
        magnitude = exact(np.abs(x), np.abs(kernel), scale_inv, case.sides)
        bound = (E4M3_BY_ELEMENT if case.compute else BY_ELEMENT) * magnitude
        assert (np.abs(y - exact(x, kernel, scale_inv, case.sides)) <= bound).all()

    @takers(Case(1), Case(8), Case(8, compute=FP8), Case(70, compute=FP8))
    def test_large_scales_that_meet_zeros_do_not_drown_the_others(self, name, case):
        x, kernel, scale_inv = case.operands()
        x[:, :128] = 0
        scale_inv[:, 0], scale_inv[:, 1:] = 2.0**20, 2.0**-20
        y = multiply(name, case, x, kernel, scale_inv)
        bound = W8A8_ERROR if case.compute else W8A16_ERROR
        assert relative_error(y, exact(x, kernel, scale_inv, case.sides)) <= bound

    @takers(Case(8), Case(8, compute=FP8), Case(70, compute=FP8), Case(8, kernel="bfloat16"))
    def test_zero_blocks_and_zero_rows_give_zeros(self, name, case):
        x, kernel, scale_inv = case.operands()
        kernel[:128] = 0
        x[-1] = 0
        y = multiply(name, case, x, kernel, scale_inv)
        assert (y[-1] == 0).all()
        assert (y[:, :128] == 0).all()
        assert (y[:-1, 128:] != 0).mean() > 0.9

    @takers(Case(8), Case(8, compute=FP8), Case(70, compute=FP8), Case(1))
    @pytest.mark.parametrize("size", [2.0**-60, 2.0**60])
    def test_finite_operands_give_finite_results(self, name, case, size):
        x, kernel, scale_inv = case.operands()
        kernel[::2] = largest(kernel.dtype)
        x = (np.where(np.arange(x.shape[1]) % 3, x, 1).astype(np.float32) * np.float32(size)).astype(x.dtype)
        y = multiply(name, case, x, kernel, scale_inv * np.float32(2.0**20 if size > 1 else 2.0**-20))
        assert np.isfinite(y.astype(np.float32)).all()
        assert (y != 0).mean() > 0.9

    @takers(Case(8), Case(8, compute=FP8), Case(70, compute=FP8), Case(8, kernel="bfloat16"))
    def test_what_is_not_finite_in_a_row_stays_there(self, name, case):
        x, kernel, scale_inv = case.operands()
        clean = multiply(name, case, x, kernel, scale_inv)
        x[3, 200], x[5, 100] = np.nan, np.inf
        y = multiply(name, case, x, kernel, scale_inv)
        rest = ~np.isin(np.arange(case.rows), (3, 5))
        assert not np.isfinite(y[~rest].astype(np.float32)).any()
        np.testing.assert_array_equal(y[rest], clean[rest])

    @takers(Case(8), Case(8, compute=FP8), Case(70, compute=FP8), Case(130), Case(8, kernel="bfloat16"))
    def test_two_runs_are_equal_bit_for_bit(self, name, case):
        operands = case.operands()
        first, second = (multiply(name, case, *operands) for _ in range(2))
        assert first.tobytes() == second.tobytes()

    @takers(Case(8), Case(70, compute=FP8))
    def test_several_kernels_give_what_each_gives_alone(self, name, case):
        x, kernel, scale_inv = case.operands()
        taller = (np.concatenate([half, half[: len(half) // 2]]) for half in (kernel, scale_inv))
        with matmul_override(implementation=name):
            found = scaled_matmuls(x, [(kernel, scale_inv), tuple(taller), (kernel, scale_inv)], **case.settings)
        want = multiply(name, case, x, kernel, scale_inv)
        for y, columns in zip(found, (256, 384, 256), strict=True):
            assert relative_error(y, np.concatenate([want, want[:, :128]], axis=1)[:, :columns]) <= W8A16_ERROR

    @pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=[*marks(name), *[pytest.mark.slow] * (name in RAGGED_SLOW)])
            for name in IMPLEMENTATIONS
        ],
    )
    @settings(max_examples=5)
    @given(
        case=st.builds(
            Case,
            rows=st.sampled_from([1, 3]),
            shape=st.sampled_from([(3, 5), (37, 16), (150, 200)]),
            x=st.sampled_from(["bfloat16", "float32"]),
            block=st.sampled_from([(1, 3), (128, 128), (64, 64), (100, 50), None]),
            compute=st.sampled_from([None, FP8]),
        ),
        seed=st.integers(0, 99),
    )
    def test_ragged_shapes_and_blocks(self, name, case, seed):
        operands = x, kernel, scale_inv = case.operands(seed)
        y = multiply_if_taken(name, case, *operands)
        if y is not None:
            magnitude = exact(np.abs(x), np.abs(kernel), scale_inv, case.sides)
            bound = (E4M3_BY_ELEMENT if case.compute else BY_ELEMENT) * magnitude
            assert y.shape == (case.rows, case.shape[0])
            assert (np.abs(y.astype(np.float64) - exact(*operands, case.sides)) <= bound).all()

    @pytest.mark.slow
    @EVERYONE
    @pytest.mark.parametrize(("rows", "shape"), [(2, (5, 0)), (2, (0, 9)), (0, (5, 9)), (0, (256, 384))])
    def test_without_columns_zeros_and_without_rows_nothing(self, name, rows, shape):
        case = Case(rows, shape, block=(128, 128))
        y = multiply_if_taken(name, case, *case.operands())
        if y is not None:
            assert y.shape == (rows, shape[0])
            assert (y == 0).all()

    @pytest.mark.slow
    @EVERYONE
    def test_a_refusal_says_why_and_reaches_the_caller(self, name):
        for case in CASES:
            if refusal(name, case):
                multiply_if_taken(name, case, *case.operands())


def test_no_implementation_escapes_these_tests():
    idle = {name for name in IMPLEMENTATIONS if all(refusal(name, case) for case in CASES)}
    # "two rows" refuses everything where the processor has no instructions for bfloat16; the second takes mxfp8 alone;
    # the third takes no fewer tiles than a GPU has multiprocessors, and the checks of `gpu_checks.dry_checks` have it;
    # "native" refuses everything where the library was not compiled.
    assert idle <= {"two rows", "cudnn block scaled", "hopper widened", "native"}
    assert ("native" in idle) == (ON_CPU != "native")


def test_the_weights_that_cases_draw_cover_the_narrow_range():
    _, kernel, scale_inv = Case(8).operands()
    assert np.abs(kernel.astype(np.float32)).max() == largest(kernel.dtype)
    assert np.isfinite(widened(kernel, scale_inv, (128, 128))).all()
