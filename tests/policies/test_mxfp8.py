"""mxfp8 end to end: against a reference written from OCP's specification, in storage, plans, matmuls and models."""

import itertools

import checkpoints
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import ocp_mx
import pytest
from checkpoints import fields, tensors, write
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from matmuls import ON_CPU

import perparam
from perparam import Policy
from perparam.models import Linear
from perparam.policies import FORMATS, InvalidPolicy, ScaledArray, UnknownDtype, matmul_override, matmul_plan
from perparam.policies.matmul import IMPLEMENTATIONS, quantize_rows, scaled_matmuls
from perparam.policies.matmul.dispatch import describe

pytestmark = pytest.mark.optimised

FORMAT = FORMATS["mxfp8"]
E4M3, E8M0 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e8m0fnu)
IDS = np.random.default_rng(0).integers(1, 60, (2, 9))

E4M3_ROUNDING = 2.0**-4
"""Half a step of four significant bits; an element that saturates is off by up to (512 - 448) / 512 = 2**-3."""


def codes(array: ScaledArray) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(array.values).view(np.uint8), np.asarray(array.scale_inv).view(np.uint8)


def assert_codes(array, weight):
    for found, wanted in zip(codes(array), ocp_mx.quantize(weight), strict=True):
        np.testing.assert_array_equal(found, wanted)


def matrix(seed: int, shape=(5, 70), spread: int = 20) -> np.ndarray:
    random = np.random.default_rng(seed)
    scale = 2.0 ** random.integers(-spread, spread + 1, (*shape[:-1], 1))
    return (random.normal(size=shape) * scale).astype(np.float32)


def wide(weight) -> np.ndarray:
    return ocp_mx.dequantize(*ocp_mx.quantize(weight))


class TestCodes:
    @settings(max_examples=10)
    @given(
        seed=st.integers(0, 999),
        shape=st.sampled_from([(3, 32), (2, 31), (2, 33), (4, 5), (1, 100), (2, 3, 40)]),
        of=st.sampled_from(["float32", "bfloat16", "float16"]),
    )
    def test_they_are_the_specifications(self, seed, shape, of):
        weight = matrix(seed, shape, 6 if of == "float16" else 20).astype(getattr(ml_dtypes, of, of))
        assert_codes(perparam.quantize(weight, "mxfp8"), weight)

    @pytest.mark.parametrize("mantissa", [1.0, 1.74, 1.75, 1.76, 1.8749, 1.9, 1.9999999])
    def test_what_is_beyond_the_largest_element_saturates(self, mantissa):
        weight = np.array([[mantissa * 2.0**5, 1.0, -mantissa * 2.0**5]], np.float32)
        array = perparam.quantize(weight, "mxfp8")
        assert_codes(array, weight)
        assert np.asarray(array.scale_inv).astype(np.float32) == 2.0**-3
        assert float(array.values[0, 0]) == min(448, round(mantissa * 8) * 32)

    def test_quotients_that_are_ties_go_to_even(self):
        quotients = np.array([[256, *(np.arange(17, 32) + 0.0), 0.001, 2.0**-10, 3 * 2.0**-10, -0.0]])
        assert_codes(perparam.quantize(quotients.astype(np.float32), "mxfp8"), quotients.astype(np.float32))

    def test_zeros_the_largest_and_the_smallest(self):
        weight = np.zeros((5, 64), np.float32)
        weight[1, 0], weight[2, :] = np.finfo(np.float32).max, -np.finfo(np.float32).max
        weight[3, 40], weight[4, 3] = 2.0**-126, 2.0**-118
        array = perparam.quantize(weight, "mxfp8")
        assert_codes(array, weight)
        assert np.isfinite(array.dequantize()).all()

    @pytest.mark.parametrize("stray", [np.nan, np.inf])
    def test_a_block_that_is_not_finite_has_scale_nan(self, stray):
        weight = np.ones((1, 64), np.float32)
        weight[0, 40] = stray
        _, scales = codes(perparam.quantize(weight, "mxfp8"))
        assert scales.tolist() == [[127 - 8, 255]]

    @given(seed=st.integers(0, 999))
    def test_they_are_read_back_exactly(self, seed):
        weight = matrix(seed)
        np.testing.assert_array_equal(perparam.quantize(weight, "mxfp8").dequantize(), wide(weight))
        error, largest = np.abs(wide(weight) - weight), np.abs(weight).max(axis=-1, keepdims=True)
        assert (error <= np.maximum(2 * E4M3_ROUNDING * np.abs(weight), largest * 2.0**-18)).all()  # or subnormal

    @pytest.mark.parametrize("of", ["float32", "bfloat16"])
    def test_activations_are_quantised_as_the_format_says(self, of, monkeypatch):
        x = matrix(1, (6, 70)).astype(getattr(ml_dtypes, of, of))
        assert_codes(quantize_rows(jnp.asarray(x), FORMAT.of_rows(E4M3)), x)
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, default, **_: default(*operands))
        assert_codes(quantize_rows(jnp.asarray(x), FORMAT.of_rows(E4M3)), x)  # powers of two divide exactly


