"""mxfp8 on Blackwell: which calls cuDNN's block-scaled product computes, with which operands, and in which programs."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest
from jax import export

from perparam.policies import ScaledArray, as_format, matmul_override, matmul_plan, scaled_matmul
from perparam.policies.matmul import blackwell, trials
from perparam.policies.matmul.dispatch import IMPLEMENTATIONS, Target, candidates, describe

NAME = "cudnn block scaled"
MXFP8 = as_format("mxfp8")
BLACKWELL = ["cuda:10.0", "cuda:10.3", "cuda:12.0", "cuda:12.1"]
OTHERS = ["cuda", "cuda:8.0", "cuda:8.9", "cuda:9.0", "rocm", "tpu", "cpu"]

plan = functools.partial(matmul_plan, kernel="mxfp8", compute="mxfp8", target="cuda:10.0")


def call(rows=64, shape=(256, 384), x="bfloat16", result=None):
    return describe(rows, shape, np.dtype(jnp.dtype(x)), MXFP8, MXFP8, result and np.dtype(result))


def shapes(rows=64, shape=(256, 384)):
    """The shapes of x and of a kernel in mxfp8."""
    scales = jax.ShapeDtypeStruct((shape[0], shape[1] // 32), jnp.float8_e8m0fnu)
    values = jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn)
    return jax.ShapeDtypeStruct((rows, shape[1]), jnp.bfloat16), ScaledArray(values, scales, MXFP8)


def documented(lhs, rhs, lhs_scales, rhs_scales, preferred_element_type=np.float32):
    """What JAX's documentation says of `jax.nn.scaled_matmul`."""
    assert lhs.dtype == rhs.dtype == jnp.float8_e4m3fn
    assert lhs_scales.dtype == rhs_scales.dtype == jnp.float8_e8m0fnu
    a, b = (
        values.astype(jnp.float32) * jnp.repeat(scales.astype(jnp.float32), 32, axis=-1)
        for values, scales in ((lhs, lhs_scales), (rhs, rhs_scales))
    )
    return jnp.einsum("BMK,BNK->BMN", a, b, precision="highest").astype(preferred_element_type)


class TestChoice:
    @pytest.mark.parametrize("target", BLACKWELL)
    def test_on_blackwell_more_than_a_few_rows_are_cudnns(self, target):
        names = [plan(rows, (256, 384), target=target).implementation for rows in (1, 32, 33, 4096)]
        assert names == ["fused reduction", "dot by block", NAME, NAME]

    @pytest.mark.parametrize("target", OTHERS)
    def test_elsewhere_none_are(self, target):
        assert plan(512, (256, 384), target=target).implementation != NAME
        assert blackwell.BLOCK_SCALED not in candidates(Target.parse(target))

    @pytest.mark.parametrize("compute", [None, "f8_e4m3fn", "bf16"])
    @pytest.mark.parametrize("kernel", ["f8_e4m3fn", "int8", "bf16"])
    def test_other_formats_are_as_on_any_gpu(self, kernel, compute):
        if kernel == "int8" and compute == "f8_e4m3fn":
            pytest.skip("not a product")
        for rows in (1, 16, 512):
            settings = {"kernel": kernel, "compute": compute}
            names = {
                plan(rows, (256, 384), target=target, **settings).implementation for target in ("cuda", *BLACKWELL)
            }
            assert len(names) == 1

    @pytest.mark.parametrize(
        ("settings", "why"),
        [
            ({"kernel": "f8_e4m3fn", "compute": None}, "the kernel is f8_e4m3fn, not mxfp8"),
            ({"compute": None}, "only the kernel is narrow, and mxfp8 is multiplied with mxfp8"),
            ({"compute": "bf16"}, "no operand is narrow in the product"),
            ({"shape": (200, 384)}, "200×384 is no multiple of 128×128"),
            ({"shape": (256, 96)}, "256×96 is no multiple of 128×128"),
            ({"rows": 32}, "its tiles of 128 rows would be mostly empty with 32 rows"),
        ],
    )
    def test_refusals(self, settings, why):
        settings = {"rows": 512, "shape": (256, 384), **settings}
        choice = plan(settings.pop("rows"), settings.pop("shape"), **settings)
        assert dict(choice.refused)[NAME] == why

    def test_of_activations_in_another_format(self):
        other = describe(64, (256, 384), np.dtype(np.float32), MXFP8, as_format("mxfp8"))
        changed = other.__class__(**{**vars(other), "x": as_format("f8_e4m3fn").completed((1, 128))})
        assert blackwell.BLOCK_SCALED.refuses(changed) == (
            "activations are quantised as f8_e4m3fn 1×128, not as mxfp8"
        )  # fmt: skip


