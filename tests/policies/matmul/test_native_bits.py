"""A row of a native product has the same bits in every batch and program, and by every number of threads."""

import functools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bits, dtype
from matmuls import FP8, Case
from native_matmuls import drawn, multiply, required

from perparam.policies.matmul import matmul_override, scaled_matmul, scaled_matmuls

pytestmark = [pytest.mark.optimised, required]

# Sums of several runs and panels, the last of each not full.
SHAPE = (70, 200)
MODES = pytest.mark.parametrize(
    "case",
    [
        Case(0, SHAPE),
        Case(0, SHAPE, x="float32", block=(64, 96)),
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in [
                Case(0, SHAPE, x="float16"),
                Case(0, SHAPE, compute=FP8),
                Case(0, SHAPE, kernel="bfloat16"),
                Case(0, SHAPE, compute="bfloat16"),
                Case(0, SHAPE, kernel="float8_e4m3fnuz", block=(1, 3)),
            ]
        ),
    ],
    ids=str,
)

ROWS = [1, 4, 5, 12, 13, 40]
"""Around the numbers of rows that some instruction set multiplies at a time."""


def rows_of(case: Case, count: int, seed: int = 0):
    """`(x, kernel, scale_inv)` with that number of rows."""
    _, *pair = drawn(case, seed)
    x = np.random.default_rng(seed + 7).normal(size=(count, case.shape[1])).astype(dtype(case.x))
    return x, *pair


