"""A folder that is there as a whole or not at all, whenever the process or the machine stops."""

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
def new_folder(folder: str | os.PathLike[str], ours: Callable[[str], bool]) -> Iterator[pathlib.Path]:
    """A folder to fill, which takes the place of `folder` in one step once the block has ended and all is on the disk.

    folder  need not exist; what it holds is lost
    ours    whether a name in it is one that may be lost: anything else there is refused

    On Linux and macOS the two are exchanged, so that at any moment one of them is there; on a file system that cannot,
    there is an instant between two renamings, in which the old one is called `.NAME.replaced-…`.  What a killed process
    leaves beside it, `.NAME.saving-…`, the next one removes.

    Raises:
      SaveFailed: where the file system refuses, or the folder holds what is not ours; nothing is left then.
    """
    if "\0" in os.fspath(folder):
        raise SaveFailed(f"{os.fspath(folder)!r}: no name of a folder.")
    target = pathlib.Path(os.path.realpath(folder))
    with contextlib.ExitStack() as stack:
        try:
            _refuse_foreign(target, ours)
            _make_parents(target.parent, stack)
            # In bytes: a name may have 255 of them.
            prefix = f".{os.fsdecode(os.fsencode(target.name)[:200])}.saving-"
            with _lock_on(target.parent):  # so that nobody takes the new folder for a leftover before it is locked
                _remove_leftovers(target, prefix)
                work = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
                stack.callback(shutil.rmtree, work, ignore_errors=True)
                stack.enter_context(_lock_on(work))
            work.chmod(0o777 & ~_umask())
            yield work
            for path in [*work.iterdir(), work]:
                _sync(path)
            with _lock_on(target.parent):
                _refuse_foreign(target, ours)
                _take_the_place(work, target)
            _sync(target.parent)
        except PerparamError:
            raise
        except OSError as error:
            raise SaveFailed(
                f"{target}: cannot be written: {error}. Nothing was changed: make room or choose another folder."
            ) from error


def _refuse_foreign(target: pathlib.Path, ours: Callable[[str], bool]) -> None:
    """Raises SaveFailed where a folder holds more than may be lost."""
    if not target.exists():
        return
    with os.scandir(target) as entries:
        foreign = sorted(each.name for each in entries if each.is_dir(follow_symlinks=False) or not ours(each.name))
    if foreign:
        raise SaveFailed(
            f"{target}: holds {', '.join(map(named, foreign[:5]))}{' and more' if foreign[5:] else ''}, which saving "
            "would delete. Choose another folder, or move that away."
        )


def _make_parents(folder: pathlib.Path, stack: contextlib.ExitStack) -> None:
    """Makes `folder`; what of it stays empty is removed again with `stack`."""
    absent = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(absent):
        each.mkdir(exist_ok=True)

        def remove(each: pathlib.Path = each) -> None:
            with contextlib.suppress(OSError):
                each.rmdir()

        stack.callback(remove)


def _take_the_place(work: pathlib.Path, target: pathlib.Path) -> None:
    """Renames `work` to `target`; what was there, if more than an empty folder, is called `work` afterwards."""
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
    """Exchanges two names in one step; False where the system has no such step."""
    swap, here = 2, -100  # RENAME_EXCHANGE and RENAME_SWAP; AT_FDCWD
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin":
        return library.renamex_np(*names, swap) == 0
    if not hasattr(library, "renameat2"):
        return False
    return library.renameat2(here, names[0], here, names[1], swap) == 0


def _remove_leftovers(target: pathlib.Path, prefix: str) -> None:
    """Removes what killed processes have left beside `target`; a living one holds a lock on its folder."""
    replaced = prefix.replace(".saving-", ".replaced-")
    for path in target.parent.iterdir():
        # One that was moved away is all there is of it, unless the new one has come.
        over = path.name.startswith(prefix) or (path.name.startswith(replaced) and target.exists())
        if over and path.is_dir() and not path.is_symlink():
            # Gone meanwhile, another user's, or in use.
            with contextlib.suppress(OSError), _lock_on(path, wait=False) as locked:
                if locked:
                    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _lock_on(folder: pathlib.Path, wait: bool = True) -> Iterator[bool]:
    """A context in which no other process has the lock on a folder; False where its file system has no locks.

    Raises:
      BlockingIOError: where another one has it, and this one is not to wait.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:  # NFS, or Lustre as it is often mounted
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def _sync(path: pathlib.Path) -> None:
    """Sees to it that a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
