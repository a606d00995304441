"""Which implementation is taken for which target, mode and shape, why, and how that is overridden."""

import dataclasses
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bits
from matmuls import FP8, ON_CPU, Case

from perparam.policies import PerparamError, UnknownImplementation, UnknownTarget, UnsupportedCast
from perparam.policies.formats import Format
from perparam.policies.matmul import IMPLEMENTATIONS, Target, cpu, matmul_override, matmul_plan, scaled_matmul
from perparam.policies.matmul.dispatch import candidates
from perparam.policies.native import library
from perparam.policies.targets import here

GENERAL = ["cuda", "cuda:8.0", "cuda:10.0", "rocm", "tpu"]


def plan(case: Case, target="here"):
    return matmul_plan(case.rows, case.shape, x=case.x, kernel=case.kernel, target=target, **case.settings)


@pytest.fixture
def without_library(monkeypatch):
    """As where the native library was not compiled; for plans, not for programs, which JAX keeps."""
    monkeypatch.setattr(library, "unavailable", lambda: "they were not compiled")


class TestPlan:
    @pytest.mark.skipif(library.unavailable() is not None, reason="there is no native library")
    @pytest.mark.parametrize(
        "case",
        [
            *(Case(rows, compute=compute) for rows in (1, 8, 4096) for compute in (None, FP8, "float32")),
            *(Case(1, kernel=kernel) for kernel in ("bfloat16", "float16", "float32", "int8", "float8_e5m2")),
            Case(8, (5, 9), block=(2, 3)),
        ],
        ids=str,
    )
    def test_cpus_use_the_native_library_for_everything(self, case):
        choice = plan(case, "cpu")
        assert (choice.implementation, choice.refused, choice.checks) == ("native", (), ())

    def test_without_the_library_the_plan_says_why(self, without_library):
        assert plan(Case(1), "cpu").refused == (("native", "they were not compiled"),)

    def test_numbers_of_64_bits_are_not_for_the_library(self):
        wide = dataclasses.replace(Case(8, kernel="float32").call, kernel=Format(np.dtype("float64")))
        assert len(IMPLEMENTATIONS["native"].refuses(wide).split()) > 2

    @pytest.mark.usefixtures("without_library")
    @pytest.mark.parametrize("rows", [1, 8, 4096])
    @pytest.mark.parametrize("compute", [None, FP8, "float32"])
    def test_without_it_cpus_widen_narrow_kernels_slab_by_slab(self, rows, compute):
        assert plan(Case(rows, compute=compute), "cpu").implementation == "slabs"

    @pytest.mark.usefixtures("without_library")
    @pytest.mark.parametrize(("has_instructions", "expected"), [(True, "two rows"), (False, "slabs")])
    def test_without_it_cpus_take_a_row_and_a_bfloat16_kernel_as_two_where_they_multiply_bfloat16(
        self, monkeypatch, has_instructions, expected
    ):
        monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: has_instructions)
        assert plan(Case(1, kernel="bfloat16"), "cpu").implementation == expected

    @pytest.mark.usefixtures("without_library")
    @pytest.mark.parametrize(
        ("case", "expected"),
        [
            (Case(8, x="float32", kernel="float32"), "dot"),
            (Case(8, kernel="bfloat16"), "dot"),
            (Case(8, x="float16", kernel="float16"), "slabs"),
            (Case(8, x="float32", kernel="bfloat16"), "slabs"),
            (Case(8, x="float32", kernel="float32", compute=FP8), "slabs"),
        ],
        ids=str,
    )
    def test_without_it_cpus_with_plain_kernels(self, case, expected):
        assert plan(case, "cpu").implementation == expected

    @pytest.mark.parametrize("target", GENERAL)
    @pytest.mark.parametrize("compute", [None, FP8])
    def test_other_devices_go_by_rows(self, target, compute):
        names = [plan(Case(rows, compute=compute), target).implementation for rows in (1, 2, 32, 33, 4096)]
        assert names == ["fused reduction", "dot by block", "dot by block", "widen, then dot", "widen, then dot"]

    @pytest.mark.parametrize("target", [*GENERAL, "cuda:9.0"])
    def test_devices_but_cpus_leave_plain_kernels_to_xla(self, target):
        for kernel in ("bfloat16", "float32"):
            assert plan(Case(8, kernel=kernel), target).implementation == "dot"

    @pytest.mark.parametrize(
        ("case", "expected"),
        [
            (Case(1), "hopper columns"),
            (Case(4096), "hopper columns"),
            (Case(4096, (4096, 128)), "hopper widened"),
            (Case(1, x="float16", kernel="float8_e5m2"), "hopper columns"),
            (Case(64, compute=FP8), "hopper columns"),
            (Case(65, compute=FP8), "hopper rows"),
            (Case(65, x="float32", compute=FP8), "hopper rows"),
            (Case(65, kernel="bfloat16", compute=FP8), "hopper rows"),
            (Case(65, (1024, 4096), compute=FP8), "hopper columns"),
            (Case(384, (1024, 4096), compute=FP8), "hopper columns"),
            (Case(2048, (1024, 4096), compute=FP8), "hopper rows"),
            (Case(128, (4096, 4096), compute=FP8), "hopper columns"),
            (Case(384, (4096, 4096), compute=FP8), "hopper rows"),
            (Case(128, (12288, 4096), compute=FP8), "hopper rows"),
            (Case(1, kernel="int8"), "fused reduction"),
            (Case(8, (256, 320), block=(64, 64)), "dot by block"),
            (Case(8, (256, 300)), "widen, then dot"),
            (Case(8, x="float32"), "dot by block"),
            (Case(8, compute="bfloat16"), "widen, then dot"),
        ],
        ids=str,
    )
    def test_hopper(self, case, expected):
        assert plan(case, "cuda:9.0").implementation == expected

    @pytest.mark.parametrize("target", ["cpu", *GENERAL, "cuda:9.0"])
    @pytest.mark.parametrize(
        "case",
        [
            Case(1),
            Case(8, (5, 9), block=(2, 3)),
            Case(512, compute=FP8),
            Case(8, kernel="bfloat16"),
            Case(8, kernel="int8", compute="float16"),
        ],
        ids=str,
    )
    def test_says_why_each_that_is_preferred_was_passed_over(self, case, target):
        choice = plan(case, target)
        order = [one.name for one in candidates(Target.parse(target))]
        assert [name for name, _ in choice.refused] == order[: order.index(choice.implementation)]
        for name, why in choice.refused:
            assert len(why.split()) > 2
            assert f"not {name}: {why}" in str(choice)
        assert str(choice).startswith(f"{choice.implementation} ({IMPLEMENTATIONS[choice.implementation].gist}")

    def test_reads_short_names_of_dtypes(self):
        choice = matmul_plan(1, (128, 128), x="f16", kernel="f8_e5m2", compute=jnp.float8_e5m2, target="cuda:9.0")
        assert dict(choice.refused)["hopper columns"] == "both operands have to be f8_e4m3fn"


