"""The Hopper kernel for groups of rows: its tiles, its results in the interpreter, and which programs contain it."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest
from helpers import dtype
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import interpreted, required
from jax.sharding import PartitionSpec
from matmuls import FP8, W8A8_ERROR, W8A16_ERROR, relative_error

from perparam import quantize
from perparam.policies.formats import as_format, stored_format
from perparam.policies.matmul import (
    grouped_matmul,
    grouped_trials,
    hopper_grouped,
    hopper_grouped_kernel,
    matmul_override,
)
from perparam.policies.matmul.dispatch import describe
from perparam.policies.matmul.grouped import grouped_matmuls
from perparam.policies.matmul.grouped_calls import GroupedCall
from perparam.policies.matmul.grouped_dispatch import choose, grouped_plan
from perparam.policies.matmul.hopper_grouped_tiles import RowTiles, most_tiles, tile_height


def slow(*values):
    """Parameters that are left out of the quick run."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


KERNEL, F32 = "custom_call @mosaic_gpu", dtype("float32")

tiles_of = jax.jit(RowTiles.of, static_argnums=0)


class TestTiles:
    # Few numbers of rows and groups, each of which compiles another program.
    @given(st.sampled_from([(10, 8), (150, 6)]), st.data())
    @settings(max_examples=60, deadline=None)
    def test_each_row_is_in_one_tile_of_its_group(self, shape, data):
        rows, groups = shape
        cuts = data.draw(st.lists(st.integers(0, rows), min_size=groups, max_size=groups).map(sorted))
        sizes = np.diff(cuts, prepend=0)
        tiles = tiles_of(rows, jnp.asarray(sizes, jnp.int32))
        starts, used, height = np.asarray(tiles.starts) * 8, int(tiles.until[-1]), tiles.height
        assert used <= len(starts) == most_tiles(rows, groups, height)
        taken = max(-(-rows // 8) * 8, height)
        assert ((starts[:used] >= 0) & (starts[:used] <= taken - height)).all()
        assert np.asarray(tiles.inside).sum() == sizes.sum()
        places = np.asarray(tiles.places)[: sizes.sum()]
        assert (places // height < used).all()
        assert (np.asarray(tiles.groups)[places // height] == np.repeat(range(groups), sizes)).all()
        assert (starts[places // height] + places % height == np.arange(len(places))).all()

    def test_a_token_has_a_tile_for_each_of_its_experts(self):
        sizes = np.zeros(128, np.int32)
        sizes[[3, 17, 20, 64, 77, 100, 101, 127]] = 1
        tiles = tiles_of(8, jnp.asarray(sizes))
        assert tiles.height == 8
        assert tiles.groups.tolist() == np.flatnonzero(sizes).tolist()
        assert tiles.starts.tolist() == [0] * 8
        assert tiles.until[-1] == 8

    def test_in_a_prompt_most_experts_have_one_or_two_tiles(self):
        for rows in (512, 8192):
            sizes = np.random.default_rng(rows).multinomial(rows, np.ones(128) / 128)
            used = int(tiles_of(rows, jnp.asarray(sizes, jnp.int32)).until[-1])
            assert used <= 1.5 * np.count_nonzero(sizes)

    def test_sizes_may_leave_rows_or_end_beyond_them(self):
        for sizes in [(2, 0, 4), (9, 0, 7), (-3, 4, 2), (2**31 - 1, 1, 0), (0, 0, 0)]:
            ends = np.minimum(np.cumsum(np.maximum(sizes, 0).astype(np.int64)), 10)
            tiles = tiles_of(10, jnp.asarray(sizes, jnp.int32))
            assert tiles.inside.tolist() == (np.arange(10) < ends[-1]).tolist()
            assert tiles.height == 16
            assert tiles.until[-1] == np.count_nonzero(np.diff(ends, prepend=0))


class TestShares:
    @pytest.mark.parametrize(
        ("outs", "processors"), [((768, 768), 132), ((128, 4096), 3), ((128,) * 4, 4), ((4096, 128), 2)]
    )
    def test_each_kernel_has_thread_blocks(self, outs, processors):
        starts = hopper_grouped_kernel.shares(outs, processors)
        assert starts[0] == 0
        assert starts[-1] == processors
        assert (np.diff(starts) >= 1).all()


def call_of(
    rows=8, shape=(256, 384), groups=16, x="bfloat16", kernel=FP8, block=(128, 128), compute=None
) -> GroupedCall:
    stored = stored_format(dtype(kernel), block, F32) if dtype(kernel).itemsize == 1 else as_format(kernel)
    format = None if compute is None else as_format(compute)
    call = describe(rows, shape, dtype(x), stored, format)
    return GroupedCall(groups, (call,), (stored,), dtype(x), format, planted.HOPPER)


def chosen(call: GroupedCall, target=planted.HOPPER) -> str:
    """The name of the implementation."""
    return choose(call, target)[0].name


class TestChoice:
    @pytest.mark.parametrize("compute", [None, FP8])
    @pytest.mark.parametrize("shape", [(768, 2048), (2048, 768)])
    @pytest.mark.parametrize("rows", [8, 512, 32768])
    def test_the_experts_of_qwen3_have_the_kernel(self, rows, shape, compute):
        call = call_of(rows, shape, 128, compute=compute)
        assert chosen(call) == "hopper grouped"
        assert chosen(call, dataclasses.replace(planted.HOPPER, capability=(8, 0))) == "loop"

    @pytest.mark.parametrize(
        ("call", "why"),
        [
            (call_of(x="float32"), "float32 activations would lose bits"),
            (call_of(shape=(200, 384)), "200×384 is no multiple of 128×128"),
            (call_of(compute="bfloat16"), "no operand is narrow in the product"),
            (call_of(kernel="bfloat16", compute=FP8), "the kernels are not narrow, and all of them would be quantised"),
            (call_of(rows=None), "the number of rows is not known"),
            (call_of(rows=0), "there are no rows"),
        ],
    )
    def test_other_calls_are_a_loop(self, call, why):
        assert hopper_grouped.GROUPED.refuses(call) == why
        assert chosen(call) == "loop"

    @pytest.mark.parametrize(
        ("rows", "compute", "launches"), [(8, None, 1), pytest.param(65, FP8, 2, marks=pytest.mark.slow)]
    )
    def test_several_kernels_are_one_launch(self, rows, compute, launches):
        kernel = jax.eval_shape(lambda: quantize(jnp.zeros((16, 256, 384)), FP8))
        shapes = (
            jax.ShapeDtypeStruct((rows, 384), jnp.bfloat16),
            [kernel, kernel],
            jax.ShapeDtypeStruct((16,), jnp.int32),
        )
        with matmul_override(target="cuda:9.0"):
            run = jax.jit(functools.partial(grouped_matmuls, compute=compute)).trace(*shapes)
            text = run.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count(KERNEL) == launches
        assert "stablehlo.while" not in text
        assert not re.search(r"tensor<16x256x384x(f32|f16|bf16)>", text)

    def test_plans_name_it_or_say_why_not(self):
        stored = stored_format(dtype(FP8), (128, 128), F32)
        plan = functools.partial(grouped_plan, x=dtype("bfloat16"), kernel=stored, compute=None, target=planted.HOPPER)
        assert plan(8, (128, 768, 2048)).implementation == "hopper grouped"
        other = plan(8, (4, 200, 384))
        assert other.implementation == "loop of dot by block"
        assert dict(other.refused)["hopper grouped"] == "200×384 is no multiple of 128×128"

    @pytest.mark.parametrize("transformation", ["shard_map", *slow("grad", "vmap")])
    def test_transformed_products_contain_it(self, transformation):
        kernel = jax.eval_shape(lambda: quantize(jnp.zeros((16, 256, 384)), FP8))
        x, sizes = jax.ShapeDtypeStruct((64, 384), jnp.bfloat16), jax.ShapeDtypeStruct((16,), jnp.int32)
        mesh = jax.make_mesh((1,), ("experts",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
        specs = PartitionSpec(), PartitionSpec("experts"), PartitionSpec("experts")
        function, operands = {
            "shard_map": (
                jax.shard_map(grouped_matmul, mesh=mesh, in_specs=specs, out_specs=specs[1]),
                (x, kernel, sizes),
            ),
            "grad": (jax.value_and_grad(lambda *operands: grouped_matmul(*operands).sum()), (x, kernel, sizes)),
            "vmap": (
                jax.vmap(grouped_matmul, (None, None, 0)),
                (x, kernel, jax.ShapeDtypeStruct((3, 16), jnp.int32)),
            ),
        }[transformation]
        with matmul_override(target="cuda:9.0"):
            text = jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
        kernels = re.findall(rf"{KERNEL}.*?tensor<4096x384xf8E4M3FN>", text)
        assert len(kernels) == 1


@required
@pytest.mark.parametrize(
    ("compute", "bound"), [(None, W8A16_ERROR), pytest.param(FP8, W8A8_ERROR, marks=pytest.mark.slow)]
)
def test_rows_are_multiplied_with_the_kernel_of_their_group(monkeypatch, compute, bound):
    monkeypatch.setattr(hopper_grouped, "multiprocessors", lambda: 3)
    random = np.random.default_rng(0)
    kernel = quantize(random.normal(size=(4, 128, 256)).astype(np.float32), FP8)
    x = jnp.asarray(random.normal(size=(21, 256)), jnp.bfloat16)
    sizes = np.array([2, 0, 13, 4])  # and two rows of no group
    call = dataclasses.replace(call_of(21, (128, 256), 4, compute=compute))
    with interpreted():
        (found,) = hopper_grouped.GROUPED.run(call, x, (kernel,), jnp.asarray(sizes, jnp.int32))
    assert not found[19:].any()
    with matmul_override("oracle"):
        want = grouped_matmul(x[:19], kernel, sizes, compute=compute)
    assert relative_error(found[:19], want) <= bound


def _of_the_next_group(x, x_scales, tiles, *rest, **options):
    return planted.grouped(x, x_scales, dataclasses.replace(tiles, groups=tiles.groups + 1), *rest, **options)


def _scales_of_the_first_group(x, x_scales, tiles, kernels, scales, **options):
    scales = tuple(jnp.broadcast_to(one[:1], one.shape) for one in scales)
    return planted.grouped(x, x_scales, tiles, kernels, scales, **options)


def _last_tile_lost(x, x_scales, tiles, *rest, **options):
    y = planted.grouped(x, x_scales, tiles, *rest, **options)
    return y.at[tiles.until[-1] - 1].set(0)


class TestTrial:
    @pytest.mark.parametrize("compute", [FP8, pytest.param(None, marks=pytest.mark.thorough)])
    def test_a_right_kernel_is_used(self, tmp_path, compute):
        with planted.device(tmp_path, grouped=planted.grouped) as compared:
            assert chosen(call_of(compute=compute)) == "hopper grouped"
            assert chosen(call_of(rows=20, groups=20, compute=compute)) == "hopper grouped"
        assert list(compared.values()) == [1]

    @pytest.mark.parametrize("wrong", [_scales_of_the_first_group, *slow(_of_the_next_group, _last_tile_lost)])
    def test_a_wrong_kernel_is_not(self, tmp_path, wrong):
        with planted.device(tmp_path, grouped=wrong):
            with pytest.warns(RuntimeWarning, match="the kernel 'hopper grouped' .* on this cpu the product is"):
                assert chosen(call_of()) == "loop"
            assert chosen(call_of()) == "loop"  # without another warning

    @pytest.mark.parametrize("height", [8, 16, 32, 64, 128])
    def test_stands_for_calls_with_tiles_of_the_same_height(self, height):
        sizes = grouped_trials.sizes_of(height)
        assert tile_height(sum(sizes), len(sizes)) == height
        assert max(sizes) > height

    # The kernel itself, on the smallest launch of a trial.
    @required
    @pytest.mark.slow
    @pytest.mark.parametrize("compute", [None, FP8])
    @pytest.mark.parametrize("rows", [8, 20 * 16])
    def test_the_kernel_passes(self, monkeypatch, compute, rows):
        monkeypatch.setattr(grouped_trials, "LAUNCHES", grouped_trials.LAUNCHES[:1])
        monkeypatch.setattr(hopper_grouped, "multiprocessors", lambda: 4)
        with interpreted():
            assert hopper_grouped.GROUPED.trial(call_of(rows, compute=compute)).compare() is None
