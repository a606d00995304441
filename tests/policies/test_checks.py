"""Checks of kernels: when one is made, what is kept of it in memory and on disk, and how they are disabled."""

import functools
import json
import threading

import jax
import planted
import pytest

from perparam.policies import check_records, checks
from perparam.policies.checks import Trial, checking, clauses
from perparam.policies.targets import Target, local_device

RIGHT = Trial("a kernel", "a kind", lambda: None)
WRONG = Trial("a kernel", "a kind", lambda: "the product is nan instead of 1")
check = functools.partial(checks.check, target=planted.HOPPER)


class TestVerdicts:
    def test_of_a_kernel_that_agrees(self, tmp_path):
        with planted.device(tmp_path) as compared:
            for _ in range(3):
                assert clauses([check(RIGHT)]) == ["a kernel checked: it agrees with the reference on this device"]
        assert compared == {("a kernel", "a kind"): 1}

    def test_of_one_that_does_not_with_one_warning(self, tmp_path):
        with planted.device(tmp_path):
            with pytest.warns(RuntimeWarning) as caught:
                first = check(WRONG)
            assert check(WRONG) == first  # without another warning
        assert len(caught) == 1
        assert clauses([first]) == ["a kernel refused: on this device the product is nan instead of 1"]

    def test_the_warning_has_the_remedy(self, tmp_path):
        with planted.device(tmp_path), pytest.warns(RuntimeWarning) as caught:
            check(WRONG)
        text = str(caught[0].message)
        assert text.startswith("the kernel 'a kernel' (a kind) is not used: on this ")
        assert "the product is nan instead of 1. Another implementation replaces it; matmul_plan says which." in text
        assert f"kept in {tmp_path / 'perparam' / 'kernel-checks'}, and" in text
        assert "matmul_override(check=False), or PERPARAM_CHECK_KERNELS=0 in the environment" in text

    def test_an_exception_is_one_that_does_not(self, tmp_path):
        def compare():
            raise NotImplementedError("ptxas exited with code 255\nand a long log")

        with planted.device(tmp_path), pytest.warns(RuntimeWarning):
            found = check(Trial("a kernel", "a kind", compare))
        assert found.why == "on this device it raised NotImplementedError: ptxas exited with code 255"

    def test_and_so_is_a_kernel_that_does_not_return(self, tmp_path, monkeypatch):
        ended = threading.Event()
        monkeypatch.setattr(checks, "LIMIT", 0.05)
        with planted.device(tmp_path), pytest.warns(RuntimeWarning, match="it did not finish in 0 s"):
            assert check(Trial("a kernel", "a kind", ended.wait)).state == "refused"
        ended.set()
        with planted.device(tmp_path):
            assert check(RIGHT).state == "checked"

    def test_a_warning_that_is_an_error_is_raised_once(self, tmp_path):
        with planted.device(tmp_path):
            with pytest.raises(RuntimeWarning):
                check(WRONG)
            assert check(WRONG).state == "refused"

    def test_without_running(self, tmp_path):
        with planted.device(tmp_path) as compared:
            found = check(WRONG, run=False)
            assert (found.state, compared) == ("unchecked", {})
            assert found.why == "its first call on this device compares it with the reference"
            with pytest.warns(RuntimeWarning):
                check(WRONG)
            assert check(WRONG, run=False).state == "refused"
        with planted.device(tmp_path):
            assert check(WRONG, run=False).state == "refused"
            with pytest.warns(RuntimeWarning):
                check(WRONG)

    def test_on_another_machine(self, tmp_path):
        with planted.device(tmp_path) as compared:
            found = checks.check(WRONG, Target("cuda", (12, 0)))
        assert (found.state, found.why) == ("unchecked", "this process has no device cuda:12.0 to compare it on")
        assert not compared


