"""Kernels are compared with the reference before their first use on a device: only right ones are used."""

import functools
import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest
from interpreter import interpreted, required
from jax import export
from matmuls import FP8, Case

from perparam.policies import as_format
from perparam.policies.matmul import (
    Target,
    hopper,
    hopper_columns,
    hopper_costs,
    hopper_quantize,
    hopper_rows,
    matmul_override,
    matmul_plan,
    scaled_matmul,
    scaled_matmuls,
    trials,
    warpgroup,
)
from perparam.policies.matmul.dispatch import IMPLEMENTATIONS, choose, describe
from perparam.policies.scaled_array import quantize_rows

W8A16, W8A8, PREFILL = Case(1), Case(1, compute=FP8), Case(129, compute=FP8)


def slow_but(values, *quick):
    """Parameters that are left out of the quick run, but for a few."""
    return [pytest.param(each, id=str(each), marks=() if each in quick else pytest.mark.slow) for each in values]


def device_of_the_kernels(folder):
    """A process with a device that has the kernels themselves."""
    return planted.device(folder, hopper_columns.products, hopper_rows.product, hopper_quantize.quantize)


def chosen(case: Case, **settings):
    """The name of the implementation, and the state of each kernel that was considered."""
    implementation, choice = choose(case.call, planted.HOPPER, np.dtype(jnp.dtype(case.x)), **settings)
    assert implementation.name == choice.implementation
    return choice.implementation, {check.kernel: check.state for check in choice.checks}


