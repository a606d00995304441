"""`grouped_matmul`: each group of rows is multiplied with its own kernel, and no other kernel is read.

Tests run with the implementation for this machine, and with the loop, which other names in `matmul_override` choose.
"""

import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from matmuls import FP8, W8A8_ERROR, W8A16_ERROR, assert_product, relative_error

from perparam import quantize
from perparam.policies.errors import UnsupportedCast
from perparam.policies.matmul import grouped_loop, grouped_matmul, matmul_override, scaled_matmul
from perparam.policies.matmul.grouped import grouped_matmuls
from perparam.policies.matmul.grouped_loop import tile_height
from perparam.policies.scaled_array import ScaledArray

OUT, IN, BLOCK = 40, 72, (16, 24)
SIZES = {
    "ragged": (5, 0, 1, 9, 8, 0),
    "one group": (0, 0, 0, 17, 0, 0),
    "a token's experts": (1, 0, 1, 0, 0, 1),
    "equal groups": (4, 4, 4, 4, 4, 4),
    "last group": (0, 0, 0, 0, 0, 1),
    "no rows": (0, 0, 0, 0, 0, 0),
}
QUICK = ("ragged", "a token's experts", "no rows")
GROUPS = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SIZES]
)

GRADIENT_ERROR = 1e-6
"""Sums of up to 72 float32 products in another order: sqrt(72) * 2**-24 = 5e-7."""


@pytest.fixture(params=[None, "oracle"], ids=["here", "loop"])
def either(request):
    """The implementation for this machine, or the loop."""
    with matmul_override(request.param):
        yield