class TestThreads:
    def test_compare_once_and_wait(self, tmp_path):
        found = []
        slow = Trial("a kernel", "a kind", lambda: threading.Event().wait(0.1) or None)
        with planted.device(tmp_path) as compared:
            threads = [threading.Thread(target=lambda: found.append(check(slow))) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert not any(thread.is_alive() for thread in threads)
        assert {one.state for one in found} == {"checked"}
        assert (len(found), list(compared.values())) == (8, [1])

    def test_the_contexts_of_the_caller_do_not_reach_a_check(self, tmp_path):
        def contexts():
            return jax.config.jax_disable_jit, jax.config.jax_transfer_guard_host_to_device, checks._enabled.value

        seen = []
        trial = Trial("a kernel", "a kind", lambda: seen.append(contexts()))
        with planted.device(tmp_path), jax.disable_jit(), jax.transfer_guard("disallow"), checking(True):
            check(trial)
        assert seen == [(False, "allow", None)]

    def test_a_trace_of_the_caller_does_not_reach_it(self, tmp_path):
        seen = []
        compare = Trial("a kernel", "a kind", lambda: seen.append(float(jax.numpy.ones(()) + 1)))
        with planted.device(tmp_path):
            jax.make_jaxpr(lambda x: check(compare) and x)(1.0)
        assert seen == [2.0]


class TestRecords:
    def test_another_process_does_not_compare_again(self, tmp_path):
        for count in (1, 0, 0):
            with planted.device(tmp_path) as compared:
                assert check(RIGHT).state == "checked"
            assert sum(compared.values()) == count

    def test_another_process_refuses_what_was_refused_with_one_warning(self, tmp_path):
        for count in (1, 0):
            with planted.device(tmp_path) as compared:
                with pytest.warns(RuntimeWarning, match="the product is nan instead of 1"):
                    check(WRONG)
                assert check(WRONG).state == "refused"
            assert sum(compared.values()) == count

    def test_another_device_or_kind_compares_again(self, tmp_path):
        with planted.device(tmp_path) as compared:
            for trial in (
                RIGHT,
                Trial("another", "a kind", RIGHT.compare),
                Trial("a kernel", "another", RIGHT.compare),
            ):
                check(trial)
        assert sum(compared.values()) == 3
        with planted.device(tmp_path, identity="another driver") as compared:
            check(RIGHT)
        assert sum(compared.values()) == 1

    @pytest.mark.parametrize(
        "error",
        [
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte"),
            DeprecationWarning("in this process warnings are errors"),
            OSError(28, "No space left on device"),
            NotImplementedError("ptxas exited with code 255"),
        ],
    )
    def test_what_says_little_about_the_kernel_is_not_kept(self, tmp_path, error):
        def compare():
            raise error

        with planted.device(tmp_path), pytest.warns(RuntimeWarning) as caught:
            assert check(Trial("a kernel", "a kind", compare)).state == "refused"
        assert f"it raised {type(error).__name__}: " in str(caught[0].message)
        assert "is kept" not in str(caught[0].message)
        with planted.device(tmp_path) as compared:
            assert check(RIGHT).state == "checked"
        assert sum(compared.values()) == 1

    def test_a_fault_of_the_device_is_kept(self, tmp_path):
        def compare():
            raise RuntimeError("INTERNAL: CUDA_ERROR_MISALIGNED_ADDRESS: misaligned address")

        with planted.device(tmp_path), pytest.warns(RuntimeWarning, match="is kept in"):
            check(Trial("a kernel", "a kind", compare))
        with planted.device(tmp_path) as compared, pytest.warns(RuntimeWarning):
            assert check(RIGHT).state == "refused"
        assert not compared

    def test_a_device_that_runs_nothing_any_more_says_nothing_about_the_kernel(self, tmp_path, monkeypatch):
        def broken(*_):
            raise RuntimeError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered")

        with planted.device(tmp_path), monkeypatch.context() as patch:
            patch.setattr(checks.jnp, "zeros", broken)
            with pytest.warns(RuntimeWarning):
                assert check(RIGHT).state == "refused"
        with planted.device(tmp_path):
            assert check(RIGHT).state == "checked"

    @pytest.mark.parametrize(
        "content",
        [b"", b"{}", b"[]", b"null", b'"checked"', b"\xff\xfe", b"[" * 90_000, b'{"difference": null}'],
        ids=lambda content: repr(content[:20]),
    )
    def test_a_record_that_is_none_is_replaced(self, tmp_path, content):
        with planted.device(tmp_path):
            check(RIGHT)
        (path,) = tmp_path.rglob("*.json")
        whole = path.read_bytes()
        path.write_bytes(content)
        with planted.device(tmp_path) as compared:
            assert check(RIGHT).state == "checked"
        assert sum(compared.values()) == 1
        assert path.read_bytes() == whole

    @pytest.mark.parametrize("change", [{"difference": 3}, {"identity": "another"}, {"kind": "another"}])
    def test_a_record_of_something_else_is_none(self, tmp_path, change):
        with planted.device(tmp_path):
            check(RIGHT)
        (path,) = tmp_path.rglob("*.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with planted.device(tmp_path) as compared:
            assert check(RIGHT).state == "checked"
        assert sum(compared.values()) == 1

    def test_a_folder_that_cannot_be_written_is_no_error(self, tmp_path):
        file = tmp_path / "file"
        file.write_text("")
        for _ in range(2):
            with planted.device(file) as compared:
                assert check(RIGHT).state == check(RIGHT).state == "checked"
            assert sum(compared.values()) == 1

    def test_nothing_is_left_of_a_record_that_could_not_be_written(self, tmp_path, monkeypatch):
        def full(*_):
            raise OSError("no space left on device")

        monkeypatch.setattr(check_records.os, "replace", full)
        with planted.device(tmp_path):
            assert check(RIGHT).state == "checked"
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

    def test_the_folder_is_that_of_the_platform(self, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", "/var/caches")
        assert check_records.folder().as_posix() == "/var/caches/perparam/kernel-checks"
        monkeypatch.setenv("HOME", "/home/someone")
        for value in ("", "relative"):
            monkeypatch.setenv("XDG_CACHE_HOME", value)
            assert check_records.folder().as_posix() == "/home/someone/.cache/perparam/kernel-checks"


class TestIdentity:
    def test_has_the_device_the_driver_the_versions_and_the_sources(self, monkeypatch):
        device = jax.devices()[0]
        before = check_records.identity.__wrapped__(device)
        fields = json.loads(before)
        assert (fields["device"], fields["versions"]["jax"]) == (device.device_kind, jax.__version__)
        for name in ("driver", "sources"):
            with monkeypatch.context() as patch:
                patch.setattr(check_records, name, lambda: "another")
                assert check_records.identity.__wrapped__(device) != before
        with monkeypatch.context() as patch:
            patch.setattr(check_records.importlib.metadata, "version", lambda name: "another")
            assert check_records.identity.__wrapped__(device) != before

    def test_the_driver_is_the_kernel_module(self, monkeypatch, tmp_path):
        monkeypatch.setattr(check_records, "_DRIVER", tmp_path / "version")
        assert check_records.driver() is None
        (tmp_path / "version").write_text("580.65.06\n")
        assert check_records.driver() == "580.65.06"


class TestSwitch:
    def test_a_context_and_the_environment_disable_checks(self, tmp_path, monkeypatch):
        with planted.device(tmp_path) as compared:
            with checking(False):
                assert clauses([check(WRONG)]) == ["a kernel unchecked: checks of kernels are disabled"]
                with checking(None):
                    assert check(WRONG).state == "unchecked"
            monkeypatch.setenv("PERPARAM_CHECK_KERNELS", "0")
            assert check(WRONG).state == "unchecked"
            assert not compared
            with checking(True), pytest.warns(RuntimeWarning):
                assert check(WRONG).state == "refused"
            monkeypatch.setenv("PERPARAM_CHECK_KERNELS", "1")
            assert check(WRONG).state == "refused"


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what a CPU has")
def test_a_cpu_has_no_device_of_another_target():
    for text in ("cuda:9.0", "cuda", "tpu", "rocm", "cpu"):
        assert local_device(Target.parse(text)) is None


def test_a_gpu_is_the_device_of_its_capability(monkeypatch):
    class Device:
        compute_capability = "9.0"

    monkeypatch.setattr(jax, "local_devices", lambda backend: [Device] if backend == "cuda" else [])
    assert local_device(Target("cuda", (9, 0))) is Device
    assert local_device(Target("cuda", (8, 0))) is None
