"""Formats: how rules write them, what they mean for storage and plans, scales of every dtype, and extremes."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import bits, dtype, largest, reference_dequantize, reference_quantize
from hypothesis import given
from hypothesis import strategies as st

import perparam
from perparam import Policy
from perparam.policies import (
    FORMATS,
    Format,
    InvalidPolicy,
    InvalidScale,
    ScaledArray,
    UnknownDtype,
    UnsupportedCast,
    as_format,
    dequantize,
    matmul_override,
    quantize,
    register_format,
    scaled_matmul,
    scaled_matmuls,
)
from perparam.policies.scales import largest_scale

pytestmark = pytest.mark.optimised

F8, E8M0 = "float8_e4m3fn", "float8_e8m0fnu"
F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)


def combined(values, scales, quick_values=None):
    """Every format of values and scales that there is: e4m3 scales are too coarse for int8.

    With `quick_values`, the quick run has all scales with those alone, and float32 scales with all.
    """
    both = [pair for pair in itertools.product(values, scales) if pair[0] != "int8" or "e4m3" not in pair[1]]
    quick = [quick_values is None or value in quick_values or scale == "float32" for value, scale in both]
    marked = [pytest.param(*pair, marks=() if one else pytest.mark.slow) for pair, one in zip(both, quick, strict=True)]
    return pytest.mark.parametrize(("values", "scale"), marked)


NARROW = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e3m4", "int8"]
MAX = np.finfo(np.float32).max
WEIGHT = np.random.default_rng(0).normal(size=(70, 90)).astype(np.float32)
BLOCKED = {"dtype": "f8_e4m3fn", "block": [32, 16], "scale": "bf16"}


class TestWriting:
    @pytest.mark.parametrize(
        ("written", "format"),
        [
            ("bf16", Format(BF16)),
            ("f8_e4m3fn", Format(dtype(F8))),
            ({"dtype": "f8_e4m3fn"}, Format(dtype(F8))),
            (BLOCKED, Format(dtype(F8), (32, 16), BF16)),
            ({"dtype": "int8", "block": (1, -1)}, Format(np.dtype("int8"), (1, -1))),
            ({"dtype": "f8_e5m2", "scale": "f8_e8m0fnu"}, Format(dtype("float8_e5m2"), None, dtype(E8M0))),
            (jnp.float8_e4m3fn, Format(dtype(F8))),
        ],
    )
    def test_a_format_is_a_dtype_or_a_mapping(self, written, format):
        assert as_format(written) == format
        assert as_format(format.plain()) == format

    @pytest.mark.parametrize(
        ("written", "error", "says"),
        [
            (
                {"dtype": "f8_e4m3fn", "blocks": [1, 2]},
                InvalidPolicy,
                "a format has dtype, block and scale, found 'blocks'",
            ),
            ({"block": [1, 2]}, InvalidPolicy, "a format needs a dtype"),
            ({"dtype": "bf16", "block": [1, 2]}, InvalidPolicy, "bf16 has neither block nor scale"),
            ({"dtype": "f8_e4m3fn", "block": [0, 2]}, InvalidPolicy, "expected two positive integers such as"),
            ({"dtype": "f8_e4m3fn", "block": [1, -2]}, InvalidPolicy, "Write -1 for a whole axis"),
            (
                {"dtype": "f8_e4m3fn", "scale": "f8_e5m2"},
                UnknownDtype,
                "scales are f32, bf16, f16, f8_e8m0fnu or f8_e4m3fn",
            ),
            ({"dtype": "f8_e4m3f"}, UnknownDtype, "nearest name is 'f8_e4m3fn'"),
            (
                {"dtype": "mxfp8", "block": [1, 32]},
                InvalidPolicy,
                "'mxfp8' is the name of a format, which includes block and scale. Write only the name",
            ),
        ],
    )
    def test_a_mapping_that_is_none_is_answered_with_the_remedy(self, written, error, says):
        with pytest.raises(error, match=re.escape(says)):
            as_format(written)
        with pytest.raises(error, match="params: kernel: .*" + re.escape(says)):
            Policy({"kernel": written})

    def test_yaml_writes_formats_in_a_line_or_in_several(self):
        text = """\