class TestProduct:
    """With what JAX documents in place of cuDNN, which this machine does not have."""

    @pytest.mark.parametrize("result", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
    def test_is_that_of_the_oracle(self, monkeypatch, result):
        monkeypatch.setattr(jax.nn, "scaled_matmul", documented)
        monkeypatch.setattr(trials, "LAUNCHES", (((256, 384), (128, 384)),))
        assert trials.of_product(blackwell.BLOCK_SCALED, call(result=result)).compare() is None

    @pytest.mark.slow
    def test_with_wrong_scales_is_refused(self, monkeypatch):
        def swapped(lhs, rhs, lhs_scales, rhs_scales, **settings):
            return documented(lhs, rhs, jnp.flip(lhs_scales, 2), rhs_scales, **settings)

        monkeypatch.setattr(jax.nn, "scaled_matmul", swapped)
        monkeypatch.setattr(trials, "LAUNCHES", (((256, 384), (128, 384)),))
        assert "the product is" in trials.of_product(blackwell.BLOCK_SCALED, call()).compare()

    @pytest.mark.parametrize("rows", [33, 64, 65, 512])
    def test_the_trials_are_calls_that_it_accepts(self, rows):
        for shape in itertools.chain(*trials.LAUNCHES):
            assert blackwell.BLOCK_SCALED.refuses(trials._small(call(rows), shape)) is None


class TestPrograms:
    def lowered(self, run, *operands, **lowering):
        with matmul_override(target="cuda:10.0"):
            traced = jax.jit(run, **lowering).trace(*operands)
            return traced.lower(lowering_platforms=("cuda",)).as_text().count("@__op$block_scaled_dot")

    def test_have_one_call_of_xlas(self):
        assert self.lowered(functools.partial(scaled_matmul, compute="mxfp8"), *shapes()) == 1
        assert self.lowered(functools.partial(scaled_matmul, compute="mxfp8"), *shapes(rows=8)) == 0
        assert self.lowered(scaled_matmul, *shapes()) == 0

    def test_within_shard_map_too(self):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("d",))
        rows, whole = jax.sharding.PartitionSpec("d"), jax.sharding.PartitionSpec()
        product = functools.partial(scaled_matmul, compute="mxfp8")
        assert self.lowered(jax.shard_map(product, mesh=mesh, in_specs=(rows, whole), out_specs=rows), *shapes()) == 1

    @pytest.mark.parametrize("named", [None, NAME])
    @pytest.mark.parametrize("platforms", [["cuda"], ["cpu", "cuda"]])
    def test_that_are_exported_have_none(self, platforms, named):
        """Of which JAX does not promise that a later version reads it."""
        run = jax.jit(lambda *operands: scaled_matmul(*operands, compute="mxfp8"))
        with matmul_override(named, target="cuda:10.0"):
            exported = export.export(run, platforms=platforms)(*shapes())
        assert exported.platforms == tuple(platforms)
        assert "block_scaled_dot" not in exported.mlir_module()

    def test_are_unchecked_without_the_device(self, tmp_path):
        with planted.device(tmp_path) as compared:
            (check,) = plan(512, (256, 384)).checks
            assert (check.kernel, check.state) == (NAME, "unchecked")
            assert self.lowered(functools.partial(scaled_matmul, compute="mxfp8"), *shapes()) == 1
        assert not compared


def test_it_is_an_implementation_like_the_others():
    assert IMPLEMENTATIONS[NAME] is blackwell.BLOCK_SCALED
