"""`benchmarks/gpu.py`: that nothing stops it, that it reports what failed, and that its checks find wrong kernels."""

import dataclasses
import functools
import json
import pathlib
import re
import subprocess
import sys

import gpu
import gpu_checks
import gpu_page
import jax.numpy as jnp
import numpy as np
import planted
import pytest
import shapes
from interpreter import required
from matmuls import W8A16_ERROR

from perparam.models.decoding import step
from perparam.policies.checks import Trial
from perparam.policies.matmul import IMPLEMENTATIONS, grouped_dispatch, hopper_grouped_kernel
from perparam.policies.matmul.dispatch import candidates
from perparam.policies.matmul.oracle import ORACLE, product
from perparam.policies.targets import HOPPER, Target

MINUTES = 20

FAKE = """
import json, sys, time
names = ["right", "wrong", "crashes", "after the crash", "hangs", "last"]
left = names[names.index(sys.argv[2]) + 1 :] if len(sys.argv) > 2 else names
print(json.dumps({"left": left}), flush=True)
print("a warning that is no JSON", flush=True)
for name in left:
    print(json.dumps({"begins": name}), flush=True)
    if name == "crashes":
        sys.exit("illegal memory access")
    if name == "hangs":
        time.sleep(60)
    print(json.dumps({"name": name, "passed": name != "wrong", "why": "planted"}), flush=True)
"""
"""Checks of which one crashes and one never ends."""


def run_fake(tmp_path, text=FAKE, budget=30.0, patience=1.0):
    file = tmp_path / "fake.py"
    file.write_text(text)
    found = gpu.run_checks([sys.executable, str(file)], budget, patience, dry=True)
    return found, {one["name"]: one["passed"] or one["why"] for one in found["results"]}


def test_checks_go_on_after_one_that_crashes_and_one_that_hangs(tmp_path):
    _, results = run_fake(tmp_path)
    assert list(results) == ["right", "wrong", "crashes", "after the crash", "hangs", "last"]
    assert results["right"] is results["after the crash"] is results["last"] is True
    assert results["wrong"] == "planted"
    assert results["crashes"] == "exit code 1: illegal memory access"
    assert results["hangs"] == "stopped after 1 s without a result"


def test_checks_end_with_their_time(tmp_path):
    found, results = run_fake(tmp_path, budget=1.0, patience=60.0)
    assert results["hangs"] == "no time left"
    assert results["last"] == "not run"
    assert found["seconds"] < 10


def test_checks_that_do_not_start_have_failed(tmp_path):
    _, results = run_fake(tmp_path, "raise SystemExit('no driver')")
    assert results == {"the start of the checks": "exit code 1: no driver"}


def run_part(monkeypatch, tmp_path, text, seconds=20.0):
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    (tmp_path / "script.py").write_text(text)
    return gpu.run_part(gpu.Part("a part", seconds, ("script.py", "--out")), dry=True)


WRITES = "import pathlib, sys, time; (pathlib.Path(sys.argv[-1]) / 'x.json').write_text('[1]'); print('table');"


def test_a_part_reports_its_files_and_its_output(monkeypatch, tmp_path):
    found = run_part(monkeypatch, tmp_path, WRITES)
    assert (found["results"], found["output"], found["failed"]) == ([[1]], "table\n", None)


@pytest.mark.parametrize(
    ("text", "seconds", "why", "results"),
    [
        (WRITES + "sys.exit(3)", 20, "exit code 3", [[1]]),
        (WRITES + "sys.stdout.flush(); time.sleep(60)", 1, "stopped after 1 s", [[1]]),
        ("print('table')", 20, "it wrote no results", []),
    ],
)
def test_a_part_that_fails_says_why_and_keeps_what_it_wrote(monkeypatch, tmp_path, text, seconds, why, results):
    found = run_part(monkeypatch, tmp_path, text, seconds)
    assert (found["failed"], found["results"]) == (why, results)
    assert "table" in found["output"]
    report = {"machine": {"device": "x", "date": "", "versions": {}}, "dry": False, "parts": [found]}
    assert why in gpu_page.page(report)


