"""What the kernels for Hopper take, and how they cut it into tiles, splits and stages."""

import dataclasses
import functools
import math
import types

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import dtype
from matmuls import FP8, Case
from shapes import ROWS, SHAPES, linears

from perparam.policies import checks
from perparam.policies.formats import Format
from perparam.policies.matmul import (
    dispatch,
    face,
    hopper,
    hopper_costs,
    hopper_widened,
    matmul_override,
    scaled_matmul,
    warpgroup,
)
from perparam.policies.matmul.dispatch import IMPLEMENTATIONS, matmul_plan
from perparam.policies.matmul.hopper_columns import stages
from perparam.policies.matmul.hopper_costs import TILE, columns_cost, row_tile, rows_cost, splits
from perparam.policies.matmul.hopper_rows import cluster_size
from perparam.policies.targets import MULTIPROCESSORS, here, multiprocessors

PROCESSORS = {"H200": 132, "H100 PCIe": 114, "H20": 78}
"""Streaming multiprocessors of GPUs of compute capability 9.0."""

SHARED_MEMORY = 227 * 1024
"""What a block may have of a multiprocessor's shared memory at compute capability 9.0, in bytes."""


class TestRowTile:
    @pytest.mark.parametrize(
        ("rows", "tile"), [(0, 8), (1, 8), (8, 8), (9, 16), (33, 64), (64, 64), (65, 128), (128, 128), (4096, 128)]
    )
    def test_is_the_least_power_of_two_that_holds_the_rows(self, rows, tile):
        assert row_tile(rows) == tile

    def test_stays_what_it_is_once_rows_are_padded_to_it(self):
        for rows in range(1, 300):
            padded = -(-rows // row_tile(rows)) * row_tile(rows)
            assert row_tile(padded) == row_tile(rows)
            assert padded % row_tile(padded) == 0


def cost(parts: int, tiles: int, steps: int, tile: int, processors: int) -> float:
    """Waves of blocks times the steps of each, four to fill and drain, and the partial sums in bytes of a step."""
    partial = 0 if parts == 1 else 2 * TILE * tile * 4 / (TILE * (TILE + 2 * tile))
    return math.ceil(tiles * parts / processors) * (steps / parts + 4 + partial)


CALLS = [
    (math.ceil(rows / row_tile(rows)) * out // TILE, features // TILE, row_tile(rows), processors)
    for out, features in SHAPES
    for rows in ROWS
    for processors in PROCESSORS.values()
]
"""What `splits` is asked for all real shapes: tiles, steps of each, rows of a tile, multiprocessors."""


class TestSplits:
    def test_divide_the_steps(self):
        for call in CALLS:
            assert call[1] % splits(*call) == 0

    def test_are_never_dearer_than_none(self):
        for call in CALLS:
            assert cost(splits(*call), *call) <= cost(1, *call)

    def test_are_the_cheapest(self):
        for call in CALLS:
            least = min(cost(parts, *call) for parts in range(1, call[1] + 1) if call[1] % parts == 0)
            assert cost(splits(*call), *call) == pytest.approx(least)

    def test_of_a_single_step_or_of_many_waves_there_are_none(self):
        assert splits(8, 1, 8, 132) == 1
        assert splits(100 * 132, 40, 128, 132) == 1

    def test_fill_an_otherwise_idle_device(self):
        assert splits(8, 32, 8, 132) > 1

    def test_differ_among_devices(self):
        assert [splits(48, 32, 8, processors) for processors in PROCESSORS.values()] == [2, 2, 1]


class TestKernel:
    """The choice of the kernel for more than 64 rows in W8A8."""

    @staticmethod
    def plan(rows: int, *outs: int, features: int = 4096):
        return matmul_plan(rows, (outs[0], features), compute=FP8, target="cuda:9.0", beside=outs[1:])

    def test_columns_are_split_where_rows_would_leave_most_of_the_device_idle(self):
        plan = self.plan(128, 1024)
        assert plan.implementation == "hopper columns"
        assert dict(plan.refused)["hopper rows"] == (
            "8 tiles on 132 multiprocessors would take it an estimated 36 steps of 128 columns, and hopper columns 16"
        )
        assert "not hopper rows: 8 tiles on 132 multiprocessors" in str(plan)

    def test_is_the_same_with_a_kernel_between_them_that_refuses_the_call(self, monkeypatch):
        order = hopper.ROWS, hopper.WIDENED, hopper.COLUMNS
        monkeypatch.setattr(dispatch, "candidates", lambda target: order)
        assert self.plan(128, 1024).implementation == "hopper columns"

    def test_goes_by_all_kernels_of_a_call(self):
        gate, up = linears("0.6B")["gate_proj"], linears("0.6B")["up_proj"]
        assert self.plan(256, gate[0], features=gate[1]).implementation == "hopper rows"
        assert self.plan(256, gate[0], up[0], features=gate[1]).implementation == "hopper columns"

    def test_is_that_of_every_kernel_of_a_call(self):
        outs = [linears("8B")[name][0] for name in ("q_proj", "k_proj", "v_proj")]
        for rows in range(65, 4097, 61):
            orders = outs, outs[1:] + outs[:1], outs[2:] + outs[:2]
            assert len({self.plan(rows, *order).implementation for order in orders}) == 1

    def test_goes_by_the_multiprocessors_of_the_device(self, monkeypatch):
        assert self.plan(1000, 1024).implementation == "hopper columns"
        TestMultiprocessors.run_on(monkeypatch, {"core_count": 78})
        monkeypatch.setattr(checks, "local_device", lambda target: None)
        assert self.plan(1000, 1024).implementation == "hopper rows"

    def test_does_not_go_by_those_of_a_device_that_is_not_the_target(self, monkeypatch):
        expected = str(self.plan(128, 1024))
        TestMultiprocessors.run_on(monkeypatch, {"core_count": 148}, "10.0")
        monkeypatch.setattr(checks, "local_device", lambda target: None)
        assert str(self.plan(128, 1024)) == expected

    def test_either_kernel_may_be_named(self):
        case = Case(128, (1024, 4096), compute=FP8)
        for name in ("hopper rows", "hopper columns"):
            with matmul_override(name):
                assert matmul_plan(case.rows, case.shape, **case.settings).implementation == name

    def test_costs_of_all_real_shapes_are_at_least_their_steps(self):
        for out, features in SHAPES:
            for rows in (65, 200, 512, 4096):
                for processors in PROCESSORS.values():
                    least = hopper_costs.tiles_of(rows, [out]) * features / 128 / processors
                    costs = [one(rows, [out], features, processors) for one in (rows_cost, columns_cost)]
                    assert least < min(costs)
                    assert min(costs) <= max(2 * least, features / 128) + 8

    @pytest.mark.parametrize("rows", [1, 8, 64])
    def test_few_rows_are_multiplied_with_all_kernels_in_one_launch(self, rows):
        for model in ("0.6B", "4B", "32B"):
            linear = linears(model)
            for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
                shape = rows, [linear[name][0] for name in names], linear[names[0]][1], 132
                assert hopper_costs.shared_cost(*shape, 2) <= hopper_costs.apart_cost(*shape)


class TestClusterSize:
    @pytest.mark.parametrize("processors", PROCESSORS.values())
    def test_real_prefills_share_the_tiles_of_the_kernel(self, processors):
        for out, _ in SHAPES:
            assert cluster_size((4096 // 128, out // 128), processors) == 2

    @pytest.mark.parametrize(("tiles", "processors"), [((1, 192), 132), ((32, 192), 1)])
    def test_a_block_without_a_partner_shares_nothing(self, tiles, processors):
        assert cluster_size(tiles, processors) == 1

    # 3 × 44 tiles are one for each of 132 processors, while 2 × 44 pairs are more than the 66 clusters.
    def test_not_where_blocks_would_process_more_tiles_than_they_save_bytes(self):
        assert cluster_size((3, 44), 132) == 1
        assert cluster_size((3, 100), 132) == 2  # 4 tiles of three quarters of the bytes instead of 3
        assert cluster_size((2, 66), 133) == 2


class TestMultiprocessors:
    @staticmethod
    def run_on(monkeypatch, cores: dict[str, int], capability: str = "9.0"):
        client = types.SimpleNamespace(platform_version="cuda 12.9")
        device = types.SimpleNamespace(client=client, compute_capability=capability, **cores)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "local_devices", lambda: [device])

    @pytest.mark.parametrize("processors", PROCESSORS.values())
    def test_are_those_of_the_device(self, monkeypatch, processors):
        self.run_on(monkeypatch, {"core_count": processors})
        assert multiprocessors() == processors
        with matmul_override(target="cuda:9.0"):
            assert multiprocessors() == processors

    def test_are_those_of_an_h200_where_they_are_not_known(self, monkeypatch):
        with matmul_override(target="cuda:9.0"):  # on a machine without a GPU
            assert multiprocessors() == MULTIPROCESSORS
        self.run_on(monkeypatch, {})
        assert multiprocessors() == MULTIPROCESSORS
        self.run_on(monkeypatch, {"core_count": 78})
        with matmul_override(target="cuda:8.0"):  # not the device of this process
            assert multiprocessors() == MULTIPROCESSORS

    @pytest.mark.parametrize("kind", ["NVIDIA H20", "NVIDIA H100 PCIe"])
    def test_are_those_of_the_devices_of_a_mesh(self, monkeypatch, kind):
        device = types.SimpleNamespace(device_kind=kind, num_cores=PROCESSORS[kind.removeprefix("NVIDIA ")])
        mesh = types.SimpleNamespace(abstract_device=device)
        monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
        assert multiprocessors() == device.num_cores

    @pytest.mark.parametrize(
        ("kind", "target"), [("NVIDIA GH200 480GB", "cuda:9.0"), ("NVIDIA B200", "cuda:10.0"), ("NVIDIA T4", "cuda")]
    )
    def test_a_mesh_has_the_target_of_its_devices(self, monkeypatch, kind, target):
        mesh = types.SimpleNamespace(abstract_device=types.SimpleNamespace(device_kind=kind, num_cores=1))
        monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
        assert str(here()) == target

    @pytest.mark.parametrize(("rows", "compute"), [(512, FP8), (8, None), (4096, None)])
    @pytest.mark.parametrize("processors", [132, 4])
    def test_bound_the_thread_blocks_of_a_launch(self, monkeypatch, rows, compute, processors):
        monkeypatch.setattr(hopper, "multiprocessors", lambda: processors)
        launches = []
        launch = warpgroup.kernel

        def record(*arguments, **settings):
            launches.append((settings["grid"], settings.get("cluster", ())))
            return launch(*arguments, **settings)

        monkeypatch.setattr(warpgroup, "kernel", record)
        case = Case(rows, (1024, 1024), compute=compute)
        with matmul_override(target="cuda:9.0"):
            jax.jit(functools.partial(scaled_matmul, **case.settings)).trace(*case.operands())
        face._matmuls.clear_cache()
        clusters = {
            (512, 132): (16,), (512, 4): (2,), (8, 132): (8, 1, 8), (8, 4): (8, 1, 1), (4096, 132): (66,),
            (4096, 4): (2,),
        }  # fmt: skip
        assert launches == [(clusters[rows, processors], (2,) if rows > 8 else ())]


class TestStages:
    @pytest.mark.parametrize("tile", [8, 16, 32, 64, 128])
    @pytest.mark.parametrize("x", [FP8, "bfloat16", "float16"])
    @pytest.mark.parametrize("result", ["float32", "bfloat16"])
    def test_fit_into_shared_memory_with_the_result(self, tile, x, result):
        found = stages(100, tile, dtype(x), dtype(result))
        step = TILE * TILE + tile * TILE * dtype(x).itemsize + 4 * tile
        assert found >= 2
        assert found * step + TILE * tile * dtype(result).itemsize < SHARED_MEMORY

    @pytest.mark.parametrize("result", ["float32", "bfloat16"])
    def test_of_many_rows_fit_too(self, result):
        itemsize = dtype(result).itemsize
        step = TILE * TILE + TILE * TILE * dtype("bfloat16").itemsize
        assert hopper_widened.STAGES[itemsize] * step + TILE * TILE * itemsize < SHARED_MEMORY

    def test_are_no_more_than_the_steps(self):
        assert stages(3, 8, dtype("bfloat16"), dtype("float32")) == 3


TAKEN = Case(8, (256, 384))
REFUSALS = {
    "no operand is narrow in the product": Case(8, compute="bfloat16"),
    "there is no kernel for int8": Case(8, kernel="int8"),
    "there is no kernel for f8_e4m3fnuz": Case(8, kernel="float8_e4m3fnuz"),
    "both operands have to be f8_e4m3fn": Case(8, kernel="float8_e5m2", compute=FP8),
    "float32 activations would lose bits": Case(8, x="float32"),
    "200×384 is no multiple of 128×128": Case(8, (200, 384)),
    "256×300 is no multiple of 128×128": Case(8, (256, 300)),
    "sides of the block (64, 128) are no multiples of 128": Case(8, block=(64, 128)),
    "sides of the block (128, 200) are no multiples of 128": Case(8, block=(128, 200)),
    "there are no rows": Case(0),
}


class TestRefusals:
    @pytest.mark.parametrize("name", ["hopper rows", "hopper widened", "hopper columns"])
    @pytest.mark.parametrize("why", REFUSALS)
    def test_of_all_kernels(self, name, why):
        assert IMPLEMENTATIONS[name].refuses(REFUSALS[why].call) == why

    def test_also_of_e5m2_activations(self):
        both = dataclasses.replace(TAKEN, kernel="float8_e5m2", compute="float8_e5m2")
        assert hopper.COLUMNS.refuses(both.call) == "both operands have to be f8_e4m3fn"

    @pytest.mark.parametrize("name", ["hopper rows", "hopper columns"])
    def test_name_a_registered_format(self, name):
        plan = matmul_plan(8, (256, 384), kernel="mxfp8", compute="f8_e4m3fn", target="cuda:9.0")
        why = "activations are quantised as mxfp8, not with a float32 scale for 128 columns"
        assert dict(plan.refused)[name] == why

    def test_spell_out_a_format_without_a_name(self):
        amax = Format(dtype(FP8), (1, 32), dtype("float32"))
        call = dataclasses.replace(dataclasses.replace(TAKEN, compute=FP8).call, x=amax)
        assert "activations are quantised as f8_e4m3fn 1×32, not" in hopper.COLUMNS.refuses(call)

    @pytest.mark.parametrize("shape", [(0, 128), (128, 0)])
    def test_of_kernels_without_elements(self, shape):
        assert "is no multiple of 128×128" in hopper.COLUMNS.refuses(Case(8, shape, block=(128, 128)).call)

    def test_by_rows_of_one_narrow_operand(self):
        case = dataclasses.replace(TAKEN, rows=512)
        assert hopper.ROWS.refuses(case.call) == "a narrow kernel is widened in registers, as the left operand"

    def test_by_rows_of_few_rows(self):
        few, enough = (dataclasses.replace(TAKEN, rows=rows, compute=FP8) for rows in (64, 65))
        assert hopper.ROWS.refuses(few.call) == "its tiles would be mostly empty with 64 rows"
        assert hopper.ROWS.refuses(enough.call) is None

    @pytest.mark.parametrize(
        ("case", "why"),
        [
            (Case(4096, (4096, 4096), compute=FP8), "both operands are narrow"),
            (Case(128, (25600, 128)), "128 rows are one tile, which no thread blocks share"),
            (Case(4096, (384, 128)), "384 is no multiple of 256, the rows of the kernel for a pair of thread blocks"),
            (Case(512, (4096, 128)), "its 128 tiles leave some of 132 multiprocessors idle"),
            (Case(513, (4096, 128)), None),
            (Case(4096, (4096, 128), x="float16", kernel="float8_e5m2"), None),
        ],
    )  # fmt: skip
    def test_by_widened_of_what_it_would_not_make_faster(self, case, why):
        assert hopper.WIDENED.refuses(case.call) == why

    @pytest.mark.parametrize(
        "case",
        [
            TAKEN,
            Case(1, x="float16"),
            Case(1, kernel="float8_e5m2"),
            Case(8, compute=FP8),
            Case(8, x="float32", compute=FP8),
            Case(8, block=None),
            Case(8, block=(1024, 1024)),
            Case(8, block=(100_000, 128)),
            Case(8, kernel="float32", compute=FP8),
        ],
        ids=str,
    )
    def test_columns_takes_the_rest(self, case):
        assert hopper.COLUMNS.refuses(case.call) is None

    def test_every_real_shape_is_taken(self):
        for shape in SHAPES:
            for rows in ROWS:
                assert hopper.COLUMNS.refuses(Case(rows, shape).call) is None
                assert hopper.COLUMNS.refuses(Case(rows, shape, compute=FP8).call) is None
                assert (hopper.ROWS.refuses(Case(rows, shape, compute=FP8).call) is None) == (rows > 64)


def test_the_e4m3_with_infinities_is_another_type():
    assert np.dtype(ml_dtypes.float8_e4m3) != dtype(FP8)
