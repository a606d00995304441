"""A training run that is killed at any moment continues with the same losses, to the bit."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from helpers import bits

from perparam.examples import resume

DTYPES = {"bfloat16", "bool", "float32", "float8_e4m3fn", "int32", "uint8"}
LINE = re.compile(r"batch (\d+): loss \S+ = (\S+), loss scale (\S+)")
TEMPORARY = ".orbax-checkpoint-tmp"


def leaves(state):
    return {jax.tree_util.keystr(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


@pytest.mark.thorough
def test_a_restored_state_has_every_bit_and_continues_with_the_same_ones(tmp_path):
    graphdef, state = resume.begin()
    assert {str(leaf.dtype) for leaf in leaves(state).values()} == DTYPES

    def trained(state, batches):
        losses = []
        for position in batches:
            state, loss, _ = resume.step(graphdef, state, resume.batch(position))
            losses.append(float(loss))
        return losses, state

    _, state = trained(state, range(7))  # after six the loss scale has grown
    with resume.checkpoints(tmp_path) as manager:
        resume.save(manager, state)
    before = {path: (leaf.dtype, bits(leaf)) for path, leaf in leaves(state).items()}
    expected, last = trained(state, range(7, 9))

    _, fresh = resume.begin()
    with resume.checkpoints(tmp_path) as manager:
        restored = resume.restore(manager, fresh)
    assert {path: (leaf.dtype, bits(leaf)) for path, leaf in leaves(restored).items()} == before
    assert int(restored["position"]) == 7
    found, end = trained(restored, range(7, 9))
    assert found == expected
    assert {path: bits(leaf) for path, leaf in leaves(end).items()} == {
        path: bits(leaf) for path, leaf in leaves(last).items()
    }


def started(folder, cache, steps, devices=1):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
    environment = os.environ | {
        "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    command = [sys.executable, "-m", "perparam.examples.resume", "--folder", folder, "--steps", str(steps)]
    command += ["--every", "2", "--devices", str(devices)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def completed(process):
    """`(first batch, {batch: (loss, loss scale)})` of a run that ends."""
    text, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    return int(re.match(r"starts at batch (\d+)", text).group(1)), losses_in(text)


def losses_in(text):
    return {int(batch): rest for batch, *rest in LINE.findall(text)}


def saving(folder):
    return folder.exists() and any(TEMPORARY in path.name for path in folder.iterdir())


def killed_after(process, lines, seconds):
    """Kills a process `seconds` after it printed so many lines; returns what it had printed."""
    text = "".join(process.stdout.readline() for _ in range(lines))
    assert text.count("\n") == lines
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate()
    return text + rest


def killed_while_saving(process, lines, folder):
    """Kills a process as soon as it writes a checkpoint after so many lines; returns what it had printed."""
    text = "".join(process.stdout.readline() for _ in range(lines))  # what an earlier one left is removed before
    assert text.count("\n") == lines
    while not saving(folder):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate()
    return text + rest


@pytest.mark.thorough
def test_a_run_that_is_killed_at_any_moment_has_the_same_losses(tmp_path):
    steps, folder, cache = 16, tmp_path / "killed", tmp_path / "cache"
    _, whole = completed(started(tmp_path / "whole", cache, steps))
    assert list(whole) == list(range(steps))
    assert len({scale for _, scale in whole.values()}) > 2
    moments, found, during = random.Random(0), {}, 0
    for kill in range(3):
        process = started(folder, cache, steps)
        if kill % 2:
            text = killed_while_saving(process, moments.randint(1, 3), folder)
            during += saving(folder)
        else:
            text = killed_after(process, moments.randint(4, 5), moments.uniform(0, 0.05))
        for batch, rest in losses_in(text).items():
            assert found.setdefault(batch, rest) == rest
    assert during >= 1  # killed before a checkpoint was complete
    start, rest = completed(started(folder, cache, steps))
    assert start > 0
    assert found | rest == whole


@pytest.mark.thorough
def test_on_four_devices_a_run_continues_too(tmp_path):
    whole = completed(started(tmp_path / "whole", tmp_path / "cache", 6, devices=4))[1]
    completed(started(tmp_path / "half", tmp_path / "cache", 4, devices=4))
    start, rest = completed(started(tmp_path / "half", tmp_path / "cache", 6, devices=4))
    assert start == 4
    assert rest == {batch: line for batch, line in whole.items() if batch >= 4}


def test_batches_depend_on_the_position_alone():
    np.testing.assert_array_equal(resume.batch(3), resume.batch(3))
    assert not np.array_equal(resume.batch(3), resume.batch(4))
