"""`new_folder`: what killed processes left is removed, and what living ones work on is not."""

import contextlib
import errno
import os
import pathlib
import subprocess
import sys
import threading

import pytest
from atomic_folders import fill, leftovers, ours, texts

from perparam.loaders.atomic import new_folder
from perparam.policies.errors import SaveFailed


def test_folders_of_killed_processes_are_removed_and_nothing_else(tmp_path):
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
def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch, error):
    """NFS locks only what is open for writing, which no folder is; others lock nothing."""

    def refuse(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("fcntl.flock", refuse)
    (tmp_path / ".target.saving-perhaps-living").mkdir()
    fill(tmp_path / "target", "first")
    fill(tmp_path / "target", "second")
    assert set(texts(tmp_path / "target").values()) == {"second"}
    assert leftovers(tmp_path / "target") == [".target.saving-perhaps-living"]


def test_a_leftover_that_cannot_be_opened_is_left_alone(tmp_path, monkeypatch):
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
