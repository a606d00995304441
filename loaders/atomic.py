"""A folder that is there as a whole or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator

from ..policies.errors import PerparamError, SaveFailed

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str], ours: Callable[[str], bool]) -> Iterator[pathlib.Path]:
    """A folder to fill, which takes the place of `folder` in one step once the block has ended and all is on the disk.

    folder  need not exist; what it holds is lost
    ours    whether a name in it is one that may be lost: anything else there is refused

    On Linux and macOS the two are exchanged, so that at any moment one of them is there; elsewhere, where `folder`
    exists already, there is an instant between two renamings.  What a killed process leaves beside it,
    `.NAME.saving-…`, the next one removes.

    Raises:
      SaveFailed: where the file system refuses, or the folder holds what is not ours; nothing is left then.
    """
    target = pathlib.Path(os.path.realpath(folder))
    with contextlib.ExitStack() as stack:
        try:
            foreign = sorted(name for name in os.listdir(target) if not ours(name)) if target.exists() else []
            if foreign:
                raise SaveFailed(
                    f"{target}: holds {', '.join(foreign[:5])}{' and more' if foreign[5:] else ''}, which saving would "
                    "delete. Choose another folder, or move that away."
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            prefix = f".{target.name[:200]}.saving-"
            _remove_leftovers(target.parent, prefix)
            work = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
            stack.callback(shutil.rmtree, work, ignore_errors=True)
            work.chmod(0o777 & ~_umask())
            stack.callback(os.close, _locked(work))
            yield work
            for path in [*work.iterdir(), work]:
                _sync(path)
            _take_the_place(work, target)
            _sync(target.parent)
        except PerparamError:
            raise
        except OSError as error:
            raise SaveFailed(
                f"{target}: cannot be written: {error}. Nothing was changed: make room or choose another folder."
            ) from error


def _take_the_place(work: pathlib.Path, target: pathlib.Path) -> None:
    """Renames `work` to `target`; what was there, if more than an empty folder, is called `work` afterwards."""
    if not target.exists() or not any(target.iterdir()):
        if os.name == "nt" and target.exists():
            target.rmdir()
        work.rename(target)
    elif not _exchange(work, target):
        before = pathlib.Path(f"{work}-before")
        target.rename(before)
        work.rename(target)
        before.rename(work)


def _exchange(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Exchanges two names in one step; False where the system has no such step."""
    swap, here = 2, -100  # RENAME_EXCHANGE and RENAME_SWAP; AT_FDCWD
    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin":
        return library.renamex_np(*names, swap) == 0
    if library is None or not hasattr(library, "renameat2"):
        return False
    return library.renameat2(here, names[0], here, names[1], swap) == 0


def _remove_leftovers(parent: pathlib.Path, prefix: str) -> None:
    """Removes what killed processes have left; a living one holds a lock on its folder."""
    for path in parent.iterdir() if fcntl else ():
        if path.name.startswith(prefix) and path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):
                lock = _locked(path)
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _locked(path: pathlib.Path) -> int:
    """A descriptor that holds the lock on a folder.

    Raises:
      OSError: where another process holds it.
    """
    if fcntl is None:
        return os.open(os.devnull, os.O_RDONLY)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _sync(path: pathlib.Path) -> None:
    """Sees to it that a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
