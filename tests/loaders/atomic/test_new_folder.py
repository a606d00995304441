"""`new_folder`: a folder takes the place of another, whole, or nothing changes."""

import errno
import os
import pathlib
import stat

import pytest
from atomic_folders import fill, fill_and_raise, leftovers, ours, texts

from perparam.loaders import atomic
from perparam.loaders.atomic import new_folder
from perparam.policies.errors import InvalidScale, SaveFailed


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


def test_the_new_folder_is_not_there_before_the_end(tmp_path, way):
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
def test_any_exception_raised_inside_leaves_nothing(tmp_path, way, error, there):
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


def test_an_error_of_the_file_system_is_raised_as_save_failed(tmp_path):
    with pytest.raises(SaveFailed, match=r"target: cannot be written: .*No space") as caught:
        fill_and_raise(tmp_path / "target", OSError(errno.ENOSPC, "No space left on device"))
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value.__cause__, OSError)
    assert not list(tmp_path.iterdir())


def test_a_file_that_comes_into_the_folder_meanwhile_is_not_lost(tmp_path, way):
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