class TestVerdicts:
    @pytest.mark.parametrize(
        ("case", "expected"),
        [
            pytest.param(W8A16, {"hopper columns": "checked"}, id="W8A16"),
            pytest.param(
                Case(8, x="float16", kernel="float8_e5m2"),
                {"hopper columns": "checked"},
                id="W8A16 of e5m2",
                marks=pytest.mark.slow,
            ),
            pytest.param(W8A8, {"hopper columns": "checked"}, id="W8A8", marks=pytest.mark.slow),
            pytest.param(
                PREFILL,
                {"hopper rows": "checked", "hopper quantisation": "checked"},
                id="prefill",
                marks=pytest.mark.slow,
            ),
        ],
    )
    def test_a_right_kernel_is_used(self, tmp_path, case, expected):
        with planted.device(tmp_path) as compared:
            assert chosen(case) == (next(iter(expected)), expected)
        assert set(compared.values()) == {1}

    @pytest.mark.parametrize(
        ("wrong", "case"),
        [
            *[
                pytest.param(wrong, W8A16, id=wrong, marks=() if wrong == "one wrong element" else pytest.mark.slow)
                for wrong in planted.WRONG
            ],
            *[
                pytest.param(wrong, W8A8, id=f"{wrong} in W8A8", marks=pytest.mark.slow)
                for wrong in ("one wrong element", "subnormal numbers flushed")
            ],
        ],
    )
    def test_a_wrong_kernel_is_not(self, tmp_path, wrong, case):
        with planted.device(tmp_path, columns=planted.WRONG[wrong]):
            reason = "it raised NotImplementedError" if wrong == "an exception" else "(the shape of )?the product is "
            with pytest.warns(RuntimeWarning, match=f"the kernel 'hopper columns' .* on this cpu {reason}") as caught:
                assert chosen(case) == ("fused reduction", {"hopper columns": "refused"})
            assert chosen(case) == ("fused reduction", {"hopper columns": "refused"})  # without another warning
        assert len(caught) == 1

    @pytest.mark.slow
    def test_nor_one_that_ignores_the_scales_of_x(self, tmp_path):
        def columns(x, x_scales, *rest, **settings):
            return planted.products(x, None if x_scales is None else jnp.ones_like(x_scales), *rest, **settings)

        with planted.device(tmp_path, columns=columns):
            assert chosen(W8A16)[0] == "hopper columns"
            with pytest.warns(RuntimeWarning, match="W8A8"):
                assert chosen(W8A8)[0] == "fused reduction"

    @pytest.mark.slow
    def test_of_many_rows_the_next_kernel_is_used(self, tmp_path):
        def rows(*operands, **settings):
            return planted.product(*operands, **settings).at[137, -1].set(0)  # of 140 rows

        with planted.device(tmp_path, rows=rows), pytest.warns(RuntimeWarning, match="'hopper rows'.*the product is"):
            assert chosen(PREFILL) == (
                "hopper columns",
                {"hopper rows": "refused", "hopper columns": "checked", "hopper quantisation": "checked"},
            )

    @pytest.mark.slow
    def test_a_kernel_that_is_slower_is_used_if_the_faster_one_is_wrong(self, tmp_path):
        case = Case(130, (256, 4096), compute=FP8)
        assert matmul_plan(130, case.shape, target="cuda:9.0", **case.settings).implementation == "hopper columns"
        with planted.device(tmp_path, columns=planted.WRONG["NaN"]), pytest.warns(RuntimeWarning, match="'hopper col"):
            implementation, choice = choose(case.call, planted.HOPPER)
        assert implementation.name == "hopper rows"
        assert choice.refused[-1] == ("hopper columns", "its check failed")
        assert [(check.kernel, check.state) for check in choice.checks] == [
            ("hopper columns", "refused"), ("hopper rows", "checked"),
        ]  # fmt: skip

    @pytest.mark.parametrize("wrong", slow_but(planted.WRONG_QUANTISATION))
    def test_activations_are_quantised_by_xla_where_the_kernel_is_wrong(self, tmp_path, wrong):
        with planted.device(tmp_path, quantize=planted.WRONG_QUANTISATION[wrong]):
            reason = "it raised NotImplementedError" if wrong == "an exception" else "the (scale|quantised value) is "
            with pytest.warns(RuntimeWarning, match=f"'hopper quantisation' .* on this cpu {reason}"):
                implementation, choice = choose(PREFILL.call, planted.HOPPER, np.dtype(jnp.bfloat16))
            assert [check.state for check in choice.checks] == ["checked", "refused"]
            assert implementation.name == "hopper rows"
            assert implementation.quantizer(PREFILL.call).run is quantize_rows

    def test_each_dtype_and_size_of_a_tile_is_a_kind(self):
        def kinds(*cases):
            return len({trials.of_product(IMPLEMENTATIONS["hopper columns"], case.call) for case in cases})

        assert kinds(*(Case(rows) for rows in (1, 5, 8, 9, 16, 17, 64, 65, 128, 129, 4096))) == 6
        assert kinds(W8A16, W8A8, Case(1, x="float16"), Case(1, kernel="float8_e5m2")) == 4
        assert kinds(W8A16, Case(2), Case(1, (512, 128), block=None), Case(1, block=(256, 384))) == 1

    @pytest.mark.parametrize("rows", [8, 16, 32, 64, 128, trials.MANY_ROWS])
    @pytest.mark.parametrize("processors", [132, 114, 78])
    def test_trials_split_columns_into_single_steps_and_several_and_do_not(self, rows, processors):
        found = []
        for shapes in trials.LAUNCHES:
            outs, (steps,) = [out for out, _ in shapes], {features // 128 for _, features in shapes}
            tile = hopper_costs.row_tile(rows)
            parts = hopper_costs.splits(hopper_costs.tiles_of(rows, outs), steps, tile, processors)
            found.append((parts, steps // parts))
        assert found[0] == ((7, 2) if rows > 128 else (14, 1))
        assert found[1] == (7, 2) or rows > 128
        assert found[2] == (1, 13)
        bf16 = np.dtype(jnp.bfloat16)
        assert hopper_columns.stages(13, tile, bf16, bf16) < 13

    @pytest.mark.parametrize("rows", [5, 125, trials.MANY_ROWS])
    @pytest.mark.parametrize("processors", [132, 114, 78])
    def test_the_last_kernels_are_one_launch_of_columns_and_in_rows_have_blocks_with_several_tiles(
        self, rows, processors
    ):
        outs = [out for out, _ in trials.LAUNCHES[-1]]
        shape = rows, outs, 1664, processors
        assert hopper_costs.shared_cost(*shape, 4) <= hopper_costs.apart_cost(*shape)
        assert hopper_costs.tiles_of(rows, outs[-1:]) > processors or rows < trials.MANY_ROWS

    @pytest.mark.parametrize("name", [name for name, one in IMPLEMENTATIONS.items() if one.needs_check])
    def test_a_kernel_accepts_the_calls_of_its_trials(self, monkeypatch, name):
        monkeypatch.setattr(hopper, "multiprocessors", lambda: 1)  # all of which have a tile
        refuses, mxfp8 = IMPLEMENTATIONS[name].refuses, as_format("mxfp8")
        calls = [Case(rows, compute=compute).call for rows in (1, 9, 65, 129, 300) for compute in (None, FP8)]
        calls += [describe(rows, (256, 384), np.dtype(jnp.bfloat16), mxfp8, mxfp8) for rows in (65, 129)]
        accepted = [call for call in calls if refuses(call) is None]
        assert len(accepted) >= 2
        small = [trials._small(call, shape) for call in accepted for shape in itertools.chain(*trials.LAUNCHES)]
        assert [refuses(call) for call in small] == [None] * len(small)

    @pytest.mark.slow
    def test_the_warning_has_the_numbers(self, tmp_path):
        with planted.device(tmp_path, columns=planted.WRONG["NaN"]), pytest.warns(RuntimeWarning) as caught:
            _, choice = choose(W8A16.call, planted.HOPPER)
        text = str(caught[0].message)
        assert "'hopper columns' (W8A16, x bf16, kernel f8_e4m3fn, result bf16, 5 rows)" in text
        assert "the product is nan instead of" in text
        assert "at (1, 3), and 1 of 1280 elements differ by more than the bound" in text
        assert dict(choice.refused)["hopper columns"] == "its check failed"
        assert "; hopper columns refused: on this device the product is nan instead of" in str(choice)


@pytest.mark.slow
@required
class TestInterpreted:
    """The real kernels, by the interpreter, with what it lacks of a warpgroup right and wrong."""

    @pytest.fixture(autouse=True)
    def patch(self, tmp_path):
        """Changes that end before those of the interpreter, as `monkeypatch` would not: it would restore those."""
        with interpreted(), device_of_the_kernels(tmp_path), pytest.MonkeyPatch.context() as patch:
            patch.setattr(trials, "LAUNCHES", (((128, 128),), ((128, 128), (128, 128))))
            yield patch

    @pytest.mark.parametrize("case", [W8A16, W8A8, PREFILL], ids=["W8A16", "W8A8", "prefill"])
    def test_right_ones_are_used(self, case):
        assert set(chosen(case)[1].values()) == {"checked"}

    def test_one_with_a_wrong_row_in_each_tile_is_not(self, patch):
        real = warpgroup.product

        def product(a, b):
            y = real(a, b)
            return jnp.where(jax.lax.broadcasted_iota(jnp.int32, y.shape, 0) == 7, y * jnp.float32(1.05), y)

        patch.setattr(warpgroup, "product", product)
        with pytest.warns(RuntimeWarning, match="on this cpu the product is "):
            assert chosen(W8A8)[0] == "fused reduction"

    def test_nor_is_one_with_the_rows_of_tiles_in_another_order(self, patch):
        real = warpgroup.product_widened
        swapped = lambda *operands: real(*operands)[::-1]  # noqa: E731
        patch.setattr(warpgroup, "product_widened", swapped)
        with pytest.warns(RuntimeWarning, match="on this cpu the product is "):
            assert chosen(W8A16)[0] == "fused reduction"


class TestSwitch:
    def test_a_context_disables_checks(self, tmp_path):
        unchecked = ("hopper columns", {"hopper columns": "unchecked"})
        with planted.device(tmp_path, columns=planted.WRONG["NaN"]) as compared, matmul_override(check=False):
            assert chosen(W8A16) == unchecked
            with matmul_override(target="cuda:9.0"):
                assert chosen(W8A16) == unchecked
            with matmul_override(check=True), pytest.warns(RuntimeWarning):
                assert chosen(W8A16)[0] == "fused reduction"
        assert sum(compared.values()) == 1

    def test_an_implementation_by_name_is_not_checked(self, tmp_path):
        with planted.device(tmp_path) as compared, matmul_override("hopper columns"):
            assert chosen(W8A16) == ("hopper columns", {"hopper columns": "unchecked"})
        assert not compared

    @pytest.mark.parametrize("target", ["cpu", "cuda", "cuda:8.0", "tpu"])
    def test_other_targets_have_nothing_to_check(self, tmp_path, target):
        with planted.device(tmp_path) as compared:
            assert choose(W8A16.call, Target.parse(target))[1].checks == ()
        assert not compared


class TestPlan:
    def test_runs_nothing(self, tmp_path):
        plan = functools.partial(matmul_plan, 1, (256, 384), target="cuda:9.0")
        with planted.device(tmp_path) as compared:
            (check,) = plan().checks
            assert (check.state, check.why) == (
                "unchecked", "its first call on this device compares it with the reference"
            )  # fmt: skip
            assert not compared
            chosen(W8A16)
            assert [check.state for check in plan().checks] == ["checked"]
        with planted.device(tmp_path) as compared:
            assert [check.state for check in plan().checks] == ["checked"]
        assert not compared

    def test_of_another_machine_is_unchecked(self):
        choice = matmul_plan(512, (256, 384), compute="f8_e4m3fn", target="cuda:9.0")
        assert [check.state for check in choice.checks] == ["unchecked"] * 2
        assert str(choice).endswith(
            "hopper rows and hopper quantisation unchecked: this process has no device cuda:9.0 to compare it on)"
        )


X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 384)), jnp.bfloat16)


