"""`new_folder`: one of two folders is there, whole, whenever a process is killed and whoever looks."""

import contextlib
import errno
import os
import pathlib
import signal
import stat
import subprocess
import sys
import threading
import time

import checkpoints
import pytest
from checkpoints import fields, tensors, write
from helpers import bits

from perparam.loaders import atomic, convert_checkpoint
from perparam.loaders.atomic import new_folder
from perparam.policies.errors import InvalidScale, SaveFailed

TESTS = pathlib.Path(__file__).parent.parent
LINUX = sys.platform == "linux"


def ours(name):
    return name.startswith("file")


def fill(folder, text, count=3):
    """Files that all say the same, in a folder made anew."""
    with new_folder(folder, ours) as work:
        for i in range(count):
            (work / f"file{i}").write_text(text)


def fill_and_raise(folder, error):
    """`error` in the middle of filling a folder; a function is called there."""
    with new_folder(folder, ours) as work:
        (work / "file0").write_text("second")
        if isinstance(error, BaseException):
            raise error
        error()


def texts(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def leftovers(folder):
    return sorted(path.name for path in folder.parent.iterdir() if path != folder)


# In one process.


@pytest.fixture(params=["exchange", "renamings"])
def way(request, monkeypatch):
    """How the two folders change places."""
    if request.param == "renamings":
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    return request.param


def test_a_folder_takes_the_place_of_another(tmp_path, way):
    target = tmp_path / "target"
    fill(target, "first", 5)
    fill(target, "second", 2)
    assert texts(target) == {"file0": "second", "file1": "second"}
    assert not leftovers(target)


def test_it_is_not_there_before_the_end(tmp_path, way):
    target = tmp_path / "target"
    fill(target, "first")
    with new_folder(target, ours) as work:
        (work / "file0").write_text("second")
        assert work.parent == target.parent
        assert work.name.startswith(".target.saving-")
        assert set(texts(target).values()) == {"first"}
    assert texts(target) == {"file0": "second"}


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), SystemExit(), GeneratorExit(), ZeroDivisionError(), InvalidScale("a scale"), MemoryError()],
    ids=repr,
)
@pytest.mark.parametrize("there", [False, True], ids=["new", "old"])
def test_whatever_is_raised_inside_leaves_nothing(tmp_path, way, error, there):
    target = tmp_path / "a" / "b" / "target"
    if there:
        fill(target, "first")
    with pytest.raises(type(error)):
        fill_and_raise(target, error)
    if there:
        assert set(texts(target).values()) == {"first"}
        assert not leftovers(target)
    else:
        assert not list(tmp_path.iterdir())


def test_parents_that_others_use_by_then_stay(tmp_path):
    def stop():
        (tmp_path / "a" / "theirs").write_text("x")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fill_and_raise(tmp_path / "a" / "b" / "target", stop)
    assert os.listdir(tmp_path / "a") == ["theirs"]


def test_an_error_of_the_file_system_is_told_as_such(tmp_path):
    with pytest.raises(SaveFailed, match=r"target: cannot be written: .*No space") as caught:
        fill_and_raise(tmp_path / "target", OSError(errno.ENOSPC, "No space left on device"))
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value.__cause__, OSError)
    assert not list(tmp_path.iterdir())


def test_what_comes_into_the_folder_meanwhile_is_not_lost(tmp_path, way):
    target = tmp_path / "target"
    fill(target, "first")
    with pytest.raises(SaveFailed, match=r"contains notes, which saving would delete"):
        fill_and_raise(target, lambda: (target / "notes").write_text("mine"))
    assert texts(target)["notes"] == "mine"
    assert texts(target)["file2"] == "first"
    assert not leftovers(target)