class TestBatches:
    @MODES
    def test_a_row_alone_has_the_bits_that_it_has_in_a_batch(self, case):
        x, *pair = rows_of(case, ROWS[-1])
        whole = multiply(case, x, *pair)
        for count in ROWS:
            assert bits(multiply(case, x[:count], *pair)) == bits(whole[:count]), count
        for row in (11, 12, 39):
            assert bits(multiply(case, x[row : row + 1], *pair)) == bits(whole[row : row + 1]), row

    @MODES
    def test_so_it_has_where_rows_are_divided_into_tasks(self, case):
        x, *pair = rows_of(case, 1030)
        alone = multiply(case, x[:1], *pair)
        for count in (512, 513, 1030):
            whole = multiply(case, x[:count], *pair)
            assert bits(whole[:1]) == bits(alone)
            for row in (count - 1, count // 2):
                assert bits(multiply(case, x[row : row + 1], *pair)) == bits(whole[row : row + 1]), (count, row)

    @MODES
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_other_rows_may_be_what_they_like(self, case, value):
        x, *pair = rows_of(case, 30)
        clean = multiply(case, x, *pair)
        for row in (0, 3, 12, 29):
            others = np.full_like(x, value)
            others[row] = x[row]
            assert bits(multiply(case, others, *pair)[row]) == bits(clean[row])

    @pytest.mark.slow
    def test_the_result_may_be_float32(self):
        case = Case(0, SHAPE)
        x, *pair = rows_of(case, 20)
        with matmul_override("native"):
            whole = scaled_matmul(x, *pair, result="f32")
            assert bits(scaled_matmul(x[7:8], *pair, result="f32")) == bits(whole[7:8])


class TestPrograms:
    """Inside of every transformation a product has the bits of a call by itself."""

    case = Case(0, SHAPE)

    def product(self, x, *pair):
        return scaled_matmul(x, *pair, **self.case.settings)

    @pytest.fixture
    def operands(self):
        return tuple(map(jnp.asarray, rows_of(self.case, 6)))

    @pytest.fixture
    def want(self, operands):
        return bits(multiply(self.case, *operands))

    def test_jit(self, operands, want):
        assert bits(jax.jit(self.product)(*operands)) == want

    def test_vmap(self, operands, want):
        x, *pair = operands
        assert bits(jax.vmap(lambda x: self.product(x, *pair))(x)) == want
        assert bits(jax.vmap(lambda x: self.product(x, *pair))(x[:, None])[:, 0]) == want

    @pytest.mark.slow
    def test_vmap_over_kernels(self, operands, want):
        x, *pair = operands
        two = [jnp.stack([array, array]) for array in pair]
        found = jax.jit(jax.vmap(self.product, (None, 0, 0)))(x, *two)
        assert [bits(found[0]), bits(found[1])] == [want, want]

    def test_scan(self, operands, want):
        x, *pair = operands
        found = jax.jit(lambda x: jax.lax.scan(lambda _, row: (_, self.product(row, *pair)), 0, x)[1])(x)
        assert bits(found) == want

    def test_scan_over_layers(self, operands, want):
        x, *pair = operands
        layers = [jnp.stack([array] * 3) for array in pair]
        found = jax.jit(lambda x: jax.lax.scan(lambda _, layer: (_, self.product(x, *layer)), 0, layers)[1])(x)
        assert {bits(y) for y in found} == {want}

    def test_while_loop(self, operands, want):
        x, *pair = operands

        def body(carry):
            i, y = carry
            return i + 1, self.product(x, *pair) + 0 * y

        zeros = jnp.zeros((len(x), SHAPE[0]), x.dtype)
        assert bits(jax.jit(lambda: jax.lax.while_loop(lambda carry: carry[0] < 3, body, (0, zeros)))()[1]) == want

    def test_cond(self, operands, want):
        x, *pair = operands
        run = jax.jit(
            lambda which: jax.lax.cond(which, lambda: self.product(x, *pair), lambda: self.product(-x, *pair))
        )
        assert bits(run(True)) == bits(-run(False)) == want

    def test_checkpoint(self, operands, want):
        assert bits(jax.jit(jax.checkpoint(self.product))(*operands)) == want

    def test_operands_that_the_program_computes(self, operands, want):
        x, *pair = operands
        assert bits(jax.jit(lambda x: self.product(x * 2, *pair))(x / 2)) == want
        assert bits(jax.jit(lambda x: self.product(x.T.T[::-1][::-1], *pair))(x)) == want

    def test_constants(self, operands, want):
        assert bits(jax.jit(lambda: self.product(*operands))()) == want

    def test_calls_of_many_threads_at_once(self, operands, want):
        run = jax.jit(self.product)
        with ThreadPoolExecutor(8) as pool:
            assert {bits(y) for y in pool.map(lambda _: np.asarray(run(*operands)), range(200))} == {want}


PROGRAM = """
import hashlib, os, sys
import jax, numpy as np
import native_results
from perparam.policies.native import library
assert library.unavailable() is None, library.unavailable()
digest = hashlib.sha256()
for y in native_results.results():
    digest.update(y.tobytes())
names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
print(sum(name.startswith("tf_XLAEigen") for name in names), digest.hexdigest())
"""


@functools.cache
def digest(threads: int, **environment: str) -> str:
    """The hash of several products and gradients in a process with that number of threads."""
    environment = {**os.environ, "NPROC": str(threads), "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    pool, result = done.stdout.split()
    assert int(pool) == threads  # XLA's pool has as many threads as NPROC says
    return result


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
@pytest.mark.parametrize(
    "threads", [pytest.param(n, marks=pytest.mark.thorough if n == 2 else pytest.mark.slow) for n in (2, 3, 16)]
)
def test_any_number_of_threads_gives_the_same_bits(threads):
    assert digest(threads) == digest(1)


@pytest.mark.slow
def test_several_matmuls_of_one_program_at_once():
    """XLA runs what does not depend on each other at once: each then finds the threads of the pool taken."""
    x, kernel, scale_inv = map(jnp.asarray, rows_of(Case(0, SHAPE), 5))

    @jax.jit
    def run(x):
        return [scaled_matmul(x * (2.0**i), kernel, scale_inv) for i in range(-8, 8)] + [
            y for i in range(8) for y in scaled_matmuls(x * (2.0**i), [(kernel, scale_inv)] * 3)
        ]

    want = multiply(Case(5, SHAPE), x, kernel, scale_inv)
    powers = [*range(-8, 8), *(i for i in range(8) for _ in range(3))]
    for _ in range(100):
        for power, y in zip(powers, run(x), strict=True):
            assert bits(np.asarray(y) * np.asarray(2.0**power, x.dtype) ** -1) == bits(want)
