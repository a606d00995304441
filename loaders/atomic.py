"""Atomic replacement of a folder: it is complete or unchanged, even if the process or the machine stops."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator

from ..policies.errors import PerparamError, SaveFailed, named


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str], replaceable: Callable[[str], bool]) -> Iterator[pathlib.Path]:
    """A context with an empty folder to fill, which replaces `folder` atomically when the block ends.

    folder       may be missing; its old contents are deleted
    replaceable  whether a file of this name may be deleted from `folder`; any other file there is an error

    The new folder is flushed to the disk before it replaces the old one. On Linux and macOS the two are exchanged in
    one step, so that one of them always exists. A file system without that step needs two renamings, and between them
    the old folder is called `.NAME.replaced-…`. A killed process leaves `.NAME.saving-…` behind, which the next call
    removes.

    Raises:
      SaveFailed: an error of the file system, or other files in `folder`; it is then unchanged.
    """
    if "\0" in os.fspath(folder):
        raise SaveFailed(f"{os.fspath(folder)!r}: not a valid folder name.")
    target = pathlib.Path(os.path.realpath(folder))
    with contextlib.ExitStack() as stack:
        try:
            _refuse_foreign(target, replaceable)
            _make_parents(target.parent, stack)
            # In bytes: a name may have 255 of them.
            prefix = f".{os.fsdecode(os.fsencode(target.name)[:200])}.saving-"
            with _lock_on(target.parent):  # so that no process removes the new folder as a leftover before it is locked
                _remove_leftovers(target, prefix)
                work = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
                stack.callback(shutil.rmtree, work, ignore_errors=True)
                stack.enter_context(_lock_on(work))
            work.chmod(0o777 & ~_umask())
            yield work
            for path in [*work.iterdir(), work]:
                _sync(path)
            with _lock_on(target.parent):
                _refuse_foreign(target, replaceable)
                _replace(work, target)
            _sync(target.parent)
        except PerparamError:
            raise
        except OSError as error:
            raise SaveFailed(
                f"{target}: cannot be written: {error}. Nothing was changed. Free disk space or choose another folder."
            ) from error


def _refuse_foreign(target: pathlib.Path, replaceable: Callable[[str], bool]) -> None:
    """Raises SaveFailed if a folder contains folders, or files that are not replaceable."""
    if not target.exists():
        return
    with os.scandir(target) as entries:
        foreign = sorted(
            each.name for each in entries if each.is_dir(follow_symlinks=False) or not replaceable(each.name)
        )
    if foreign:
        raise SaveFailed(
            f"{target}: contains {', '.join(map(named, foreign[:5]))}{' and more' if foreign[5:] else ''}, which "
            "saving would delete. Choose another folder, or move these elsewhere."
        )


def _make_parents(folder: pathlib.Path, stack: contextlib.ExitStack) -> None:
    """Makes `folder` and its parents; `stack` removes those that are still empty at its end."""
    absent = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(absent):
        each.mkdir(exist_ok=True)

        def remove(each: pathlib.Path = each) -> None:
            with contextlib.suppress(OSError):
                each.rmdir()

        stack.callback(remove)


def _replace(work: pathlib.Path, target: pathlib.Path) -> None:
    """Renames `work` to `target`; a target that was not empty is called `work` afterwards."""
    if not target.exists() or not any(target.iterdir()):
        work.rename(target)
    elif not _exchange(work, target):
        before = target.with_name(work.name.replace(".saving-", ".replaced-"))
        target.rename(before)
        try:
            work.rename(target)
        except BaseException:
            before.rename(target)
            raise
        before.rename(work)


def _exchange(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Exchanges two names in one step; returns False if the system cannot."""
    swap, here = 2, -100  # RENAME_EXCHANGE and RENAME_SWAP; AT_FDCWD
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin":
        return library.renamex_np(*names, swap) == 0
    if not hasattr(library, "renameat2"):
        return False
    return library.renameat2(here, names[0], here, names[1], swap) == 0


def _remove_leftovers(target: pathlib.Path, prefix: str) -> None:
    """Removes folders that killed processes left beside `target`; a running process has a lock on its folder."""
    replaced = prefix.replace(".saving-", ".replaced-")
    for path in target.parent.iterdir():
        # A replaced folder is the only copy unless the new one exists.
        leftover = path.name.startswith(prefix) or (path.name.startswith(replaced) and target.exists())
        if leftover and path.is_dir() and not path.is_symlink():
            # Errors: it was removed in the meantime, belongs to another user, or is in use.
            with contextlib.suppress(OSError), _lock_on(path, wait=False) as locked:
                if locked:
                    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _lock_on(folder: pathlib.Path, wait: bool = True) -> Iterator[bool]:
    """A context that holds the lock on a folder; its value is False if the file system has no locks.

    Raises:
      BlockingIOError: another process has the lock, and `wait` is False.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:  # NFS, and Lustre with its usual mount options
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def _sync(path: pathlib.Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
