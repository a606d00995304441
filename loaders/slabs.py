"""Parameters on their way from where they lie to where they are kept, a slab of rows at a time.

A slab holds whole blocks, so that what becomes of it is what becomes of those rows of the whole parameter, bit for bit;
and it is small enough to stay in a processor's cache between being read and being written.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from ..policies import dtypes
from ..policies.blocks import grid_shape
from ..policies.slots import scale_path
from ..policies.storage import Step, check_made, check_scales
from .progress import Progress

CONVERTED = 2**20
"""Elements of a slab that is converted: 2 MiB of bfloat16, and 4 of the float32 between."""

COPIED = 2**25
"""Bytes of a slab that is kept as it is."""

WORKERS = 2
"""Parameters under way at a time: while one is read another is converted."""


class Source(Protocol):
    """An array that need not be in memory."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> np.dtype:
        """Its dtype."""

    def read(self, start: int = 0, stop: int | None = None, into: np.ndarray | None = None) -> np.ndarray:
        """Rows `start` to `stop` of its first axis, in `into` where that is given."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One parameter: where it lies, its scales where it has them, and what storage does with it."""

    path: str
    step: Step
    kernel: Source
    scale_inv: Source | None = None

    @property
    def kept(self) -> bool:
        """Whether the kernel (or plain parameter) stays as it is, bit for bit."""
        return self.step.change == "kept"

    @property
    def bytes(self) -> int:
        """Bytes to read, scales apart."""
        return math.prod(self.kernel.shape) * self.kernel.dtype.itemsize


class Sink(Protocol):
    """What takes the rows of a parameter or of its scales."""

    def needs(self, start: int, stop: int) -> bool:
        """Whether rows `start` to `stop` are wanted."""

    def buffer(self, start: int, stop: int) -> np.ndarray | None:
        """Memory that rows `start` to `stop` may be read into at once; None: they are to be handed to `write`."""

    def write(self, start: int, rows: np.ndarray) -> None:
        """Takes the rows from `start` on; `rows` is free again afterwards."""


def run(job: Job, kernel: Sink, scale_inv: Sink | None, report: Callable[[int], None]) -> None:
    """Moves one parameter: its stored rows to `kernel`, the scales it is stored with to `scale_inv`.

    report  is told the bytes of `job.kernel` that are done, after every slab, and may raise to end it

    Raises:
      InvalidScale: scales that are not positive finite numbers, or weights that would make such.
      InvalidCheckpoint: a file that cannot be read.
    """
    step = job.step
    found_scales = None if job.scale_inv is None else job.scale_inv.read()
    if found_scales is not None:
        check_scales(scale_path(job.path), found_scales)
    rows = job.kernel.shape[0] if job.kernel.shape else 1
    row_bytes = job.bytes // max(rows, 1)
    height, made = _slab_height(job, rows), list[np.ndarray]()
    for start in range(0, rows, height):
        stop = min(start + height, rows)
        if not kernel.needs(start, stop) and not step.makes_scales:
            continue
        buffer = kernel.buffer(start, stop) if job.kept else None
        found = job.kernel.read(start, stop, buffer) if job.kernel.shape else job.kernel.read(into=buffer)
        if not job.kept:
            scales = None if found_scales is None else found_scales[_blocks(start, stop, step.found_block)]
            found, scales = _converted(step, found, scales)
            made += [] if scales is None else [scales]
        if buffer is None:
            kernel.write(start, found)
        report((stop - start) * row_bytes)
    if scale_inv is None:
        return
    assert step.scale is not None
    assert step.block is not None
    if found_scales is not None and not step.makes_scales:
        with _on_host():
            scale_inv.write(0, np.asarray(dtypes.saturating_cast(found_scales, step.scale)))
        return
    scales = np.concatenate(made) if made else np.empty(grid_shape(job.kernel.shape, step.block), step.scale)
    check_made(job.path, scales)
    scale_inv.write(0, scales)


@functools.partial(jax.jit, static_argnames="step")
def _convert(step: Step, kernel: jax.Array, scale_inv: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    return step.convert(kernel, scale_inv)


def _converted(step: Step, kernel: np.ndarray, scale_inv: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """`step.convert` on the host, whatever the default device: the same bits on every machine."""
    with _on_host():
        kernel, scale_inv = _convert(step, *jax.device_put((kernel, scale_inv)))
        return np.asarray(kernel), None if scale_inv is None else np.asarray(scale_inv)


def _on_host() -> Any:
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return contextlib.nullcontext()


def _slab_height(job: Job, rows: int) -> int:
    """Rows of a slab: whole blocks, a power of two of them, so that most parameters divide into equal slabs."""
    step, columns = job.step, max(math.prod(job.kernel.shape[1:]), 1)
    if len(job.kernel.shape) != 2:
        return max(rows, 1)
    if job.kept:
        return max(1, COPIED // (columns * job.kernel.dtype.itemsize))
    block = math.lcm(*(each[0] for each in (step.found_block, step.block) if each is not None))
    return block * 2 ** int(math.log2(max(CONVERTED // (columns * block), 1)))


def _blocks(start: int, stop: int, block: tuple[int, int] | None) -> slice:
    """The rows of scales that belong to rows `start` to `stop` of a kernel."""
    assert block is not None
    return slice(start // block[0], -(-stop // block[0]))


T = TypeVar("T")


def in_turn(
    jobs: Iterable[T], work: Callable[[T, Callable[[int], None]], Any], progress: Progress
) -> Iterator[tuple[T, Any]]:
    """`(job, work(job, report))` for each job in order, WORKERS of them under way, none begun before it has its turn.

    A consumer that leaves, Ctrl-C included, or work that fails, ends what is under way at its next report.
    """
    stopped = threading.Event()

    def report(count: int) -> None:
        if stopped.is_set():
            raise InterruptedError
        progress.add(count)

    pending: collections.deque[tuple[T, concurrent.futures.Future[Any]]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(WORKERS, thread_name_prefix="perparam") as pool:
        try:
            for job in jobs:
                pending.append((job, pool.submit(work, job, report)))
                if len(pending) == WORKERS:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        finally:
            stopped.set()
            for _, future in pending:
                future.cancel()