class TestPolicies:
    POLICY = Policy({"kernel": "mxfp8"}, "f32")

    def test_its_name_is_written_and_read(self):
        assert repr(self.POLICY) == "Policy(params={'kernel': 'mxfp8'}, compute='f32')"
        written = "params:\n  kernel: mxfp8\ncompute: f32\n"
        assert (Policy.loads(written), self.POLICY.dumps()) == (self.POLICY, written)
        with pytest.raises(UnknownDtype, match=r"params: kernel: unknown format 'mxfp9'. The nearest name is 'mxfp8'"):
            Policy({"kernel": "mxfp9"})

    def test_a_mapping_is_stored_planned_kept_and_dequantised(self):
        weight, tree = matrix(2), {"a": {"kernel": jnp.asarray(matrix(2))}}
        stored = self.POLICY.store(tree)
        assert_codes(ScaledArray(stored["a"]["kernel"], stored["a"]["scale_inv"], FORMAT), weight)
        kernel, scales = self.POLICY.explain(tree).rows
        assert (kernel.format, kernel.storage, kernel.bytes) == ("mxfp8", E4M3, 5 * 70)
        assert (scales.storage, scales.shape, scales.bytes) == (E8M0, (5, 3), 15)
        assert self.POLICY.store(stored)["a"]["kernel"] is stored["a"]["kernel"]
        plain = Policy(params={"kernel": "f8_e4m3fn"}, block=(1, 32))
        assert plain.explain(stored).rows[0].change == "kept"
        assert plain.explain(stored).rows[0].format == "mxfp8"
        back = Policy("f32", block=(1, 32)).store(stored)
        np.testing.assert_array_equal(back["a"]["kernel"], wide(weight))

    def test_a_bare_dtype_keeps_it_and_another_block_requantises(self):
        stored = self.POLICY.store({"kernel": jnp.asarray(matrix(3))}, scaled=True)
        assert Policy({"kernel": "f8_e4m3fn"}).explain(stored).rows[0].change == "kept"
        other = Policy({"kernel": {"dtype": "f8_e4m3fn", "block": [128, 128], "scale": "f32"}})
        assert other.explain(stored).rows[0].change == "requantised"
        f8 = Policy({"kernel": "f8_e4m3fn"}).store({"kernel": jnp.asarray(matrix(3))}, scaled=True)
        assert self.POLICY.explain(f8).rows[0].change == "requantised"

    def test_a_plain_pair_of_another_block_is_refused(self):
        stored = Policy({"kernel": "f8_e4m3fn"}).store({"kernel": jnp.asarray(matrix(3))})
        with pytest.raises(perparam.policies.InvalidScale, match=r"in blocks of \(1, 32\), expected \(5, 3\)"):
            self.POLICY.explain(stored)

    def test_flax_modules_are_stored_and_run(self):
        x = jnp.asarray(matrix(4, (3, 70), 0))
        variables = perparam.init(nn.Dense(8), self.POLICY, jax.random.key(0), x)
        drawn = nn.Dense(8).init(jax.random.key(0), x)["params"]["kernel"]
        params = variables["params"]
        assert_codes(ScaledArray(params["kernel"], params["scale_inv"], FORMAT), drawn)
        y = perparam.apply(nn.Dense(8), self.POLICY, variables, x)
        np.testing.assert_allclose(y, np.asarray(x, np.float64) @ wide(drawn), rtol=1e-5, atol=1e-5)  # 70 roundings
        state = perparam.init(lambda rngs: nnx.Linear(70, 8, rngs=rngs), self.POLICY, jax.random.key(0))
        assert (state["kernel"].get_metadata()["block"], state["scale_inv"].dtype) == ((1, 32), E8M0)

    def test_it_is_registered_once(self):
        with pytest.raises(InvalidPolicy, match="'mxfp8' is already the name of a format or dtype"):
            perparam.policies.register_format("mxfp8", FORMAT)


def exact(x, weight, both: bool) -> tuple[np.ndarray, np.ndarray]:
    """The product in float64, and a bound of what float32 sums and the result's rounding make of it."""
    x = wide(x) if both else np.asarray(x, np.float64)
    weight = wide(weight)
    return x @ weight.T, (x.shape[1] + 2) * 2.0**-23 * (np.abs(x) @ np.abs(weight).T)


