"""The example for several processes generates and saves what one process does, and ends if one of them dies."""

import re
import signal
import sys
import time

import numpy as np
import pytest
from processes import free_port, printed, run_together, started

import perparam
from perparam.examples.make_checkpoint import make_checkpoint

TIMEOUT = 5
"""Seconds after which a process that is not heard of counts as dead."""

PATIENCE = 60
"""Seconds more for a machine that has other work to do."""

pytestmark = pytest.mark.filterwarnings("ignore:blocks of .* do not divide the sides")  # a small model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("multihost") / "checkpoint", "tiny")


def command(checkpoint, saved, timeout=60):
    """That of one process; its number is in the environment."""
    port, place = free_port(), "__import__('os').environ['PROCESS']"
    code = f"import sys; sys.argv += ['--process', {place}]; from perparam.examples.multihost import main; main()"
    return [
        sys.executable, "-c", code, checkpoint, saved, "--coordinator", f"localhost:{port}", "--processes", "2",
        "--timeout", timeout,
    ]  # fmt: skip


@pytest.mark.thorough
def test_two_processes_generate_and_save_what_one_does(checkpoint, tmp_path):
    first, _ = run_together(command(checkpoint, tmp_path / "saved"), 2)
    model = perparam.load_model(checkpoint)
    tokens = np.asarray(perparam.generate(model, [[1, 2, 3, 4]], max_new_tokens=8))
    assert f"tokens {tokens.tolist()}" in first
    perparam.save_model(model, tmp_path / "alone")
    for path in (tmp_path / "alone").iterdir():
        assert (tmp_path / "saved" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("dead", "cause"),
    [
        pytest.param(1, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(0, signal.SIGSTOP, marks=pytest.mark.thorough),
    ],
)
def test_the_others_end_if_one_dies(checkpoint, tmp_path, dead, cause):
    with started(command(checkpoint, tmp_path / "saved", TIMEOUT), 2) as processes:
        other = processes[1 - dead]
        until = time.monotonic() + 2 * PATIENCE
        while not all(re.search(r"holds [\d,]+ bytes", printed(each)) for each in processes):
            assert time.monotonic() < until, printed(other)
            time.sleep(0.05)
        processes[dead].send_signal(cause)
        start = time.monotonic()
        assert other.wait(TIMEOUT + PATIENCE) != 0
        print(f"{time.monotonic() - start:.1f} s")
        assert "JAX distributed service detected fatal errors" in printed(other)
    assert not (tmp_path / "saved").exists()