def _sum(x, kernel, scale_inv):
    return scaled_matmul(x, kernel, scale_inv).astype(jnp.float32).sum()


def _sharded(x, kernel, scale_inv):
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("d",))
    rows, whole = jax.sharding.PartitionSpec("d"), jax.sharding.PartitionSpec()
    run = jax.shard_map(scaled_matmul, mesh=mesh, in_specs=(rows, whole, whole), out_specs=rows)
    return run(x, kernel, scale_inv)


@pytest.fixture
def quick(monkeypatch):
    """Comparisons of products in microseconds, which need to be outside of all traces."""
    monkeypatch.setattr(trials, "_compare_products", lambda *_: None if float(jnp.sin(0.0)) == 0 else "wrong")


@pytest.mark.usefixtures("quick")
class TestTraces:
    """A check within a trace: neither is part of the other."""

    @pytest.mark.parametrize(
        "run",
        [
            pytest.param(jax.jit(scaled_matmul), id="jit"),
            pytest.param(lambda x, *pair: jax.vmap(lambda x: scaled_matmul(x, *pair))(x[:, None]), id="vmap"),
            pytest.param(jax.grad(_sum), id="grad"),
            pytest.param(_sharded, id="shard_map"),
            pytest.param(jax.jit(_sharded), id="shard_map in jit"),
            pytest.param(lambda *all: jax.eval_shape(lambda *all: scaled_matmul(*all), *all), id="eval_shape"),
            pytest.param(jax.checkpoint(scaled_matmul), id="checkpoint"),
            pytest.param(
                lambda x, *pair: jax.lax.scan(lambda total, x: (total, scaled_matmul(x[None], *pair)), 0, x), id="scan"
            ),
        ],
    )
    def test_is_made_once(self, tmp_path, run):
        with planted.device(tmp_path) as compared, matmul_override(target="cuda:9.0"):
            for _ in range(2):
                jax.make_jaxpr(lambda *operands: run(*operands))(X, *planted.pair())
        assert list(compared.values()) == [1]

    @pytest.mark.slow
    def test_of_a_call_outside_of_traces_is_made_once(self, tmp_path):
        with planted.device(tmp_path) as compared, matmul_override(target="cuda:9.0"):
            for _ in range(2):
                jax.block_until_ready(scaled_matmul(X, *planted.pair()))
        assert list(compared.values()) == [1]

    @pytest.mark.slow
    def test_of_a_program_for_several_platforms_says_the_same(self, tmp_path):
        with planted.device(tmp_path) as compared, matmul_override(target="cuda:9.0"):
            for platforms in (["cuda"], ["cpu", "cuda"]):
                exported = export.export(jax.jit(lambda *all: scaled_matmul(*all)), platforms=platforms)(
                    X, *planted.pair()
                )
                assert exported.platforms == tuple(platforms)
        assert list(compared.values()) == [1]

    def test_a_wrong_kernel_is_in_no_program(self, tmp_path, monkeypatch):
        monkeypatch.setattr(trials, "_compare_products", lambda *_: "it is wrong")
        with planted.device(tmp_path), matmul_override(target="cuda:9.0"):
            with pytest.warns(RuntimeWarning):
                refused = jax.make_jaxpr(lambda *operands: scaled_matmul(*operands))(X, *planted.pair())
            with matmul_override(check=False):
                used = jax.make_jaxpr(lambda *operands: scaled_matmul(*operands))(X, *planted.pair())
        kernels = [str(program).count("perparam_kernel") for program in (refused, used)]
        assert kernels[0] < kernels[1]  # that of CPUs is in both

    @pytest.mark.slow
    def test_several_kernels_of_one_launch(self, tmp_path):
        with planted.device(tmp_path) as compared, matmul_override(target="cuda:9.0"):
            jax.jit(scaled_matmuls)(X, [planted.pair(), planted.pair((128, 384))])
        assert list(compared.values()) == [1]

    @pytest.mark.slow
    def test_threads_that_trace_wait_for_each_other(self, tmp_path):
        failures = []

        def trace(number):
            try:
                with matmul_override(target="cuda:9.0"):
                    x = X[: 1 + number % 2]
                    jax.jit(lambda *operands: scaled_matmul(*operands) * number).lower(x, *planted.pair())
            except BaseException as failure:
                failures.append(failure)

        with planted.device(tmp_path) as compared:
            threads = [threading.Thread(target=trace, args=(number,)) for number in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(120)
            assert not any(thread.is_alive() for thread in threads)
        assert not failures
        assert list(compared.values()) == [1]
