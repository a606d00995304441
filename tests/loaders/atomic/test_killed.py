"""`new_folder`: whoever looks on, and whenever a process is killed, one of two folders is there, whole."""

import os
import signal
import subprocess
import sys
import time

import checkpoints
import pytest
from atomic_folders import LINUX, TESTS, fill, leftovers, texts
from checkpoints import fields, tensors, write
from helpers import bits

from perparam.loaders import atomic, convert_checkpoint

# To those who look on.


@pytest.mark.skipif(not LINUX, reason="Linux exchanges two names")
def test_linux_exchanges_two_folders(tmp_path):
    fill(tmp_path / "one", "first")
    fill(tmp_path / "other", "second")
    if not atomic._exchange(tmp_path / "one", tmp_path / "other"):
        pytest.skip("not on this file system")
    assert set(texts(tmp_path / "one").values()) == {"second"}
    assert set(texts(tmp_path / "other").values()) == {"first"}
    assert not atomic._exchange(tmp_path / "one", tmp_path / "absent")


WATCHER = """
import os, sys
target, absent, mixed, looks = sys.argv[1], 0, 0, 0
print("ready", flush=True)
while not os.path.exists(sys.argv[2]):
    looks += 1
    absent += not os.path.isdir(target)
    try:
        folder = os.open(target, os.O_RDONLY)
    except FileNotFoundError:
        absent += 1
        continue
    # What is opened stays what it was until it is removed: a listing holds all files of one folder.
    names = os.listdir(folder)
    found = set()
    for name in names:
        try:
            file = os.open(name, os.O_RDONLY, dir_fd=folder)
        except FileNotFoundError:
            continue
        found.add(os.read(file, 100))
        os.close(file)
    mixed += len(found) > 1
    os.close(folder)
print(looks, absent, mixed)
"""


@pytest.mark.skipif(not LINUX, reason="Linux exchanges two names")
def test_at_no_moment_is_the_folder_absent(tmp_path):
    (tmp_path / "in").mkdir()
    target, end = tmp_path / "in" / "target", tmp_path / "end"
    fill(target, "start")
    command = [sys.executable, "-S", "-c", WATCHER, str(target), str(end)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout.readline() == "ready\n"
        until = time.monotonic() + 2
        saves = 0
        while time.monotonic() < until:
            fill(target, f"{saves}")
            saves += 1
        end.touch()
        looks, absent, mixed = map(int, watcher.stdout.read().split())
    assert saves > 10
    assert looks > 100
    assert (absent, mixed) == (0, 0)


# Killed.

KILLER = """
import os, pathlib, random, signal, sys, time
from perparam.loaders import atomic, convert_checkpoint

folder, kills, seed, way = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if way == "renamings":
    atomic._exchange = lambda one, other: False
generator, sizes = random.Random(seed), {"a": "5GB", "b": 30_000}
for kill in range(kills):
    ready, told = os.pipe()
    # JAX is imported but not begun, and nothing that is kept needs it: this process has no other thread.
    if (child := os.fork()) == 0:
        try:
            for i in range(10**6):
                source = "ab"[(i + kill) % 2]
                convert_checkpoint(folder / source, folder / "in" / "target", max_shard_size=sizes[source])
                os.write(told, b"x")
        finally:
            os._exit(1)
    os.close(told)
    if kill % 2:
        os.read(ready, 1)
    time.sleep(generator.uniform(0, 0.06))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(ready)
    print(os.waitstatus_to_exitcode(status), flush=True)
    sys.stdin.readline()
"""


def same(found, wanted):
    return found.keys() == wanted.keys() and all(bits(found[name]) == bits(wanted[name]) for name in wanted)


def kill_savers(folder, kills, seed, way):
    """Kills that many savers at random moments; after each the folder holds one of the two models, whole."""
    config = fields(quantization_config=None)
    wanted = {name: tensors(config, seed=ord(name)) for name in "ab"}
    for name, made in wanted.items():
        write(folder / name, config, made)
    target, seen, found_leftovers = folder / "in" / "target", [], 0
    convert_checkpoint(folder / "a", target)
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", KILLER, str(folder), str(kills), str(seed), way]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, **pipes) as killer:
        for _ in range(kills):
            assert killer.stdout.readline() == f"{-signal.SIGKILL}\n"
            found_leftovers += bool(leftovers(target))
            assert sum(".saving-" in name for name in leftovers(target)) <= 1
            if way == "renamings" and not target.exists():
                # The instant between two renamings: both are there, under other names.
                (before,) = target.parent.glob(".target.replaced-*")
                before.rename(target)
            found = checkpoints.read(target)
            seen += [name for name, model in wanted.items() if same(found, model)]
            assert (target / "model.safetensors.index.json").exists() == (seen[-1:] == ["b"])
            assert set(os.listdir(target)) >= {"config.json", "policy.yaml"}
            killer.stdin.write("\n")
            killer.stdin.flush()
    assert len(seen) == kills
    convert_checkpoint(folder / "a", target)
    assert same(checkpoints.read(target), wanted["a"])
    assert not leftovers(target)
    return set(seen), found_leftovers


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize(
    ("kills", "way"),
    [
        pytest.param(60, "exchange", marks=pytest.mark.slow),
        pytest.param(150, "renamings", marks=pytest.mark.thorough),
    ],
)
def test_whenever_a_process_is_killed_one_of_two_models_is_there(tmp_path, kills, way):
    seen, found_leftovers = kill_savers(tmp_path, kills, 1, way)
    assert seen == {"a", "b"}
    assert found_leftovers
