"""Copying of parameters from a source to a sink in slabs of rows, with conversion of their storage format.

A slab consists of whole blocks, so that its conversion gives the same bits as that of the whole parameter. It is small
enough to stay in a processor's cache from reading to writing.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from ..policies import store
from ..policies.blocks import Block, block_sides
from ..policies.dtypes import as_array
from ..policies.formats import Format
from ..policies.resolved import ResolvedParam
from ..policies.scales import decode_scales, encode_scales
from ..policies.targets import host_device
from .progress import Progress

CONVERT_ELEMENTS = 2**20
"""Elements of a slab that is converted: 2 MiB in bfloat16, and 4 MiB in float32 in between."""

COPY_BYTES = 2**25
"""Bytes of a slab that is copied without conversion."""

WORKERS = 2
"""Parameters processed at a time: one is read while another is converted."""


class Source(Protocol):
    """An array that is read in rows, from memory or a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> np.dtype:
        """Its dtype."""

    def read(self, start: int = 0, stop: int | None = None, into: np.ndarray | None = None) -> np.ndarray:
        """Rows `start` to `stop` along the first axis, in `into` or, where that is None, in new memory."""


class Sink(Protocol):
    """A destination of the rows of a parameter or its scales."""

    def needs(self, start: int, stop: int) -> bool:
        """Whether the sink needs rows `start` to `stop`."""

    def buffer(self, start: int, stop: int) -> np.ndarray | None:
        """Memory to read rows `start` to `stop` into directly; None: pass them to `write`."""

    def write(self, start: int, rows: np.ndarray) -> None:
        """Stores `rows` from row `start` on; the caller may overwrite `rows` afterwards."""


def run(
    param: ResolvedParam,
    sources: Mapping[str, Source],
    sinks: Mapping[str, Sink],
    report: Callable[[int], None],
) -> None:
    """Copies one parameter and its scales from sources to sinks, in the format that the policy resolved for it.

    sources  by path
    sinks    by path
    report   called after every slab with the slab's bytes in the source; may raise to stop the copy

    Raises:
      InvalidScale: scales that are not positive finite numbers, or weights whose scales would not be.
      InvalidCheckpoint: a file that cannot be read.
    """
    source, sink, same_format = sources[param.path], sinks[param.path], param.change == "kept"
    rows = param.shape[0] if param.shape else 1
    height, new_scales, makes_scales = _slab_height(param, rows), list[np.ndarray](), store.makes_scales(param)
    scales = sources[param.scale_path].read() if param.has_scales else None
    has_zeros = scales is not None and bool((scales.astype(np.float32) == 0).any())
    if scales is not None and not has_zeros:
        store.check_scales(param, scales)
    if has_zeros:  # valid for a block of zeros only, which is checked on the whole parameter
        height = max(rows, 1)
    for start in range(0, rows, height):
        stop = min(start + height, rows)
        if not (sink.needs(start, stop) or makes_scales or has_zeros):
            continue
        buffer = sink.buffer(start, stop) if same_format else None
        values = source.read(start, stop, buffer) if param.shape else source.read(into=buffer)
        if has_zeros:
            store.check_scales(param, scales, values)
        if not same_format:
            part = None if scales is None else scales[_grid_rows(start, stop, param)]
            values, part = _convert_on_host(param.current.format, param.format, values, part)
            new_scales += [] if part is None else [part]
        if buffer is None and sink.needs(start, stop):
            sink.write(start, values)
        report((stop - start) * (param.current.bytes // max(rows, 1)))
    if param.format.scale is None:
        return
    if scales is not None and not makes_scales:
        if param.format.scale != scales.dtype:
            with _on_host():
                scales = np.asarray(encode_scales(decode_scales(jax.numpy.asarray(scales)), param.format.scale))
    else:
        (_, (grid, dtype)) = param.format.parts(param.shape)
        scales = np.concatenate(new_scales) if new_scales else np.empty(grid, dtype)
        store.check_made(param, scales)
    sinks[param.scale_path].write(0, scales)


@functools.partial(jax.jit, static_argnames=("current", "requested"))
def _convert(
    current: Format, requested: Format, values: jax.Array, scale_inv: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    return store.convert(current, requested, values, scale_inv)


def _convert_on_host(
    current: Format, requested: Format, values: np.ndarray, scale_inv: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """`store.convert` on the host, whatever the default device, so that all machines give the same bits."""
    with _on_host():
        arrays = (as_array(values), scale_inv)  # a float64 saturates where JAX has only float32
        converted, scales = _convert(current, requested, *jax.device_put(arrays))
        return np.asarray(converted), None if scales is None else np.asarray(scales)


def _on_host() -> Any:
    """A context in which JAX computes on the host."""
    device = host_device()
    return contextlib.nullcontext() if device is None else jax.default_device(device)


def _slab_height(param: ResolvedParam, rows: int) -> int:
    """Rows of a slab: a power of two of whole blocks, so that most parameters divide into equal slabs.

    With leading axes, such as one of experts, a row is a stack of matrices with their own blocks.
    """
    columns = max(math.prod(param.shape[1:]), 1)
    if len(param.shape) < 2:
        return max(rows, 1)
    if param.change == "kept":
        return max(1, COPY_BYTES // (columns * param.current.dtype.itemsize))
    formats = (param.current.format, param.format)
    block = 1
    if len(param.shape) == 2:
        block = math.lcm(*(_sides(param, format)[0] for format in formats if format.block is not None))
    return block * 2 ** int(math.log2(max(CONVERT_ELEMENTS // (columns * block), 1)))


def _sides(param: ResolvedParam, format: Format) -> Block:
    """The block of `format`, with the size of the axis in place of -1."""
    assert format.block is not None
    return block_sides(format.block, param.shape)


def _grid_rows(start: int, stop: int, param: ResolvedParam) -> slice:
    """The rows of the scales of rows `start` to `stop` of a kernel."""
    height = _sides(param, param.current.format)[0] if len(param.shape) == 2 else 1
    return slice(start // height, -(-stop // height))


T = TypeVar("T")


def in_turn(
    jobs: Iterable[T], work: Callable[[T, Callable[[int], None]], Any], progress: Progress
) -> Iterator[tuple[T, Any]]:
    """An iterator over `(job, work(job, report))` in the order of the jobs, which run in WORKERS threads.

    At most WORKERS jobs are running or waiting to be consumed. If a job fails, or the consumer stops (also by Ctrl-C),
    running jobs stop at their next call of `report`.
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