def test_all_parts_end_in_time():
    budget, parts = gpu.parts(dry=False)
    assert budget + sum(part.seconds for part in parts) < 60 * MINUTES
    for part in parts:  # a case begins before the part's time is over
        if "--seconds" in part.command:
            assert float(part.command[part.command.index("--seconds") + 1]) <= part.seconds - 40
        assert (pathlib.Path(gpu.__file__).parent / part.command[0]).exists()


@pytest.mark.parametrize(
    ("device", "why"),
    [
        ({"device": "EPYC", "platform": "cpu", "capability": None}, "JAX's default device is a cpu"),
        ({"device": "A100", "platform": "gpu", "capability": "8.0"}, "A100 has compute capability 8.0, not 9.0"),
    ],
)
def test_without_a_hopper_gpu_it_refuses(monkeypatch, capsys, device, why):
    monkeypatch.setattr(gpu, "DEVICE", f"import json; print(json.dumps({device}))")
    with pytest.raises(SystemExit) as caught:
        gpu.describe(dry=False)
    assert caught.value.code == 2
    assert f"needs a Hopper GPU (H100, H200): {why}. Run it on" in capsys.readouterr().err


def test_a_hopper_gpu_is_taken(monkeypatch):
    device = {"device": "NVIDIA H100", "platform": "gpu", "capability": "9.0"}
    monkeypatch.setattr(gpu, "DEVICE", f"import json; print('a warning'); print(json.dumps({device}))")
    assert gpu.describe(dry=False) == device


@pytest.mark.parametrize("dry", [False, True])
def test_every_kernel_has_a_check(dry):
    checks = list(gpu_checks.dry_checks() if dry else gpu_checks.checks())
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)
    kinds = {name.split(":")[0] for name in names}
    hopper = candidates(Target("cuda", HOPPER))
    grouped = grouped_dispatch.candidates(Target("cuda", HOPPER))
    assert kinds >= {one.name for one in (*hopper, *grouped) if one.opaque} | {"hopper quantize"}


@functools.cache
def results(narrow):
    """What a check of the oracle finds."""
    return list(gpu_checks.products("oracle", 5, (128,), 1024, narrow).run())


def changed(change, narrow):
    """The result of a check that finds a changed product."""
    return gpu_checks.judged(
        gpu_checks.Check("x", lambda: ((change(jnp.asarray(y)), *rest) for y, *rest in results(narrow))), 2
    )


MODES = pytest.mark.parametrize("narrow", [False, True], ids=["W8A16", "W8A8"])
CHANGES = {
    "one element": lambda y: y.at[3, 7].multiply(1.5),
    "NaN": lambda y: y.at[3, 7].set(jnp.nan),
    "a row": lambda y: y.at[1].set(y[0]),
    "a transposed tile": lambda y: y.at[:, :5].set(y[:, :5].T),
    "zeros": jnp.zeros_like,
}


@MODES
def test_a_right_product_passes(narrow):
    result = changed(lambda y: y, narrow)
    assert result["passed"]
    assert 0 < result["of bound"] <= 1
    assert 0 < result["error"] < W8A16_ERROR


@MODES
@pytest.mark.parametrize("change", CHANGES)
def test_a_wrong_product_fails(change, narrow):
    result = changed(CHANGES[change], narrow)
    assert not result["passed"]
    assert re.search(r"\d+ of 640 elements outside the bound, the first at \(\d, \d+\): found ", result["why"])


@pytest.mark.slow
@MODES
def test_a_kernel_that_leaves_out_a_step_fails(monkeypatch, narrow):
    """Of 32, as many as a real check has."""

    def without_a_step(call, operands):
        kernel = operands.kernel
        values = kernel.values.astype(jnp.float32).at[:, 128:256].set(0).astype(kernel.values.dtype)
        return product(call, dataclasses.replace(operands, kernel=dataclasses.replace(kernel, values=values)))

    def run(calls, operands):
        return tuple(without_a_step(*pair) for pair in zip(calls, operands, strict=True))

    monkeypatch.setitem(IMPLEMENTATIONS, "planted", dataclasses.replace(ORACLE, name="planted", run=run))
    assert not gpu_checks.judged(gpu_checks.products("planted", 8, (128,), 4096, narrow), 1)["passed"]