params:
  a/kernel: {dtype: f8_e4m3fn, block: [32, 16], scale: bf16}
  b/kernel:
    dtype: int8
    block: [1, -1]
  kernel: f8_e5m2
"""
        policy = Policy.loads(text)
        assert policy == Policy(
            {"a/kernel": BLOCKED, "b/kernel": {"dtype": "int8", "block": (1, -1)}, "kernel": "f8_e5m2"}
        )
        assert Policy.loads(policy.dumps()) == policy == eval(repr(policy))
        assert len({policy, Policy.loads(text)}) == 1

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ("kernel: {dtype: f8_e4m3fn, block: [1]}", "p.yaml:3: params: kernel: block: expected two positive"),
            ("kernel: {dtype: f8_e4m3fn, block: 128}", "p.yaml:3: params: kernel: block: expected two positive"),
            (
                "kernel: {dtype: f8_e4m3fn, tile: [1, 2]}",
                "p.yaml:3: kernel: tile: expected the name of a dtype or null",
            ),
            ("kernel: {dtype: f8_e4m3fn, tile: f32}", "p.yaml:3: params: kernel: a format has dtype, block and scale"),
            ("kernel: {dtype: f8_e4m3fn, scale: u8}", "p.yaml:3: params: kernel: scales are f32, bf16, f16"),
            (
                "kernel: {dtype: {dtype: f32}}",
                "p.yaml:3: kernel: dtype: expected the name of a dtype or null, found a map",
            ),
            ("kernel: {dtype: f32, dtype: f32}", "p.yaml:3: 'dtype' is written a second time"),
            ("kernel: {block: [1, 2]}", "p.yaml:3: params: kernel: a format needs a dtype"),
        ],
    )
    def test_errors_have_file_and_line(self, line, says):
        with pytest.raises((InvalidPolicy, UnknownDtype)) as caught:
            Policy.loads(f"params:\n  bias: f32\n  {line}\n", "p.yaml")
        assert says in str(caught.value)

    def test_a_format_of_several_lines_is_located_at_its_rule(self):
        text = "params:\n  kernel:\n    dtype: bf16\n    block: [1, 2]\n"
        with pytest.raises(InvalidPolicy, match=r"^p.yaml:2: params: kernel: bf16 has neither"):
            Policy.loads(text, "p.yaml")

    def test_a_scale_rule_that_contradicts_the_format_is_an_error_that_names_both(self):
        policy = Policy({"kernel": BLOCKED, "scale_inv": "f32"})
        tree = {"a": {"kernel": jnp.asarray(WEIGHT)}}
        for ask in (policy.store, policy.explain, lambda tree: policy.at("a").spec("kernel")):
            with pytest.raises(InvalidPolicy, match=r"'scale_inv' \(params\) requests f32 scales for 'a/kernel'.*bf16"):
                ask(tree)
        assert Policy({"kernel": BLOCKED, "scale_inv": None}).explain(tree).rows[1].storage == BF16

    def test_a_default_cannot_be_a_narrow_format(self):
        with pytest.raises(UnknownDtype, match=r"Name the parameters: \{kernel: mxfp8\}"):
            Policy("mxfp8")


class TestRegistry:
    def test_a_format_with_a_rule_of_its_own_needs_a_name(self):
        format = dataclasses.replace(FORMATS["mxfp8"], block=(1, 64), activations=None)
        with pytest.raises(InvalidPolicy, match="params: kernel: a Format with its own scale rule or"):
            Policy({"kernel": format})

    def test_one_set_of_parts_has_one_name(self):
        with pytest.raises(InvalidPolicy, match="'mxfp8' has the same values, block and scales"):
            register_format("again", Format(dtype(F8), (1, 32), dtype(E8M0)))

    def test_parts_left_open_are_filled_in_without_another_rule(self):
        open_ = Policy({"kernel": {"dtype": "f8_e4m3fn", "scale": "f8_e8m0fnu"}}, block=(1, 32))
        whole = Policy({"kernel": {"dtype": "f8_e4m3fn", "block": [1, 32], "scale": "f8_e8m0fnu"}})
        left, right = (policy.store({"kernel": WEIGHT}) for policy in (open_, whole))
        assert bits(left["scale_inv"]) == bits(right["scale_inv"])

    def test_activations_follow_from_the_parts_of_a_pair(self):
        x, array = np.ones((3, 90), np.float32) * 1.1, quantize(WEIGHT, {"dtype": F8, "block": [1, 32], "scale": E8M0})
        pair = scaled_matmul(x, array.values, array.scale_inv, block=(1, 32), compute="f8_e4m3fn")
        np.testing.assert_array_equal(scaled_matmul(x, array, compute="f8_e4m3fn"), pair)

    @pytest.mark.slow
    def test_several_formats_share_a_call(self):
        arrays = [quantize(np.ones((256, 256), np.float32), of) for of in ("f8_e4m3fn", "mxfp8")]
        x = jnp.ones((128, 256), jnp.bfloat16)
        for order in (arrays, arrays[::-1]):
            for y in scaled_matmuls(x, order, compute="f8_e4m3fn"):
                np.testing.assert_array_equal(np.asarray(y, np.float32), 256)
            with matmul_override(target="cuda:9.0"):
                shapes = jax.eval_shape(lambda x, order=order: scaled_matmuls(x, order, compute="f8_e4m3fn"), x)
            assert [y.shape for y in shapes] == [(128, 256)] * 2

    def test_compute_and_the_cache_take_no_block_that_nothing_reads(self):
        with pytest.raises(InvalidPolicy, match="compute: kernel: a compute format has no block or scale of its own"):
            Policy(compute={"kernel": {"dtype": F8, "block": [1, 32]}})
        with pytest.raises(UnknownDtype, match=r"kv_cache: keys and values cannot be cached as"):
            Policy(kv_cache={"dtype": "int8", "scale": "bf16"})
        with pytest.raises(UnsupportedCast, match="compute is a dtype or a named format"):
            scaled_matmul(np.ones((1, 90), np.float32), WEIGHT, compute={"dtype": F8, "block": [1, 32]})
        with pytest.raises(UnsupportedCast, match="a ScaledArray includes its scales and its block"):
            dequantize(quantize(WEIGHT, F8, (32, 16)), block=(16, 16))

    @pytest.mark.parametrize(
        ("fields", "error"), [(("f8_e4m3fn",), UnknownDtype), ((dtype(F8), (0, 3)), InvalidPolicy)]
    )
    def test_a_format_is_checked_when_it_is_made(self, fields, error):
        with pytest.raises(error):
            Format(*fields)

    def test_a_registered_format_has_a_name_everywhere(self, monkeypatch):
        monkeypatch.setattr("perparam.policies.formats.FORMATS", dict(FORMATS))
        format = register_format("mine", Format(np.dtype("int8"), (1, -1), F32))
        assert (str(format), format.plain(), as_format("mine")) == ("mine", "mine", format)
        policy = Policy({"kernel": "mine"})
        assert repr(policy) == "Policy(params={'kernel': 'mine'})"
        assert Policy.loads(policy.dumps()) == policy
        rows = policy.explain({"kernel": jnp.asarray(WEIGHT)}).rows
        assert (rows[0].format, rows[1].shape) == ("mine", (70, 1))

    @pytest.mark.parametrize("name", ["mxfp8", "bf16"])
    def test_a_name_is_taken_once(self, name):
        with pytest.raises(InvalidPolicy, match="is already the name of a format or dtype"):
            register_format(name, Format(np.dtype("int8"), (1, -1), F32))

    def test_only_whole_formats_have_names(self):
        with pytest.raises(InvalidPolicy, match="needs narrow values, a block and the dtype of its scales"):
            register_format("open", Format(np.dtype("int8"), (1, -1)))


class TestBlocksByRule:
    def test_each_rule_has_its_own_block(self):
        tree = {name: {"kernel": jnp.asarray(WEIGHT)} for name in "abc"}
        policy = Policy(
            {"a/kernel": BLOCKED, "b/kernel": {"dtype": "int8", "block": [-1, 1]}, "kernel": "f8_e4m3fn"},
            block=(64, 64),
        )
        stored = policy.store(tree)
        assert [stored[name]["scale_inv"].shape for name in "abc"] == [(3, 6), (1, 90), (2, 2)]
        assert [row.format for row in policy.explain(tree).rows[::2]] == [
            "f8_e4m3fn 32×16",
            "int8 all×1",
            "f8_e4m3fn 64×64",
        ]
        back = Policy("f32").store(policy.store(tree, scaled=True))  # each knows its own block
        for name, block, scale in (("a", (32, 16), "bfloat16"), ("b", (70, 1), "float32"), ("c", (64, 64), "float32")):
            kernel, scale_inv = reference_quantize(WEIGHT, "int8" if name == "b" else F8, block, scale)
            np.testing.assert_array_equal(back[name]["kernel"], reference_dequantize(kernel, scale_inv, block, F32))

    @pytest.mark.slow
    @pytest.mark.parametrize("block", [(1, -1), (-1, 1), (-1, -1), (8, -1)])
    @pytest.mark.parametrize("shape", [(5, 9), (3, 4, 6), (4, 0), (0, 4)])
    def test_a_whole_axis_is_its_length(self, block, shape):
        weight = np.random.default_rng(1).normal(size=shape).astype(np.float32)
        sides = tuple(max(n, 1) if side == -1 else side for side, n in zip(block, shape[-2:], strict=True))
        kernel, scale_inv = quantize(weight, F8, block)
        wanted = quantize(weight, F8, sides)
        assert (bits(kernel), bits(scale_inv)) == (bits(wanted.values), bits(wanted.scale_inv))
        assert bits(dequantize(kernel, scale_inv, block)) == bits(wanted.dequantize())

    def test_a_named_block_requantises_unless_it_is_the_current_one(self):
        def change(asked, block):
            stored = Policy({"kernel": {"dtype": "f8_e4m3fn", "block": block}}).store({"kernel": WEIGHT}, scaled=True)
            return Policy({"kernel": asked}).explain(stored).rows[0].change

        assert change("f8_e4m3fn", [32, 16]) == "kept"
        assert change({"dtype": "f8_e4m3fn", "block": [32, 16]}, [32, 16]) == "kept"
        assert change({"dtype": "f8_e4m3fn", "block": [16, 16]}, [32, 16]) == "requantised"
        assert change({"dtype": "f8_e4m3fn", "block": [1, -1]}, [1, 90]) == "kept"
        assert change({"dtype": "f8_e4m3fn", "block": [32, 16], "scale": "bf16"}, [32, 16]) == "requantised"
        assert change("mxfp8", [1, 32]) == "requantised"


class TestScales:
    @given(
        scale=st.sampled_from(["f8_e8m0fnu", "f8_e4m3fn"]),
        values=st.sampled_from(["float8_e4m3fn", "float8_e5m2"]),
        seed=st.integers(0, 99),
    )
    def test_coarse_scales_are_rounded_up_so_that_nothing_saturates(self, scale, values, seed):
        random = np.random.default_rng(seed)
        weight = (random.normal(size=(8, 24)) * 2.0 ** random.integers(-6, 6, (8, 1))).astype(np.float32)
        array = quantize(weight, values, (4, 8), scale_dtype=scale)
        scales = np.asarray(array.scale_inv).astype(np.float64)
        amax = np.abs(weight.reshape(2, 4, 3, 8)).max(axis=(1, 3)).astype(np.float64)
        least = 2.0**-6 if scale == "f8_e4m3fn" else 2.0**-126  # the smallest normal number
        exact = np.maximum(amax / largest(dtype(values)), least).astype(np.float32)
        numbers = np.arange(256, dtype=np.uint8).view(array.scale_inv.dtype).astype(np.float64)
        numbers = np.sort(numbers[numbers > 0])
        for found, wanted in zip(scales.flat, exact.flat, strict=True):
            assert found == numbers[np.searchsorted(numbers, wanted)]
        clipped = np.abs(weight) / np.repeat(np.repeat(scales, 4, 0), 8, 1)
        assert (clipped <= largest(dtype(values)) * (1 + 2.0**-23)).all()

    @pytest.mark.parametrize("stray", [np.nan, np.inf])
    @combined(["f8_e4m3fn", "int8"], ["f32", "bf16", "f16", "f8_e8m0fnu", "f8_e4m3fn"])
    def test_a_block_that_is_not_finite_has_no_scale(self, scale, values, stray):
        weight = np.ones((2, 4), np.float32)
        weight[0, 0] = stray
        _, scales = quantize(weight, values, (2, 2), scale_dtype=scale)
        assert np.isfinite(np.asarray(scales).astype(np.float32)).tolist() == [[False, True]]
        with pytest.raises(InvalidScale, match="the weights of a block hold NaN or infinity"):
            Policy({"kernel": {"dtype": values, "block": [2, 2], "scale": scale}}).store({"kernel": weight})

    @combined(["float8_e4m3fn", "int8"], ["f8_e8m0fnu", "f8_e4m3fn"])
    @pytest.mark.parametrize("rows", [3, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (1, 70))])
    def test_products_with_coarse_scales_are_those_of_the_weight(self, values, scale, rows):
        array = quantize(WEIGHT, values, (32, 16), scale_dtype=scale)
        x = np.random.default_rng(2).normal(size=(rows, 90)).astype(np.float32)
        wide = reference_dequantize(array.values, np.asarray(array.scale_inv).astype(np.float32), (32, 16), F32)
        np.testing.assert_array_equal(array.dequantize(), wide)
        y = scaled_matmul(x, array)
        bound = 2.0**-23 * 90 * (np.abs(x).astype(np.float64) @ np.abs(wide).T)  # 90 roundings of a float32 sum
        assert (np.abs(y - x.astype(np.float64) @ wide.T) <= bound).all()


class TestExtremes:
    @pytest.mark.parametrize("x64", [False, True])
    def test_a_float64_beyond_float32_is_clipped_to_it(self, x64):
        weight = np.array([[1e300, -1e300], [1.0, 2.0]])
        with jax.enable_x64(x64):
            array = quantize(weight, "f8_e4m3fn", (1, 2))
        assert (array.values == quantize(np.sign(weight) * MAX, "f8_e4m3fn", (1, 2)).values)[0].all()
        np.testing.assert_allclose(array.dequantize(), np.clip(weight, -MAX, MAX), rtol=2.0**-23)

    @pytest.mark.parametrize("call", [ScaledArray.dequantize, lambda array: scaled_matmul(jnp.ones((1, 4)), array)])
    def test_scales_that_do_not_fit_and_formats_without_a_block_are_refused(self, call):
        array = quantize(jnp.ones((4, 4)), "f8_e4m3fn", (2, 2))
        with pytest.raises(InvalidScale, match=r"scales of shape \(1, 2\) do not fit a kernel of shape \(4, 4\)"):
            call(dataclasses.replace(array, scale_inv=array.scale_inv[:1]))
        with pytest.raises(UnsupportedCast, match=r"the format f8_e4m3fn of a ScaledArray has no block. Make it with"):
            call(dataclasses.replace(array, format=Format(array.dtype)))

    @pytest.mark.slow
    @combined(NARROW, ["float32", "bfloat16", "float16", "float8_e8m0fnu", "float8_e4m3fn"], quick_values=(F8,))
    def test_weights_near_the_largest_float32_never_become_infinite(self, values, scale):
        random = np.random.default_rng(0)
        weight = (MAX * (1 - random.uniform(0, 0.6, (300, 4)) * random.integers(0, 2, (300, 1)))).astype(np.float32)
        weight[0], weight[1] = MAX, np.nextafter(MAX, np.float32(0))
        array = quantize(
            weight * random.choice([-1, 1], weight.shape).astype(np.float32), values, (1, 4), scale_dtype=scale
        )
        assert np.isfinite(np.asarray(array.dequantize())).all()
        if scale == "float32":  # within a step of the values at their largest, and half a step of int8
            np.testing.assert_allclose(np.abs(array.dequantize()), weight, rtol=2.0**-2)

    @pytest.mark.parametrize("values", NARROW)
    def test_scales_are_numpys_division_over_all_magnitudes(self, values):
        random = np.random.default_rng(3)
        weight = np.ldexp(random.uniform(0.5, 1, (20_000, 1)), random.integers(-125, 129, (20_000, 1))).astype(
            np.float32
        )
        weight = np.concatenate([weight, np.ldexp(random.uniform(0.5, 1, (20_000, 1)), 128).astype(np.float32)])
        weight = weight[np.isfinite(weight)][:, None]
        found = np.asarray(quantize(weight, values, (1, 1)).scale_inv)
        wanted = np.maximum(weight / np.float32(largest(dtype(values))), np.float32(2.0**-126))
        np.testing.assert_array_equal(found, np.minimum(wanted, np.float32(largest_scale(dtype(values), F32))))
        assert (found != wanted).sum() <= 2000  # only where the product with the largest value would overflow
        assert (np.abs(found / wanted - 1) <= 2.0**-23).all()

    @combined(NARROW, ["float32", "bfloat16", "float16", "float8_e8m0fnu"])
    def test_the_largest_scale_is_the_last_one_that_does_not_overflow(self, values, scale):
        most = largest_scale(dtype(values), dtype(scale))
        with np.errstate(over="ignore"):
            assert np.isfinite(np.float32(most) * np.float32(largest(dtype(values))))
            code = np.array(most, dtype(scale)).view(f"u{dtype(scale).itemsize}") + 1
            above = code.astype(f"u{dtype(scale).itemsize}").view(dtype(scale)).astype(np.float32)
            assert not np.isfinite(above * np.float32(largest(dtype(values))))


class TestZeroScales:
    """Writers that do not clamp give a block of zeros the scale zero."""

    def pair(self, stray: float = 0.0, scale: float = 0.0):
        kernel, scale_inv = reference_quantize(WEIGHT, F8, (32, 16))
        kernel, scale_inv = np.array(kernel), np.array(scale_inv)
        kernel[32:64, 16:32] = -0.0
        kernel[40, 20] = stray
        scale_inv[1, 1] = scale
        return {"kernel": kernel, "scale_inv": scale_inv}

    @pytest.mark.parametrize("params", [None, "f32", {"kernel": "f8_e4m3fn"}, {"kernel": "int8"}])
    def test_they_are_accepted_where_the_block_is_all_zeros(self, params):
        pair = self.pair()
        stored = Policy(params, block=(32, 16)).store(pair)
        if params is None:
            assert bits(stored["scale_inv"]) == bits(pair["scale_inv"])
        wide = Policy("f32", block=(32, 16)).store(stored)["kernel"]
        assert (np.asarray(wide)[32:64, 16:32] == 0).all()
        assert np.isfinite(wide).all()

    @pytest.mark.parametrize(("stray", "scale"), [(2.0, 0.0), (0.0, -0.0), (0.0, np.nan), (0.0, -1.0)])
    def test_and_refused_elsewhere(self, stray, scale):
        if (stray, scale) == (0.0, -0.0):
            assert Policy(block=(32, 16)).store(self.pair(stray, scale))  # zero, whatever its sign
            return
        with pytest.raises(
            InvalidScale, match=r"scale_inv: scales are positive finite numbers; found .* at block \(1, 1\)"
        ):
            Policy(block=(32, 16)).store(self.pair(stray, scale))


class TestScaledArrays:
    def test_it_is_a_pytree_with_a_static_format(self):
        array = quantize(WEIGHT, BLOCKED)
        leaves, tree = jax.tree.flatten(array)
        assert [leaf.shape for leaf in leaves] == [(70, 90), (3, 6)]
        assert jax.tree.unflatten(tree, leaves).format == array.format == Format(dtype(F8), (32, 16), BF16)
        doubled = jax.jit(lambda a: dataclasses.replace(a, scale_inv=a.scale_inv * 2))(array)
        np.testing.assert_array_equal(doubled.dequantize(), 2 * array.dequantize())

    def test_formats_that_differ_in_their_rule_alone_are_different_programs(self):
        ceiling = quantize(WEIGHT, {"dtype": F8, "block": [1, 32], "scale": E8M0})
        assert bits(ceiling.scale_inv) != bits(quantize(WEIGHT, "mxfp8").scale_inv)

    def test_a_matmul_takes_it_as_its_kernel(self):
        array, x = quantize(WEIGHT, F8, (32, 16)), np.ones((3, 90), np.float32)
        for compute in (None, "f8_e4m3fn", "bf16"):
            wanted = scaled_matmul(x, array.values, array.scale_inv, block=(32, 16), compute=compute)
            np.testing.assert_array_equal(scaled_matmul(x, array, compute=compute), wanted)
        assert isinstance(array, ScaledArray)
        np.testing.assert_array_equal(perparam.dequantize(array), array.dequantize())
