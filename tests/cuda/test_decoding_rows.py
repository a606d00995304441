"""The kernels of a decoding step for norm and gate, compiled for an H200: ptxas' log, and runs in the emulator."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulator.compiled import compile_kernels, emulated, run_in_all_schedules

from perparam.models.decoding import hopper_gate, hopper_norm, row_trials

pytestmark = [pytest.mark.cuda, pytest.mark.optimised]

BF16, F16 = np.dtype(jnp.bfloat16), np.dtype(np.float16)
REGISTERS = 168

NORMS = [
    (8, 1024, 16, BF16), (8, 2560, 5, BF16), (8, 4096, 4, BF16), (16, 5120, 2, BF16), (64, 5120, 1, F16),
    (8, 896, 19, BF16), (32, 256, 3, F16), (8, 1024, 0, BF16), (8, 5120, 40, BF16), (8, 5632, 8, BF16),
]  # fmt: skip
"""Rows, hidden, parts of the sums (1: in the activations' dtype, 0: none), and the activations' dtype."""

GATES = [(8, 3072, 2, BF16), (64, 12288, 1, BF16), (32, 25600, 1, F16), (8, 3072, 40, BF16)]


def sums_of(parts, rows, columns, dtype):
    return jax.ShapeDtypeStruct((parts, rows, columns), jnp.float32 if parts > 1 else dtype)


def norm(rows, hidden, parts, dtype, narrow):
    def run(stream, scale, *sums):
        return hopper_norm.add_and_norm(stream, *(sums or (None,)), scale, eps=1e-6, narrow=narrow)

    vectors = [jax.ShapeDtypeStruct((rows, hidden), dtype), jax.ShapeDtypeStruct((hidden,), dtype)]
    return run, [*vectors, sums_of(parts, rows, hidden, dtype)] if parts else vectors


def gate(rows, intermediate, parts, dtype, narrow):
    def run(sums):
        return hopper_gate.gate(sums, dtype=dtype, narrow=narrow)

    return run, [sums_of(parts, rows, 2 * intermediate, dtype)]


CASES = [(norm, *case, narrow) for case in NORMS for narrow in (False, True)]
CASES += [(gate, *case, narrow) for case in GATES for narrow in (False, True)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(getattr(x, "__name__", str(x)) for x in case))
def test_is_one_launch_without_spills(case):
    import compile_h200  # which changes the environment

    make, *settings = case
    run, shapes = make(*settings)
    kernels = compile_kernels(jax.jit(run).lower(*compile_h200.abstract(shapes)))
    (kernel,) = kernels
    (registers,) = map(int, re.findall(r"Used (\d+) registers", kernel.text))
    assert registers <= REGISTERS
    assert set(re.findall(r"(\d+) bytes spill", kernel.text)) == {"0"}, "registers are spilled"
    assert not re.findall(r"ptxas.*(?:[Ww]arning|Performance Loss|\(C75\d\d\)).*", kernel.text)
    # Nothing is copied by tensor copies, so that no address in shared memory needs to be a multiple of 128.
    assert "cp.async.bulk" not in kernel.text
    # A thread reads and writes 4 neighbours at once.
    assert "ld.v4.b32" in kernel.text or "ld.v2.b32" in kernel.text


@pytest.mark.usefixtures("compiler")
class TestEmulated:
    @pytest.fixture(autouse=True)
    def emulator(self, monkeypatch):
        # The emulator takes launches outside of `jit`.
        monkeypatch.setattr(row_trials, "jit", lambda function: function)
        monkeypatch.setattr(row_trials, "NORMS", (*row_trials.NORMS[:3], row_trials.Shape(8, 4608, 0)))
        with emulated(run_in_all_schedules):
            yield

    @pytest.mark.parametrize("narrow", [False, True])
    @pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
    @pytest.mark.parametrize("trial", [row_trials.of_norm, row_trials.of_gate])
    def test_the_trial_succeeds(self, trial, dtype, narrow):
        assert trial(dtype, narrow).compare() is None
