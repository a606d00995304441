"""`write_params`: parameters into safetensors files; each process writes the parts that it holds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ..policies import store
from ..policies.hosts import on_host, spans_processes
from ..policies.resolved import ResolvedParam
from .export import Names
from .placement import Box, box_of
from .progress import Progress
from .rows import ArrayRows, rows_on_host
from .safetensors.writer import Writer
from .slabs import COPY_BYTES, Source, in_turn, run

Report = Callable[[int], None]
Job = Callable[[Report], None]


def write_params(
    writer: Writer,
    params: Iterable[ResolvedParam],
    sources: Mapping[str, Source],
    names: Mapping[str, Names],
    progress: Progress,
    *,
    together: bool = False,
) -> None:
    """Writes parameters and their scales in their storage formats, from `sources` by path, as the tensors `names`.

    together  all processes call this, with the same arrays as sources, and each writes its share

    A part that several processes hold is written by the lowest of them. Parameters whose format changes are gathered
    first, one after the other, since a block may lie in several processes; the processes take turns to convert and
    write them.
    """
    jobs = _own_jobs(writer, params, sources, names) if together else _jobs(writer, params, sources, names)
    failures: list[Exception] = []

    def work_on(job: Job, report: Report) -> None:
        if failures:  # the parameters that are left are gathered all the same, for the other processes
            return
        try:
            job(report)
        except Exception as error:
            failures.append(error)

    for _ in in_turn(jobs, work_on, progress):
        if failures and not together:
            break
    if failures:
        raise failures[0]


def _jobs(
    writer: Writer, params: Iterable[ResolvedParam], sources: Mapping[str, Source], names: Mapping[str, Names]
) -> Iterator[Job]:
    """A job for each parameter."""
    return (functools.partial(run, param, sources, _sinks(writer, param, names)) for param in params)


def _own_jobs(
    writer: Writer, params: Iterable[ResolvedParam], sources: Mapping[str, Source], names: Mapping[str, Names]
) -> Iterator[Job]:
    """What this process writes. All processes gather the same arrays in the same order."""
    here, turn = jax.process_index(), 0
    for param in params:
        paths = [param.path, *([param.scale_path] if param.has_scales else [])]
        arrays = {path: _array(sources[path]) for path in paths}
        if not any(map(spans_processes, arrays.values())):
            is_own, whole = here in _holders(arrays[param.path]), sources
        elif _is_copied(param, arrays):
            yield functools.partial(_write_own_parts, writer, param, arrays, names)
            continue
        else:
            is_own, whole = turn % jax.process_count() == here, _gathered(arrays)
            turn += 1
        if is_own:
            yield functools.partial(run, param, whole, _sinks(writer, param, names))
        else:
            yield functools.partial(_count, param)


def _gathered(arrays: Mapping[str, Any]) -> dict[str, Source]:
    return {path: ArrayRows(path, on_host(array)) for path, array in arrays.items()}


def _count(param: ResolvedParam, report: Report) -> None:
    """Reports the bytes of a parameter that another process writes."""
    report(param.current.bytes)


def _array(source: Source) -> Any:
    assert isinstance(source, ArrayRows)
    return source.array


def _holders(array: Any) -> set[int]:
    """The processes that write an array that no two share: this one for its own copy, process 0 for one on the host."""
    return {device.process_index for device in array.devices()} if isinstance(array, jax.Array) else {0}


def _is_copied(param: ResolvedParam, arrays: Mapping[str, Any]) -> bool:
    """Whether the bytes in the files are those of the arrays, so that parts can be written apart.

    Raises:
      InvalidScale: scales that are not positive finite numbers.
    """
    if param.change != "kept" or not all(map(spans_processes, arrays.values())):
        return False
    if not param.has_scales:
        return True
    scales = on_host(arrays[param.scale_path])
    if param.format.scale != scales.dtype or (scales.astype(np.float32) == 0).any():
        return False  # zeros are valid for blocks of zeros, which are checked on the whole parameter
    store.check_scales(param, scales)
    return True


def _write_own_parts(
    writer: Writer, param: ResolvedParam, arrays: Mapping[str, Any], names: Mapping[str, Names], report: Report
) -> None:
    """Writes the parts of arrays of which this is the lowest process that holds them."""
    for path, array in arrays.items():
        lowest: dict[Box, int] = {}
        for device, index in array.sharding.devices_indices_map(array.shape).items():
            box = box_of(index or (), array.shape)
            lowest[box] = min(lowest.get(box, device.process_index), device.process_index)
        parts = {box_of(shard.index, array.shape): shard.data for shard in array.addressable_shards}
        for box, data in parts.items():
            if lowest[box] == jax.process_index():
                _write_part(writer, names[path], array.shape, box, data)
    _count(param, report)


def _write_part(writer: Writer, names: Names, shape: tuple[int, ...], box: Box, data: jax.Array) -> None:
    """Writes `data`, the part `box` of an array of this shape, a slab of rows at a time."""
    if not box:
        return writer.write_part(_only(names), shape, box, np.asarray(data))
    (first, last), *rest = box
    height = max(1, COPY_BYTES // max(data.nbytes // max(len(data), 1), 1))
    for start in range(first, last, height):
        stop = min(start + height, last)
        rows = rows_on_host(data, start - first, stop - first)
        if isinstance(names, str):
            writer.write_part(names, shape, ((start, stop), *rest), rows)
            continue
        for name, row in zip(names[start:stop], rows, strict=True):
            writer.write_part(name, shape[1:], tuple(rest), row)


def _only(names: Names) -> str:
    assert isinstance(names, str)
    return names


def _sinks(writer: Writer, param: ResolvedParam, names: Mapping[str, Names]) -> dict[str, _Sink]:
    return {path: _Sink(writer, names[path]) for path in param.stored}


@dataclasses.dataclass(frozen=True)
class _Sink:
    """A sink that writes the rows of one parameter into the file of its tensor, or of each row's own tensor."""

    writer: Writer
    names: Names

    def box(self) -> None:
        return None

    def needs(self, start: int, stop: int) -> bool:
        return True

    def buffer(self, start: int, stop: int, within: Sequence[tuple[int, int]] | None = None) -> None:
        return None

    def write(self, start: int, rows: np.ndarray, within: Sequence[tuple[int, int]] | None = None) -> None:
        if isinstance(self.names, str):
            self.writer.write(self.names, start * (rows.nbytes // len(rows) if rows.ndim and len(rows) else 0), rows)
            return
        for name, row in zip(self.names[start : start + len(rows)], rows, strict=True):
            self.writer.write(name, 0, row)
