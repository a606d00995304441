"""Programs lowered for Hopper without one: which shapes and modes contain the kernels, and how many."""

import functools

import jax
import jax.numpy as jnp
import pytest
from matmuls import FP8, Case
from shapes import SHAPES, linears

from perparam.policies.blocks import grid_shape
from perparam.policies.matmul import matmul_override, scaled_matmul, scaled_matmuls


def shapes_of(case: Case):
    """The shapes of `(x, kernel, scale_inv)`."""
    x = jax.ShapeDtypeStruct((case.rows, case.shape[1]), case.x)
    kernel = jax.ShapeDtypeStruct(case.shape, case.kernel)
    return x, kernel, jax.ShapeDtypeStruct(grid_shape(case.shape, case.sides), jnp.float32)


def lowered_text(run, *arguments, target: str = "cuda:9.0") -> str:
    """The program of `run`, traced for `target` and lowered for CUDA."""
    with matmul_override(target=target):
        return jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def kernels_in(run, *arguments, target: str = "cuda:9.0") -> int:
    """Launches of kernels in `run`."""
    return lowered_text(run, *arguments, target=target).count("custom_call @mosaic_gpu")


def kernels_of(case: Case, target: str = "cuda:9.0") -> int:
    return kernels_in(functools.partial(scaled_matmul, **case.settings), *shapes_of(case), target=target)


def some(first):
    """All shapes, of which every eighth is in the quick run."""
    return [pytest.param(shape, marks=pytest.mark.thorough if i % 8 != first else ()) for i, shape in enumerate(SHAPES)]


def each_with(*calls):
    """`(shape, call)` of all shapes and calls; the slow run has each shape once, and the calls in turn."""
    return [
        pytest.param(shape, call, marks=pytest.mark.slow if i % len(calls) == j else pytest.mark.thorough)
        for i, shape in enumerate(SHAPES)
        for j, call in enumerate(calls)
    ]


class TestEveryShape:
    # Both modes ask the same of a shape: a few of each are enough in the quick run.
    @pytest.mark.parametrize("shape", some(2), ids=str)
    def test_w8a16_is_one_kernel(self, shape):
        assert kernels_of(Case(8, shape)) == 1

    @pytest.mark.slow
    @pytest.mark.parametrize("shape", some(0), ids=str)
    def test_w8a8_of_many_rows_is_a_kernel_that_quantises_and_one_that_multiplies(self, shape):
        assert kernels_of(Case(512, shape, compute=FP8)) == 2

    @pytest.mark.thorough
    @pytest.mark.parametrize(("shape", "rows"), each_with(1, 64, 512, 4096), ids=str)
    def test_w8a16_of_any_number_of_rows(self, shape, rows):
        assert kernels_of(Case(rows, shape)) == 1

    @pytest.mark.thorough
    @pytest.mark.parametrize(("shape", "call"), each_with((1, 1), (64, 1), (4096, 2)), ids=str)
    def test_w8a8_of_any_number_of_rows(self, shape, call):
        rows, expected = call
        assert kernels_of(Case(rows, shape, compute=FP8)) == expected


class TestModes:
    @pytest.mark.parametrize(
        "case",
        [
            Case(8, x="float16"),
            Case(8, kernel="float8_e5m2"),
            Case(8, block=None),
            Case(8, block=(256, 128)),
            Case(8, compute=FP8),
            Case(64, compute=FP8),
        ],
        ids=str,
    )
    def test_one_kernel(self, case):
        assert kernels_of(case) == 1

    @pytest.mark.parametrize("case", [Case(65, compute=FP8), Case(100, (128, 128), x="float32", compute=FP8)], ids=str)
    def test_two_kernels(self, case):
        assert kernels_of(case) == 2

    @pytest.mark.parametrize(
        "case",
        [Case(8, x="float32"), Case(8, kernel="int8"), Case(8, (200, 384)), Case(8, compute="bfloat16")],
        ids=str,
    )
    def test_what_the_kernels_refuse_contains_none(self, case):
        assert kernels_of(case) == 0

    @pytest.mark.parametrize("target", ["cuda:8.0", "cuda", "cuda:10.0", "cpu"])
    @pytest.mark.parametrize("compute", [None, FP8])
    def test_other_targets_contain_none(self, target, compute):
        assert kernels_of(Case(8, compute=compute), target) == 0

    @pytest.mark.parametrize("compute", [None, FP8])
    def test_a_vmap_over_rows_launches_no_more(self, compute):
        case = Case(8, compute=compute)
        x, kernel, scale_inv = shapes_of(case)
        run = jax.vmap(functools.partial(scaled_matmul, **case.settings), (0, None, None))
        assert kernels_in(run, jax.ShapeDtypeStruct((4, *x.shape), x.dtype), kernel, scale_inv) == 1

    def test_the_gradient_of_x_needs_no_kernel_of_its_own(self):
        def loss(x, kernel, scale_inv):
            return scaled_matmul(x, kernel, scale_inv).astype(jnp.float32).sum()

        assert kernels_in(jax.value_and_grad(loss), *shapes_of(Case(8))) == 1


class TestRowsThatAreNoMultipleOfATile:
    @pytest.mark.parametrize("compute", [None, pytest.param(FP8, marks=pytest.mark.slow)])
    @pytest.mark.parametrize(("rows", "padded"), [(1000, False), (1001, True), (100, True)])
    def test_are_padded_to_eight_or_a_whole_tile(self, rows, padded, compute):
        case = Case(rows, compute=compute)
        text = lowered_text(functools.partial(scaled_matmul, **case.settings), *shapes_of(case))
        assert ("stablehlo.pad" in text) == padded


class TestSeveralKernels:
    @staticmethod
    def lowered(rows: int, shapes, compute=None) -> int:
        operands = [shapes_of(Case(rows, shape)) for shape in shapes]
        run = lambda x, pairs: scaled_matmuls(x, pairs, compute=compute)  # noqa: E731
        return kernels_in(run, operands[0][0], [pair[1:] for pair in operands])

    def test_the_projections_of_attention_are_one_launch(self):
        linear = linears("0.6B")
        assert self.lowered(1, [linear[name] for name in ("q_proj", "k_proj", "v_proj")]) == 1

    def test_and_share_the_quantised_activations_of_many_rows(self):
        linear = linears("0.6B")
        assert self.lowered(2048, [linear["gate_proj"], linear["up_proj"]], FP8) == 3

    @pytest.mark.thorough
    @pytest.mark.parametrize(("compute", "launches"), [(None, 1), (FP8, 2)])
    def test_and_one_launch_of_a_few_hundred_rows(self, compute, launches):
        linear = linears("0.6B")
        assert self.lowered(200, [linear[name] for name in ("q_proj", "k_proj", "v_proj")], compute) == launches

    @pytest.mark.thorough
    @pytest.mark.parametrize(("compute", "launches"), [(None, 2), (FP8, 3)])
    def test_and_several_launches_of_thousands(self, compute, launches):
        linear = linears("8B")
        assert self.lowered(4096, [linear["gate_proj"], linear["up_proj"]], compute) == launches

    def test_one_that_is_refused_leaves_the_launches_of_its_neighbours(self):
        assert self.lowered(1, [(256, 384), (200, 384), (128, 384)]) == 2