class TestTarget:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("cpu", Target("cpu")),
            ("tpu", Target("tpu")),
            ("rocm", Target("rocm")),
            ("cuda", Target("cuda")),
            ("cuda:9.0", Target("cuda", (9, 0))),
            ("cuda:12.1", Target("cuda", (12, 1))),
        ],
    )
    def test_is_read_and_written_alike(self, text, expected):
        assert Target.parse(text) == expected
        assert str(expected) == text
        assert Target.parse(expected) is expected

    @pytest.mark.parametrize("text", ["gpu", "", "CUDA", "cuda9.0", "sm_90"])
    def test_that_nobody_knows(self, text):
        with pytest.raises(
            UnknownTarget, match=f"'{text}' is not a target. Write here, cpu, tpu, rocm, cuda, or cuda:9"
        ):
            Target.parse(text)

    @pytest.mark.parametrize("text", ["cuda:9", "cuda:hopper", "cuda:9.0.1", "cuda:sm.90"])
    def test_with_a_capability_that_is_none(self, text):
        with pytest.raises(
            ValueError, match=f"'{text}' is not a target. Write the compute capability as in cuda:9.0"
        ) as caught:
            Target.parse(text)
        assert isinstance(caught.value, PerparamError)

    @pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what a CPU is")
    def test_here_is_the_device_that_computes(self):
        assert Target.parse("here") == here() == Target("cpu")
        assert matmul_plan(1, (128, 128)).implementation == ON_CPU

    @pytest.mark.parametrize(
        ("version", "capability", "expected"),
        [("cuda 12.9", "9.0", "cuda:9.0"), ("cuda 12.9", "8.6", "cuda:8.6"), ("ROCm 6.4", "9.4", "rocm")],
    )
    def test_here_is_the_gpu_where_there_is_one(self, monkeypatch, version, capability, expected):
        client = types.SimpleNamespace(platform_version=version)
        device = types.SimpleNamespace(client=client, compute_capability=capability)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "local_devices", lambda: [device])
        assert str(here()) == expected