def operands(sizes, dtype="float32", seed=0):
    """`(x, kernel, scaled kernel)`, the last with blocks that do not divide its sides."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(sum(sizes), IN)).astype(jnp.dtype(dtype))
    kernel = random.normal(size=(len(sizes), OUT, IN)).astype(np.float32)
    return x, kernel, quantize(kernel, FP8, BLOCK)


def of_rows(sizes):
    """The group of each row."""
    return np.repeat(np.arange(len(sizes)), sizes)


def exact(x, weight, sizes):
    """The products in float64: each row with its own copy of the weight."""
    return np.einsum("ri,roi->ro", np.asarray(x, np.float64), np.asarray(weight, np.float64)[of_rows(sizes)])


@pytest.mark.usefixtures("either")
@GROUPS
def test_each_row_is_multiplied_with_the_kernel_of_its_group(name):
    sizes = SIZES[name]
    x, kernel, scaled = operands(sizes)
    for one, weight in ((kernel, kernel), (scaled, scaled.dequantize())):
        found, weight = np.asarray(grouped_matmul(x, one, sizes)), np.asarray(weight, np.float64)
        assert found.shape == (sum(sizes), OUT)
        for row, group in enumerate(of_rows(sizes)):
            assert_product(found[row : row + 1], x[row : row + 1].astype(np.float64), weight[group])


@pytest.mark.parametrize(
    ("compute", "bound"), [(None, W8A16_ERROR), ("bf16", W8A16_ERROR * 2), (FP8, W8A8_ERROR)], ids=str
)
def test_every_way_to_compute_is_that_of_scaled_matmul(compute, bound):
    sizes = SIZES["ragged"]
    x, _, scaled = operands(sizes, "bfloat16")
    found = grouped_matmul(x, scaled, sizes, compute=compute)
    assert found.dtype == jnp.bfloat16
    assert relative_error(found, exact(x, scaled.dequantize(), sizes)) <= bound
    start = 0
    for group, size in enumerate(sizes):
        one = ScaledArray(scaled.values[group], scaled.scale_inv[group], scaled.format)
        want = scaled_matmul(x[start : start + size], one, compute=compute, result="f32")
        part = grouped_matmul(x, scaled, sizes, compute=compute, result="f32")[start : start + size]
        np.testing.assert_allclose(part, want, rtol=0, atol=1e-4)  # the same rounded operands, in float32
        start += size


def test_a_bfloat16_kernel_is_rounded_nowhere():
    sizes = SIZES["ragged"]
    x, kernel, _ = operands(sizes, "bfloat16")
    kernel = kernel.astype(jnp.bfloat16)
    assert relative_error(grouped_matmul(x, kernel, sizes), exact(x, kernel, sizes)) <= W8A16_ERROR


@pytest.mark.usefixtures("either")
def test_several_kernels_of_the_same_groups_share_x():
    sizes = SIZES["ragged"]
    x, kernel, scaled = operands(sizes)
    pair = grouped_matmuls(x, [scaled, kernel[:, :13]], sizes)
    assert [y.shape for y in pair] == [(23, OUT), (23, 13)]
    np.testing.assert_array_equal(pair[0], grouped_matmul(x, scaled, sizes))
    assert relative_error(pair[1], exact(x, kernel[:, :13], sizes)) <= GRADIENT_ERROR
    assert grouped_matmuls(x, [], sizes) == ()


def counted(monkeypatch) -> list[int]:
    """The rows of each product that runs from now on."""
    rows: list[int] = []
    product = grouped_loop.scaled_matmuls

    def count(x, *arguments, **settings):
        jax.debug.callback(lambda: rows.append(x.shape[0]))
        return product(x, *arguments, **settings)

    monkeypatch.setattr(grouped_loop, "scaled_matmuls", count)
    jax.clear_caches()
    return rows


def test_the_loop_multiplies_only_with_the_kernels_of_groups_with_rows(monkeypatch):
    rows = counted(monkeypatch)
    groups = 128
    kernel = quantize(np.random.default_rng(0).normal(size=(groups, 8, 24)).astype(np.float32), FP8, (8, 8))
    for used, size in ((8, 1), (128, 1), (3, 40)):  # decoding of a token, 16 tokens with equal use, an uneven prompt
        sizes = np.zeros(groups, np.int32)
        sizes[np.random.default_rng(used).permutation(groups)[:used]] = size
        rows.clear()
        x = np.ones((used * size, 24), np.float32)
        with matmul_override("oracle"):
            grouped_matmul(x, kernel, sizes).block_until_ready()
        jax.effects_barrier()
        height = tile_height(used * size, groups)
        assert rows == [height] * (used * -(-size // height))
    assert tile_height(8, groups) == 1
    jax.clear_caches()


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [("float8", None), ("bfloat16", None)]
    + [pytest.param("float8", each, marks=pytest.mark.slow) for each in ("slabs", "oracle")],
)
def test_no_more_than_one_kernel_is_copied_or_widened(kind, implementation):
    groups, out, features = 64, 96, 128
    random = np.random.default_rng(0)
    kernel = random.normal(size=(groups, out, features)).astype(np.float32)
    one = quantize(kernel, FP8, (32, 32)) if kind == "float8" else jnp.asarray(kernel, jnp.bfloat16)
    x = random.normal(size=(groups, features)).astype(jnp.bfloat16)

    def run(x, one, sizes):
        gradient = jax.grad(lambda x: grouped_matmul(x, one, sizes).astype(jnp.float32).sum())(x)
        return grouped_matmul(x, one, sizes), gradient

    with matmul_override(implementation):
        compiled = jax.jit(run).lower(x, one, np.ones(groups, np.int32)).compile()
    wide = rf"\b(?:{'f32' if kind == 'bfloat16' else 'b?f16|f32'})\[{groups},{out},{features}\]"
    assert not re.search(wide, compiled.as_text())
    temporary, bound = compiled.memory_analysis().temp_size_in_bytes, 4 * (4 * out * features) + 8 * x.nbytes
    assert temporary <= bound < kernel.size  # the bytes of all kernels, if each is one


@pytest.mark.usefixtures("either")
@GROUPS
def test_gradients_are_those_of_the_product_of_each_row(name):
    sizes = SIZES[name]
    x, kernel, scaled = operands(sizes)
    weights = np.random.default_rng(1).normal(size=(sum(sizes), OUT)).astype(np.float32)

    def loss(x, kernel):
        return (grouped_matmul(x, kernel, sizes) * weights).sum()

    def dense(x, kernel):
        return (jnp.einsum("ri,roi->ro", x, kernel[of_rows(sizes)], precision="highest") * weights).sum()

    for found, want in zip(jax.grad(loss, (0, 1))(x, kernel), jax.grad(dense, (0, 1))(x, kernel), strict=True):
        assert found.shape == want.shape
        assert np.abs(found - want).max(initial=0) <= GRADIENT_ERROR * max(np.linalg.norm(want), 1)
    want = jax.grad(dense)(x, scaled.dequantize())
    assert np.abs(jax.grad(loss)(x, scaled) - want).max(initial=0) <= GRADIENT_ERROR * max(np.linalg.norm(want), 1)


@pytest.mark.usefixtures("either")
def test_a_batch_has_groups_of_its_own():
    sizes = np.array([(2, 0, 3), (0, 5, 0)], np.int32)
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 5, IN)).astype(np.float32)
    scaled = quantize(random.normal(size=(3, OUT, IN)).astype(np.float32), FP8, BLOCK)
    found = jax.vmap(lambda x, sizes: grouped_matmul(x, scaled, sizes))(x, sizes)
    want = np.stack([exact(*each) for each in zip(x, [scaled.dequantize()] * 2, sizes, strict=True)])
    assert relative_error(found, want) <= GRADIENT_ERROR


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("sizes", [(2, 0, 4), (9, 0, 7), (-3, 4, 2), (2**31 - 1, 1, 0), (0, 0, 0)], ids=str)
def test_sizes_of_a_traced_program_may_leave_rows_or_end_beyond_them(sizes):
    x, _, scaled = operands((10, 0, 0))
    ends = np.minimum(np.cumsum(np.maximum(sizes, 0)), len(x))
    counts = np.diff(ends, prepend=0)
    found = jax.jit(grouped_matmul)(x, scaled, jnp.array(sizes, jnp.int32))
    want = grouped_matmul(x[: ends[-1]], scaled, counts)
    np.testing.assert_array_equal(found, np.pad(want, ((0, len(x) - ends[-1]), (0, 0))))
    gradient = jax.jit(jax.grad(lambda x: grouped_matmul(x, scaled, jnp.array(sizes, jnp.int32)).sum()))(x)
    assert not gradient[ends[-1] :].any()


def test_it_is_exported_for_any_number_of_rows():
    sizes = SIZES["ragged"]
    x, _, scaled = operands(sizes)
    (rows,) = jax.export.symbolic_shape("rows")
    shapes = jax.ShapeDtypeStruct((rows, IN), x.dtype), jax.ShapeDtypeStruct((len(sizes),), np.int32)
    exported = jax.export.export(jax.jit(lambda x, sizes: grouped_matmul(x, scaled, sizes)))(*shapes)
    found = exported.call(x, np.array(sizes, np.int32))
    assert relative_error(found, exact(x, scaled.dequantize(), sizes)) <= GRADIENT_ERROR


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_it_is_traced_for_other_devices(platform):
    x, _, scaled = operands(SIZES["ragged"], "bfloat16")
    with matmul_override(target="cuda:8.0" if platform == "cuda" else platform):
        traced = jax.jit(grouped_matmul).trace(x, scaled, jnp.asarray(SIZES["ragged"]))
        assert "stablehlo.while" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_operands_that_do_not_match_are_refused():
    x, kernel, scaled = operands(SIZES["ragged"])
    sizes = SIZES["ragged"]
    for arguments, text in (
        ((x, kernel[0], sizes), r"x of shape \(23, 72\) and a kernel of shape \(40, 72\) do not match"),
        ((x[:, 1:], kernel, sizes), r"x of shape \(23, 71\) .* expected \(rows, in\) and \(groups, out, in\)"),
        ((x, scaled.values, sizes), "a kernel of float8_e4m3fn needs scales. Pass a ScaledArray"),
        ((x, kernel, sizes[1:]), r"expected integers of shape \(6,\), one for each kernel, found int32 \(5,\)"),
        ((x, kernel, np.ones(6, np.float32)), r"group_sizes: expected integers of shape \(6,\)"),
        ((x, kernel, (5, 0, 1, 9, 8, 1)), "sum is the 23 rows of x, found .* with the sum 24"),
        ((x, kernel, (5, -1, 2, 9, 8, 0)), r"expected sizes of 0 or more .* found \[5, -1, 2"),
    ):
        with pytest.raises(UnsupportedCast, match=text):
            grouped_matmul(*arguments)
