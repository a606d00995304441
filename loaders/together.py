"""Saving by several processes (`jax.distributed`): one folder that all of them fill, and that appears as a whole."""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from ..policies.blocks import Block
from ..policies.errors import PerparamError, SaveFailed
from .atomic import new_folder
from .safetensors.writer import Tensors, Writer

_MESSAGE = 1000  # bytes of an error's text that other processes get
_VISIBLE_WITHIN = 10.0  # seconds; network file systems show a new folder to other machines after a while


@contextlib.contextmanager
def writing(
    folder: str | os.PathLike[str],
    replaceable: Callable[[str], bool],
    shards: dict[str, Tensors],
    blocks: Mapping[str, Block] | None = None,
    *,
    together: bool,
) -> Iterator[tuple[pathlib.Path | None, Writer]]:
    """A context `(work, writer)` with a new folder and a writer of its safetensors files; see `new_folder`, `Writer`.

    together  all processes enter this context and write their parts. Process 0 makes the files, and replaces the folder
              after all processes have left the block without an error; `work`, for other files, is None elsewhere

    Raises:
      SaveFailed: as `new_folder`, or another process failed, or does not see the folder that process 0 made. The folder
        is then unchanged, and every process has an error.
    """
    if not together:
        with new_folder(folder, replaceable) as work, Writer(work, shards, blocks) as writer:
            yield work, writer
        return
    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        own, name = None, b""
        with agreement():
            if first:
                own = stack.enter_context(new_folder(folder, replaceable))
                name = os.fsencode(own.name)
        name = _from_first(name)
        with agreement():
            work = own or _made_by_first(folder, os.fsdecode(name))
        with agreement():
            if first:
                with Writer(work, shards, blocks):
                    pass
                for file in shards:
                    _forget(work / file)
        with agreement(), Writer(work, shards, blocks, create=False) as writer:
            yield own, writer
        with agreement():
            stack.close()


@contextlib.contextmanager
def agreement() -> Iterator[None]:
    """A context that all processes leave together: if the block of one raises an error, all raise one.

    Raises:
      SaveFailed: the block of another process raised an error, which is quoted.
    """
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:  # KeyboardInterrupt too: the others wait for this process
        failure = error
    text = b"" if failure is None else f"{type(failure).__name__}: {failure}".encode()[:_MESSAGE]
    found = np.asarray(multihost_utils.process_allgather(np.frombuffer(text.ljust(_MESSAGE, b"\0"), np.uint8)))
    if isinstance(failure, PerparamError):
        raise failure
    if isinstance(failure, OSError):
        raise SaveFailed(f"cannot be written: {failure}. Nothing was changed.") from failure
    if failure is not None:
        raise failure
    for process, row in enumerate(found):
        if message := row.tobytes().rstrip(b"\0"):
            raise SaveFailed(f"nothing was saved, since process {process} failed: {message.decode(errors='replace')}")


def _from_first(text: bytes) -> bytes:
    """The `text` of process 0, at most 255 bytes, in every process."""
    padded = np.frombuffer(text.ljust(255, b"\0"), np.uint8)
    found: bytes = np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes().rstrip(b"\0")
    return found


def _made_by_first(folder: str | os.PathLike[str], name: str) -> pathlib.Path:
    """The folder `name` that process 0 made beside `folder`.

    Raises:
      SaveFailed: this process does not see it.
    """
    work, until = pathlib.Path(os.path.realpath(folder)).parent / name, time.monotonic() + _VISIBLE_WITHIN
    while not work.is_dir():
        if time.monotonic() > until:
            raise SaveFailed(
                f"{work}: process 0 made this folder, and process {jax.process_index()} on {socket.gethostname()} does "
                "not see it. Processes that share a model save it into one folder: pass the same path to all, on a "
                "file system that all machines share."
            )
        with contextlib.suppress(OSError):
            os.listdir(work.parent)  # NFS then asks the server again
        time.sleep(0.05)
    return work


def _forget(path: pathlib.Path) -> None:
    """Drops a file from this machine's memory, where reserving its space may have put it as zeros.

    On NFS, a later write of a part of a page would otherwise write the whole page, over what other machines wrote.
    """
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