class TestOverride:
    def test_nests_and_is_undone(self):
        with matmul_override(target="cuda:9.0"):
            assert plan(Case(1)).implementation == "hopper columns"
            with matmul_override("oracle"):
                assert here() == Target("cuda", (9, 0))
                assert plan(Case(1)).implementation == "oracle"
                with matmul_override("widen, then dot", "tpu"):
                    assert (here(), plan(Case(1)).implementation) == (Target("tpu"), "widen, then dot")
                assert plan(Case(1)).implementation == "oracle"
            assert plan(Case(1)).implementation == "hopper columns"
        assert plan(Case(1), "cpu").implementation == ON_CPU

    def test_is_undone_by_an_exception(self):
        before = here()
        with pytest.raises(ZeroDivisionError), matmul_override("oracle", "cuda:9.0"):
            raise ZeroDivisionError
        assert here() == before
        assert plan(Case(1), "cpu").implementation == ON_CPU

    def test_is_that_of_its_thread(self):
        found = []
        with matmul_override("oracle"):
            thread = threading.Thread(target=lambda: found.append(plan(Case(1), "cpu").implementation))
            thread.start()
            thread.join()
        assert found == [ON_CPU]

    def test_an_implementation_that_nobody_knows(self):
        with pytest.raises(UnknownImplementation, match=r"no implementation 'cutlass'. Write one of these: ") as caught:
            matmul_override("cutlass").__enter__()
        assert isinstance(caught.value, KeyError)
        assert all(name in str(caught.value) for name in IMPLEMENTATIONS)

    def test_a_target_that_nobody_knows(self):
        with pytest.raises(UnknownTarget), matmul_override(target="gpu"):
            pass

    @pytest.mark.parametrize("name", ["dot", "hopper rows", "fused reduction"])
    def test_an_implementation_that_cannot_take_the_call(self, name):
        case = Case(8)
        why = IMPLEMENTATIONS[name].refuses(case.call)
        for run in (scaled_matmul, jax.jit(scaled_matmul)):
            with pytest.raises(UnsupportedCast) as caught, matmul_override(name):
                run(*case.operands())
            assert str(caught.value) == (
                f"'{name}', the implementation in matmul_override, does not accept this call: {why}. Use another one."
            )

    def test_a_compiled_function_is_traced_again_within(self):
        case, traced = Case(8), []

        @jax.jit
        def run(x, kernel, scale_inv):
            traced.append(plan(case, "cpu").implementation)
            return scaled_matmul(x, kernel, scale_inv)

        operands = case.operands()
        outside = run(*operands)
        with matmul_override("widen, then dot"):
            inside = run(*operands)
            run(*operands)
        again = run(*operands)
        assert traced == [ON_CPU, "widen, then dot"]
        assert bits(outside) == bits(again)
        assert inside.shape == outside.shape

    def test_loops_over_slabs_are_not_in_the_programs_of_others(self):
        with matmul_override("oracle"):
            assert "while" not in jax.jit(scaled_matmul).lower(*Case(8).operands()).as_text()
        with matmul_override("slabs"):
            assert "while" in jax.jit(scaled_matmul).lower(*Case(8).operands()).as_text()
