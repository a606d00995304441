"""The plan: what a policy does to every parameter, as data and as a table, before anything is allocated."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from . import dtypes
from .matmul import Target, matmul_plan
from .paths import is_scale
from .resolved import Change, Decisions, Resolved, ResolvedParam
from .tables import table


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a plan: a parameter, or the scales of one.

    path            where it stands
    shape           as stored afterwards
    current         dtype before; None for scales that are made
    storage         dtype afterwards; None for scales that are dissolved
    format          the format afterwards as the table shows it: "f8_e4m3fn", "int8 1×all", a format's name; likewise
    compute         dtype that the compute slot says; None: narrow as stored, anything else in the activations' dtype
    compute_format  the format of it, as `format`
    storage_rule    the key of the `params` slot that decided, "default", or None
    storage_source  file and line of that key
    compute_rule    likewise of the `compute` slot
    compute_source  likewise
    change          kept, cast, quantised, dequantised or requantised; of scales also made or dissolved
    bytes_before    bytes before
    bytes           bytes as stored
    matmul          of a kernel, where the plan was asked for a target: what multiplies with it, for one row | for 512
    """

    path: str
    shape: tuple[int, ...]
    current: np.dtype | None
    storage: np.dtype | None
    format: str | None
    compute: np.dtype | None
    compute_format: str | None
    storage_rule: str | None
    storage_source: str | None
    compute_rule: str | None
    compute_source: str | None
    change: Change
    bytes_before: int
    bytes: int
    matmul: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The row with dtypes by name."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: dtypes.dtype_name(x) if isinstance(x, np.dtype) else x for name, x in fields.items()}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a policy resolved to, an iterable of rows; `str(plan)` is the table, in which equal layers share a line.

    rows         one a parameter, in the tree's order, scales after their kernel
    activations  the dtype of activations, None where neither the policy nor the model names one
    output       the dtype of what the model returns, likewise
    kv_cache     the dtype of keys and values that attention keeps; None for models without such
    kv_bytes     bytes of them for each token, scales included
    """

    rows: tuple[Row, ...]
    activations: np.dtype | None = None
    output: np.dtype | None = None
    kv_cache: np.dtype | None = None
    kv_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Bytes of all parameters as stored."""
        return sum(row.bytes for row in self.rows)

    @property
    def total_bytes_before(self) -> int:
        """Bytes of all parameters before storage."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_by_dtype(self) -> dict[np.dtype, int]:
        """Bytes as stored, by dtype, the largest first."""
        totals: collections.Counter[np.dtype] = collections.Counter()
        for row in self.rows:
            if row.storage is not None:
                totals[row.storage] += row.bytes
        return dict(totals.most_common())

    @property
    def largest(self) -> Row | None:
        """The parameter that takes the most bytes as stored; None for a plan without any."""
        return max(self.rows, key=lambda row: row.bytes, default=None)

    def to_json(self) -> str:
        """Rows and totals as JSON, one row a line and nothing that varies between runs: made to be diffed."""
        rows = ",\n".join(f"  {json.dumps(row.to_dict())}" for row in self.rows)
        rest = {
            "activations": self.activations and dtypes.dtype_name(self.activations),
            "output": self.output and dtypes.dtype_name(self.output),
            "kv_cache": self.kv_cache and dtypes.dtype_name(self.kv_cache),
            "kv_bytes": self.kv_bytes,
            "bytes_before": self.total_bytes_before,
            "bytes": self.total_bytes,
            "bytes_by_dtype": {dtypes.dtype_name(dtype): count for dtype, count in self.bytes_by_dtype.items()},
        }
        return f'{{"rows": [\n{rows}\n],\n{json.dumps(rest)[1:]}\n'

    def __str__(self) -> str:
        named = ("matmul (1 | 512 rows)",) if self._has_target else ()
        lines: list[tuple[str, ...]] = [
            ("path", "shape", "current", "storage", "compute", *named, "rule (params | compute)", "bytes")
        ]
        for label, rows in self._folded():
            lines.append((label, *self._cells(rows[0]), human_bytes(sum(row.bytes for row in rows))))
        return f"{table(lines, right=1)}\n\n{self.summary()}"

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def _has_target(self) -> bool:
        return any(row.matmul for row in self.rows)

    def _folded(self) -> list[tuple[str, list[Row]]]:
        """Rows that differ only in the numbers of their path share a line: `layers/0-27/mlp/up_proj/kernel ×28`."""
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((re.sub(r"(?<![^/])\d+(?![^/])", "#", row.path), *self._cells(row)), []).append(row)
        return [(_label([row.path for row in group]), group) for group in groups.values()]

    def _cells(self, row: Row) -> tuple[str, ...]:
        """What the table says of a row, its path and bytes apart."""
        current = "–" if row.current is None else dtypes.dtype_name(row.current)
        storage = row.format or ""
        change = "" if row.change == "kept" else row.change
        if is_scale(row.path):
            compute = ""
        elif row.compute_format is not None:
            compute = row.compute_format
        elif row.storage is not None and dtypes.is_narrow(row.storage):
            compute = "as stored"
        else:
            compute = "–" if self.activations is None else f"({dtypes.dtype_name(self.activations)})"
        rules = [_key(row.storage_rule, row.storage_source), _key(row.compute_rule, row.compute_source)]
        cells = ["×".join(map(str, row.shape)), current, f"{storage} {change}".strip(), compute]
        return *cells, *([row.matmul or ""] if self._has_target else []), " | ".join(rules)

    def summary(self) -> str:
        """The totals in three or four lines."""
        totals = ", ".join(
            f"{dtypes.dtype_name(dtype)} {human_bytes(count)}" for dtype, count in self.bytes_by_dtype.items()
        )
        scales = sum(is_scale(row.path) for row in self.rows)
        changed = collections.Counter(row.change for row in self.rows)
        names = [f"activations {dtypes.dtype_name(self.activations)}"] if self.activations else []
        names += [f"output {dtypes.dtype_name(self.output)}"] if self.output else []
        if self.kv_cache is not None:
            names.append(f"kv cache {dtypes.dtype_name(self.kv_cache)}, {human_bytes(self.kv_bytes)} a token")
        return "\n".join(
            [
                f"{count(len(self.rows) - scales, 'parameter')} and {count(scales, 'grid')} of scales: "
                + ", ".join(f"{number} {change}" for change, number in sorted(changed.items())),
                f"stored in {human_bytes(self.total_bytes)} ({totals}), now in {human_bytes(self.total_bytes_before)}",
                *([f"largest: {self.largest.path}, {human_bytes(self.largest.bytes)}"] if self.largest else []),
                *filter(None, [", ".join(names)]),
            ]
        )


def human_bytes(size: int) -> str:
    """`size` bytes as people read them: 1.5 MiB."""
    power = min(max(size.bit_length() - 1, 0) // 10, 4)
    return f"{size} B" if power == 0 else f"{size / 1024**power:.1f} {'KMGT'[power - 1]}iB"


def count(number: int, noun: str) -> str:
    """`number` and a noun that agrees with it: 1 parameter, 2 parameters."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def plan(resolved: Resolved, target: str | Target | None = None) -> Plan:
    """The plan of what was resolved; see `Policy.explain`."""
    rows = []
    for param in resolved.params.values():
        row = _row(param)
        if target is not None and param.path.rpartition("/")[2] == "kernel" and len(param.shape) == 2:
            row = dataclasses.replace(row, matmul=_matmul(param, resolved.activations, target))
        rows.append(row)
        if param.has_scales or param.format.scale is not None:
            rows.append(_scale_row(param))
    return Plan(tuple(rows), resolved.activations, resolved.output, resolved.kv_cache, resolved.kv_bytes)