def test_a_renaming_that_fails_is_taken_back(tmp_path, monkeypatch):
    target = tmp_path / "target"
    fill(target, "first")
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    rename = pathlib.Path.rename

    def refuse(path, to):
        if ".saving-" in path.name and to == target:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(pathlib.Path, "rename", refuse)
    with pytest.raises(SaveFailed, match="Input/output error"):
        fill(target, "second")
    assert set(texts(target).values()) == {"first"}
    assert not leftovers(target)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_any_new_folder(tmp_path, umask):
    before = os.umask(umask)
    try:
        fill(tmp_path / "target", "first")
        fill(tmp_path / "above" / "target", "first")
        assert os.umask(umask) == umask  # and it is left as it was
    finally:
        os.umask(before)
    for path in (tmp_path / "target", tmp_path / "above", tmp_path / "above" / "target"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~umask
    assert stat.S_IMODE((tmp_path / "target" / "file0").stat().st_mode) == 0o666 & ~umask


def test_files_and_both_folders_are_synced_before_and_after_the_exchange(tmp_path, monkeypatch):
    target, events = tmp_path / "target", []
    fill(target, "first")
    sync, take = atomic._sync, atomic._replace
    monkeypatch.setattr(atomic, "_sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(atomic, "_replace", lambda *paths: (events.append("exchange"), take(*paths)))
    fill(target, "second")
    place = events.index("exchange")
    assert {"file0", "file1", "file2"} < set(events[:place])
    assert any(name.startswith(".target.saving-") for name in events[:place])
    assert events[place + 1 :] == [tmp_path.name]


# Leftovers.


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    target = tmp_path / "target"
    (tmp_path / ".target.saving-dead" / "below").mkdir(parents=True)
    (tmp_path / ".target.saving-dead" / "below" / "file").write_text("x")
    kept = [".target2.saving-dead", ".other.saving-x", "target.saving-x", ".target.saving"]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / ".target.saving-file").write_text("a file")
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("x")
    (tmp_path / ".target.saving-link").symlink_to("real")
    fill(target, "first")
    assert leftovers(target) == sorted([*kept, ".target.saving-file", ".target.saving-link", "real"])
    assert (tmp_path / "real" / "file").exists()


def test_the_folder_of_a_living_process_is_not_removed(tmp_path):
    target = tmp_path / "target"
    code = (
        "import sys, time\nfrom perparam.loaders.atomic import new_folder\n"
        "with new_folder(sys.argv[1], lambda name: True) as work:\n"
        "    (work / 'file0').write_text('theirs')\n    print(work, flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            work = pathlib.Path(process.stdout.readline().strip())
            fill(target, "ours")
            assert texts(work) == {"file0": "theirs"}
            assert set(texts(target).values()) == {"ours"}
            process.kill()
            process.wait()
            assert work.exists()
            fill(target, "ours again")
            assert not work.exists()
            assert not leftovers(target)
        finally:
            process.kill()


def test_the_folder_of_another_thread_is_not_removed(tmp_path):
    target = tmp_path / "target"
    with new_folder(target, ours) as work:
        (work / "file0").write_text("first")
        fill(target, "second")
        assert texts(work) == {"file0": "first"}
    assert texts(target) == {"file0": "first"}
    assert not leftovers(target)


@pytest.mark.parametrize("error", [errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch, error):
    """NFS locks only what is open for writing, which no folder is; others lock nothing."""

    def refuse(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("fcntl.flock", refuse)
    (tmp_path / ".target.saving-perhaps-living").mkdir()
    fill(tmp_path / "target", "first")
    fill(tmp_path / "target", "second")
    assert set(texts(tmp_path / "target").values()) == {"second"}
    assert leftovers(tmp_path / "target") == [".target.saving-perhaps-living"]


def test_a_leftover_that_cannot_be_opened_is_no_fault(tmp_path, monkeypatch):
    """Another user's, or one that is removed at this moment."""
    leftover, opened = tmp_path / ".target.saving-theirs", os.open
    leftover.mkdir()

    def refuse(path, *more, **others):
        if pathlib.Path(path) == leftover:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *more, **others)

    monkeypatch.setattr(os, "open", refuse)
    fill(tmp_path / "target", "first")
    assert set(texts(tmp_path / "target").values()) == {"first"}


def test_no_descriptor_is_left_open(tmp_path):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc")
    (tmp_path / ".target.saving-dead").mkdir()
    before = len(os.listdir("/proc/self/fd"))
    for i in range(5):
        fill(tmp_path / "target", str(i))
        with contextlib.suppress(ZeroDivisionError), new_folder(tmp_path / "target", ours):
            raise ZeroDivisionError
    assert len(os.listdir("/proc/self/fd")) == before


def test_many_savers_of_one_folder_leave_one_whole(tmp_path):
    target, refused = tmp_path / "target", []
    fill(target, "start")
    start = threading.Barrier(4)

    def save(name):
        start.wait()
        for i in range(15):
            try:
                fill(target, f"{name} {i}")
            except SaveFailed as error:
                refused.append(error)

    threads = [threading.Thread(target=save, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(texts(target).values())) == 1
    assert len(texts(target)) == 3
    assert not refused
    assert not leftovers(target)


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
        (25, "exchange"),
        pytest.param(150, "exchange", marks=pytest.mark.slow),
        pytest.param(150, "renamings", marks=pytest.mark.slow),
    ],
)
def test_whenever_a_process_is_killed_one_of_two_models_is_there(tmp_path, kills, way):
    seen, found_leftovers = kill_savers(tmp_path, kills, 1, way)
    assert seen == {"a", "b"}
    assert found_leftovers
