"""The kernels of a decoding step for norm and gate: the bounds of their results, and the kernels in the interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreter import interpreted, required

from perparam.models.decoding import hopper_gate, hopper_norm, reference, row_trials

BF16, F16 = np.dtype(jnp.bfloat16), np.dtype(np.float16)
EACH = [
    (row_trials.of_norm, BF16, True),
    *(
        pytest.param(of, dtype, narrow, marks=pytest.mark.slow)
        for of in (row_trials.of_norm, row_trials.of_gate)
        for dtype in (BF16, F16)
        for narrow in (False, True)
        if (of, dtype, narrow) != (row_trials.of_norm, BF16, True)
    ),
]
"""Trials, dtypes and whether operands are quantised."""


@pytest.fixture
def small(monkeypatch):
    """Trials in which kernels are called as they are: XLA leaves out roundings in the programs of `jit`."""
    monkeypatch.setattr(row_trials, "jit", lambda function: function)
    monkeypatch.setattr(row_trials, "NORMS", (row_trials.Shape(8, 512, 3), row_trials.Shape(8, 256, 1)))
    monkeypatch.setattr(row_trials, "GATES", (row_trials.Shape(8, 256, 3),))


def use(monkeypatch, change=lambda results: results, **settings):
    """Has the trials compare the reference, with changed results, in place of the kernels."""

    def norm(stream, sums, scale, *, eps, narrow):
        return change(reference.add_and_norm(stream, sums, scale, **{"eps": eps, "narrow": narrow, **settings}))

    def gate(sums, *, dtype, narrow):
        return change((None, reference.gate(sums, dtype=dtype, narrow=narrow)))[1]

    monkeypatch.setattr(hopper_norm, "add_and_norm", norm)
    monkeypatch.setattr(hopper_gate, "gate", gate)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("of", "dtype", "narrow"), EACH)
def test_the_reference_is_within_the_bounds(monkeypatch, of, dtype, narrow):
    use(monkeypatch)
    assert of(dtype, narrow).compare() is None


def _values(change):
    return lambda results: (results[0], (change(results[1][0]), results[1][1]))


def _scales(change):
    return lambda results: (results[0], (results[1][0], change(results[1][1])))


def _next(values):
    """Values of which one, not zero, is its neighbour."""
    codes = jax.lax.bitcast_convert_type(values, jnp.dtype(f"uint{8 * values.dtype.itemsize}"))
    place = jnp.unravel_index(jnp.argmax(jnp.abs(values.astype(jnp.float32))), values.shape)
    return jax.lax.bitcast_convert_type(codes.at[place].add(-2), values.dtype)


WRONG = {
    "an element two off": _values(_next),
    "the last row lost": _values(lambda y: y.at[-1].set(0)),
    "two rows exchanged": _values(lambda y: y.at[:2].set(y[1::-1])),
    "blocks exchanged": _values(lambda y: jnp.roll(y, 128, axis=1)),
    "NaN": _values(lambda y: y.at[1, 3].set(jnp.nan)),
    "another shape": _values(lambda y: y[:, :-1]),
}
WRONG_SCALES = {
    "scales 2**-16 too large": _scales(lambda s: s.at[:, :8].multiply(1 + 2.0**-16)),
    "scales of zeros are zero": _scales(lambda s: jnp.where(s == 1, 0, s)),
    "the scales of other rows": _scales(lambda s: s.at[:, :8].set(s[:, 7::-1])),
    "nothing beyond the rows": _scales(lambda s: s.at[:, 8:].set(jnp.nan)),
    "scales without padding": _scales(lambda s: s[:, :8]),
}


@pytest.mark.thorough
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("of", [row_trials.of_norm, row_trials.of_gate])
@pytest.mark.parametrize(
    ("wrong", "narrow"),
    [*((name, narrow) for name in WRONG for narrow in (False, True)), *((n, True) for n in WRONG_SCALES)],
)
def test_a_wrong_kernel_is_outside(monkeypatch, of, wrong, narrow):
    use(monkeypatch, {**WRONG, **WRONG_SCALES}[wrong])
    assert of(BF16, narrow).compare() is not None


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_wrong_norm_is_outside(monkeypatch):
    use(monkeypatch, eps=1e-5)
    assert "the operand" in row_trials.of_norm(BF16, False).compare()
    use(monkeypatch, lambda results: (results[0].at[0, 5].add(1), results[1]))
    assert "the stream" in row_trials.of_norm(BF16, False).compare()


@required
@pytest.mark.slow
@pytest.mark.usefixtures("small")
class TestInterpreted:
    @pytest.fixture(autouse=True)
    def on_a_cpu(self, small):
        with interpreted():
            yield

    @pytest.mark.parametrize(("dtype", "narrow"), [(BF16, True), (F16, False)])
    @pytest.mark.parametrize("of", [row_trials.of_norm, row_trials.of_gate])
    def test_the_trial_succeeds(self, of, dtype, narrow):
        assert of(dtype, narrow).compare() is None

    def test_extremes(self):
        sums = np.zeros((1, 8, 512), np.float16)
        sums[0, :, :256:7] = np.resize([100, -100, 3e4, -3e4, 65504, -65504, 6e-8, -1], (8, 37))
        sums[0, :, 256:] = np.resize([1, -2, 2.0**-14, 65504], (8, 256))
        for narrow in (False, True):
            values, scales = hopper_gate.gate(jnp.asarray(sums), dtype=F16, narrow=narrow)
            found = np.asarray(values), None if scales is None else np.asarray(scales)
            want = reference.gate(jnp.asarray(sums), dtype=F16, narrow=narrow)
            same = np.isfinite(np.asarray(want[0]).astype(np.float64))
            assert (np.isfinite(found[0].astype(np.float64)) == same).all()
            if not narrow:
                assert row_trials.gate_difference(sums, F16, *found) is None

    def test_a_stream_without_sums_is_returned(self):
        stream = jnp.asarray(np.random.default_rng(0).normal(size=(8, 256)), F16)
        scale = jnp.ones(256, F16)
        new, (values, scales) = hopper_norm.add_and_norm(stream, None, scale, eps=1e-6, narrow=False)
        assert new is stream
        assert scales is None
        operands = np.asarray(stream), None, np.asarray(scale)
        assert row_trials.norm_difference(operands, np.asarray(new), np.asarray(values), None) is None