@pytest.mark.parametrize("off", [0, 1])
@pytest.mark.parametrize("narrow", [False, True])
def test_products_with_the_kernels_of_other_groups_fail(monkeypatch, narrow, off):
    def products(x, x_scales, tiles, *rest, **options):
        tiles = dataclasses.replace(tiles, groups=tiles.groups + off)
        return planted.grouped(x, x_scales, tiles, *rest, **options)

    monkeypatch.setattr(hopper_grouped_kernel, "products", products)
    check = gpu_checks.grouped((0, 3, 2, 0, 12), (128,), 256, narrow)
    assert gpu_checks.judged(check, 1)["passed"] is (off == 0)


def test_each_trial_of_a_kernel_is_a_check():
    names = [check.name for check in gpu_checks.trials_of_kernels()]
    assert {re.match("trial: (.*?),", name)[1] for name in names} == {
        "hopper columns", "hopper rows", "hopper quantisation", "hopper widened",
        "hopper grouped", "hopper norm", "hopper gate", "hopper rotation", "hopper attention",
    }  # fmt: skip
    assert set(names) < {check.name for check in gpu_checks.checks()}


@pytest.mark.slow
@pytest.mark.parametrize("planted", [False, True])
def test_a_step_that_differs_from_its_layers_fails(monkeypatch, planted):
    """On a CPU the kernels are not used, and the layers are those of both programs."""
    if planted:
        decode = step.decode
        monkeypatch.setattr(step, "decode", lambda layers, *rest: decode(layers[::-1], *rest))
    found = gpu_checks.judged(gpu_checks.decoding_step(shapes.TINY, "W8A16", 3, 20, 64), 1)
    assert found["passed"] is not planted


@pytest.mark.parametrize("why", [None, "the product is nan instead of 1"])
def test_a_trial_that_fails_is_a_check_that_fails(why):
    check = gpu_checks.trial(Trial("a kernel", "a kind", lambda: why))
    if why is None:
        assert gpu_checks.judged(check, 1)["passed"]
    else:
        with pytest.raises(AssertionError, match=why):  # which `main` writes as the reason
            gpu_checks.judged(check, 1)


def test_results_that_change_fail():
    calls = iter(range(4))

    def run():
        yield np.float32([1, next(calls) * 2**-20]), np.array([1, 0]), np.array([1e-3, 1e-3])

    result = gpu_checks.judged(gpu_checks.Check("races", run), 4)
    assert (result["passed"], result["why"]) == (False, "call 2 returned other bits than the first")


def test_a_result_of_another_shape_fails():
    result = gpu_checks.judged(gpu_checks.Check("x", lambda: iter([(np.ones(2), np.ones(3), np.ones(3))])), 1)
    assert (result["passed"], result["why"]) == (False, "shape (2,), expected (3,)")


@required
@pytest.mark.thorough
def test_a_dry_run_checks_and_measures(tmp_path):
    """All parts but the model, which takes as long to compile as the others together."""
    command = [sys.executable, gpu.__file__, "--dry", "--parts", "checks;matmul;attention", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (file,) = tmp_path.glob("gpu-cpu-*-dry.json")
    report = json.loads(file.read_text())
    assert [check["name"] for check in report["checks"]["results"]] == [one.name for one in gpu_checks.dry_checks()]
    assert all(check["passed"] and 0 < check["of bound"] <= 1 for check in report["checks"]["results"])
    assert [(part["name"], part["failed"]) for part in report["parts"]] == [("matmul", None), ("attention", None)]
    matmul, attention = (part["results"][0] for part in report["parts"])
    assert {one["name"] for one in matmul["cases"][0]["contenders"]} >= {"bf16 dot", "W8A8 slabs", "W8A8 oracle"}
    assert matmul["cases"][0]["failed"] == {}
    assert [case["failed"] for case in attention["cases"]] == [{}, {}]
    page = file.with_suffix(".md").read_text()
    assert "a dry run: it tests the script, not the device" in page
    assert all(f"| {check['name']} | passed |" in page for check in report["checks"]["results"])
    assert all(f"## {part['name']}\n" in page for part in report["parts"])