def _matmul(param: ResolvedParam, activations: np.dtype | None, target: str | Target) -> str:
    """The implementations that multiply with a kernel, for one row of activations and for 512."""
    out_features, in_features = param.shape
    names = [
        matmul_plan(
            rows,
            (out_features, in_features),
            x=activations or np.dtype(np.float32),
            kernel=param.format,
            compute=param.compute,
            target=target,
        ).implementation
        for rows in (1, 512)
    ]
    return " | ".join(dict.fromkeys(names))


def _row(param: ResolvedParam) -> Row:
    """The row of a parameter, scales apart."""
    return Row(
        path=param.path,
        shape=param.shape,
        current=param.current.dtype,
        storage=param.format.values,
        format=str(param.format),
        compute=None if param.compute is None else param.compute.values,
        compute_format=None if param.compute is None else str(param.compute),
        **_rules(param.rules),
        change=param.change,
        bytes_before=param.current.bytes,
        bytes=math.prod(param.shape) * param.format.values.itemsize,
    )


def _scale_row(param: ResolvedParam) -> Row:
    """The row of the scales of a parameter."""
    before, after = (format.parts(param.shape)[1:] for format in (param.current.format, param.format))
    shape, _ = (after or before)[0]
    change: Change = param.change if after else "dissolved"
    if not before:
        change = "made"
    elif change == "kept" and before[0][1] != after[0][1]:
        change = "cast"
    rules = param.scale_rules if after else {**param.scale_rules, "compute": None}
    sizes = [math.prod(part[0]) * part[1].itemsize for part in (*before, *after)]
    return Row(
        path=param.scale_path,
        shape=shape,
        current=before[0][1] if before else None,
        storage=after[0][1] if after else None,
        format=dtypes.dtype_name(after[0][1]) if after else None,
        compute=None,
        compute_format=None,
        **_rules(rules),
        change=change,
        bytes_before=sizes[0] if before else 0,
        bytes=sizes[-1] if after else 0,
    )


def _rules(rules: Decisions) -> dict[str, Any]:
    """The columns that say which rules decided: a rule that leaves its default unsaid decides nothing."""
    columns: dict[str, Any] = {}
    for slot, column in (("params", "storage"), ("compute", "compute")):
        rule = rules.get(slot)
        columns[f"{column}_rule"] = None if rule is None else rule.key
        columns[f"{column}_source"] = None if rule is None else rule.source
    return columns


# The table.


def _label(paths: list[str]) -> str:
    if len(paths) == 1:
        return paths[0]
    components = []
    for column in zip(*(path.split("/") for path in paths), strict=True):
        components.append(column[0] if len(set(column)) == 1 else _ranges(sorted({int(number) for number in column})))
    return f"{'/'.join(components)} ×{len(paths)}"


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as 0-2,5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _key(rule: str | None, source: str | None) -> str:
    """A rule with the line it stands on."""
    line = f":{source.rpartition(':')[2]}" if source else ""
    return f"{rule}{line}" if rule else "–"
