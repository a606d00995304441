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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from ..policies import store
from ..policies.blocks import block_sides
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


Side = tuple[int, int]
"""Start and stop along an axis."""


class Source(Protocol):
    """An array that is read in rows, from memory or a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> np.dtype:
        """Its dtype."""

    def read(
        self,
        start: int = 0,
        stop: int | None = None,
        into: np.ndarray | None = None,
        within: Sequence[Side] | None = None,
    ) -> np.ndarray:
        """Rows `start` to `stop` along the first axis, in `into` or, where that is None, in new memory.

        within  start and stop along each of the other axes; None: all of them
        """


class Sink(Protocol):
    """A destination of the rows of a parameter or its scales."""

    def box(self) -> Sequence[Side] | None:
        """Start and stop along each axis of a part that contains all that the sink needs; None: the whole."""

    def needs(self, start: int, stop: int) -> bool:
        """Whether the sink needs rows `start` to `stop`."""

    def buffer(self, start: int, stop: int, within: Sequence[Side] | None = None) -> np.ndarray | None:
        """Memory to read rows `start` to `stop` into directly; None: pass them to `write`."""

    def write(self, start: int, rows: np.ndarray, within: Sequence[Side] | None = None) -> None:
        """Stores `rows` from row `start` on; the caller may overwrite `rows` afterwards.

        within  the part of the other axes that `rows` has; None: all
        """


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
    rows, makes_scales = param.shape[0] if param.shape else 1, store.makes_scales(param)
    scale_sink, box = sinks.get(param.scale_path), sink.box()
    unit, height = _slab_rows(param, rows)
    first, last = _side(sink, rows)
    if makes_scales and scale_sink is not None:
        side = _scale_rows(param, param.format)
        low, high = _side(scale_sink, -(-rows // side))
        first, last = _hull((first, last), (low * side, high * side))
    first, last = first // unit * unit, min(-(-last // unit) * unit, rows)
    begin, scales, has_zeros = _scales(param, sources, scale_sink, first, last)
    if has_zeros:  # valid for a block of zeros only, which is checked on the whole parameter
        first, last, height = 0, rows, max(rows, 1)
    within = None if box is None or not same_format or has_zeros else box[1:]
    row_bytes = param.current.bytes // max(rows, 1)
    for start in range(first, last, height):
        stop = min(start + height, last)
        new = _grid_rows(start, stop, param, param.format) if makes_scales else slice(0)
        needs, needs_scales = sink.needs(start, stop), scale_sink is not None and scale_sink.needs(new.start, new.stop)
        if needs or needs_scales or has_zeros:
            buffer = sink.buffer(start, stop, within) if same_format else None
            values = source.read(start, stop, buffer, within) if param.shape else source.read(into=buffer)
            if has_zeros:
                store.check_scales(param, scales, values)
            if not same_format:
                part = None
                if scales is not None:
                    current = _grid_rows(start, stop, param, param.current.format)
                    part = scales[current.start - begin : current.stop - begin]
                values, part = _convert_on_host(param.current.format, param.format, values, part)
                if makes_scales and scale_sink is not None and part is not None:
                    store.check_made(param, part, new.start)
                    scale_sink.write(new.start, part)
            if buffer is None and needs:
                sink.write(start, values, within)
        report((stop - start) * row_bytes)
    report((rows - max(last - first, 0)) * row_bytes)
    if scale_sink is not None and scales is not None and not makes_scales:
        if (scale := param.format.scale) is not None and scale != scales.dtype:
            with _on_host():
                scales = np.asarray(encode_scales(decode_scales(jax.numpy.asarray(scales)), scale))
        scale_sink.write(begin, scales)


def _scales(
    param: ResolvedParam, sources: Mapping[str, Source], sink: Sink | None, first: int, last: int
) -> tuple[int, np.ndarray | None, bool]:
    """`(row, scales, has_zeros)`: the rows of the current scales that are needed, from `row` on, checked.

    sink         of the scales
    first, last  rows of the parameter that are needed
    has_zeros    some of them are zero; then all scales are returned, unchecked
    """
    if not param.has_scales:
        return 0, None, False
    source, grid = sources[param.scale_path], _grid_rows(first, last, param, param.current.format)
    begin, end = grid.start, grid.stop
    if sink is not None and not store.makes_scales(param):
        begin, end = _hull((begin, end), _side(sink, source.shape[0]))
    scales = source.read(begin, end)
    if (scales.astype(np.float32) == 0).any():
        return 0, source.read(), True
    store.check_scales(param, scales, row=begin)
    return begin, scales, False


def _side(sink: Sink, size: int) -> Side:
    """Start and stop of the rows that a sink needs, of `size` rows."""
    box = sink.box()
    return (0, size) if box is None else box[0]


def _hull(one: Side, other: Side) -> Side:
    """Start and stop of the rows from the first of both ranges to the last; an empty range has none."""
    ranges = [side for side in (one, other) if side[0] < side[1]] or [(0, 0)]
    return min(low for low, _ in ranges), max(high for _, high in ranges)


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


def _slab_rows(param: ResolvedParam, rows: int) -> tuple[int, int]:
    """`(unit, height)`: slabs begin at a multiple of `unit` rows, and have `height`.

    The height is a power of two of whole blocks, so that most parameters divide into equal slabs. With leading axes,
    such as one of experts, a row is a stack of matrices with their own blocks.
    """
    columns = max(math.prod(param.shape[1:]), 1)
    if len(param.shape) < 2:
        return max(rows, 1), max(rows, 1)
    if param.change == "kept":
        return 1, max(1, COPY_BYTES // (columns * param.current.dtype.itemsize))
    formats = (param.current.format, param.format)
    block = math.lcm(*(_scale_rows(param, format) for format in formats if format.block is not None))
    return block, block * 2 ** int(math.log2(max(CONVERT_ELEMENTS // (columns * block), 1)))


def _scale_rows(param: ResolvedParam, format: Format) -> int:
    """Rows of the parameter that have one row of scales in `format`."""
    assert format.block is not None
    return block_sides(format.block, param.shape)[0] if len(param.shape) == 2 else 1


def _grid_rows(start: int, stop: int, param: ResolvedParam, format: Format) -> slice:
    """The rows of the scales in `format` of rows `start` to `stop` of a kernel."""
    height = _scale_rows(param, format)
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