def takers():
    """`(implementation, rows, compute)` of those that take such a call."""
    for rows, compute in itertools.product([1, 40], [None, "mxfp8", "f8_e4m3fn"]):
        call = describe(rows, (24, 96), np.dtype("float32"), FORMAT, compute and perparam.policies.as_format(compute))
        for name, one in IMPLEMENTATIONS.items():
            if not one.needs_check and one.refuses(call) is None:
                # The quick run has each implementation by rows, and in the mode that is this format's own.
                quick = name == ON_CPU or compute == "mxfp8"
                yield pytest.param(name, rows, compute, marks=() if quick else pytest.mark.slow)


class TestMatmuls:
    def test_several_implementations_take_it(self):
        names = {one.values[0] for one in takers()}
        assert names == {ON_CPU, "slabs", "fused reduction", "dot by block", "widen, then dot", "oracle"}

    @pytest.mark.slow
    @pytest.mark.parametrize(("name", "rows", "compute"), list(takers()))
    def test_every_implementation_that_takes_it_is_the_product(self, name, rows, compute):
        x, weight = matrix(5, (rows, 96), 2), matrix(6, (24, 96), 2)
        with matmul_override(name):
            y = perparam.scaled_matmul(x, perparam.quantize(weight, "mxfp8"), compute=compute)
        wanted, bound = exact(x, weight, compute is not None)
        assert (np.abs(y - wanted) <= bound).all()

    def test_a_plain_kernel_is_quantised_on_the_way(self):
        x, weight = matrix(5, (3, 70), 2), matrix(6, (24, 70), 2)
        wanted, bound = exact(x, weight, True)
        (y,) = scaled_matmuls(x, [(weight, None)], compute="mxfp8")
        assert (np.abs(y - wanted) <= bound).all()

    @pytest.mark.parametrize("rows", [1, 512])
    @pytest.mark.parametrize("compute", [None, "mxfp8"])
    def test_hopper_kernels_leave_it_to_xla(self, rows, compute):
        choice = matmul_plan(rows, (256, 256), kernel="mxfp8", compute=compute, target="cuda:9.0")
        assert "hopper" not in choice.implementation
        why = dict(choice.refused)["hopper columns"]
        assert "multiples of 128" in why or "float32 scale for 128 columns" in why

    def test_gradients_of_x_are_those_of_the_weight(self):
        x, weight = jnp.asarray(matrix(5, (3, 70), 0)), matrix(6, (24, 70), 0)
        kernel = perparam.quantize(weight, "mxfp8")
        dx = jax.grad(lambda x: perparam.scaled_matmul(x, kernel).sum())(x)
        np.testing.assert_allclose(dx, np.ones((3, 24)) @ wide(weight), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = fields(quantization_config=None)
    return write(tmp_path_factory.mktemp("mx") / "checkpoint", config, tensors(config))


class TestModels:
    def test_linear_draws_stores_and_multiplies(self):
        policy = Policy({"kernel": "mxfp8"}, {"kernel": "mxfp8", "default": "f32"})
        layer, plain = (Linear(70, 24, policy=p, rngs=nnx.Rngs(0)) for p in (policy, "f32"))
        weight, x = np.asarray(plain.kernel[...]), matrix(7, (3, 70), 1)
        assert_codes(ScaledArray(layer.kernel[...], layer.scale_inv[...], FORMAT), weight)
        wanted, bound = exact(x, weight, True)
        assert (np.abs(layer(jnp.asarray(x)) - wanted) <= bound).all()

    @pytest.mark.parametrize(
        "compute", [pytest.param(None, marks=pytest.mark.thorough), pytest.param("mxfp8", marks=pytest.mark.slow)]
    )
    def test_qwen3_quantises_on_load_runs_and_generates(self, folder, compute):
        kernels = "**/*_proj/kernel"
        computed = {kernels: compute, "default": "f32"}
        model = perparam.load_model(folder, {"params": {kernels: "mxfp8"}, "compute": computed})
        found, whole = checkpoints.arrays(model), checkpoints.arrays(perparam.load_model(folder, "f32"))
        path = "layers/1/mlp/down_proj"
        assert_codes(ScaledArray(found[f"{path}/kernel"], found[f"{path}/scale_inv"], FORMAT), whole[f"{path}/kernel"])
        rounded = model.with_policy("f32")  # the same weights, computed in float32
        exact, y = checkpoints.logits(rounded, IDS), checkpoints.logits(model, IDS)
        bound = 1e-5 if compute is None else 7 * 2 * 2**0.5 * E4M3_ROUNDING  # two layers of seven rounded activations
        assert checkpoints.relative_error(y, exact) <= bound
        assert (checkpoints.relative_error(y, exact) > 1e-3) == (compute is not None)
        assert perparam.generate(model, IDS, max_new_tokens=3).shape == (2, 3)
