"""The plan: what a policy does to every parameter, as data and as a table, before anything is allocated."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from . import dtypes
from .blocks import grid_shape
from .errors import InvalidPolicy
from .matmul import Target, matmul_plan
from .policy import Policy
from .resolution import Answer, resolve
from .slots import DEFAULT_BLOCK, is_scale, scale_path
from .storage import Change, Step, plan_storage
from .trees import Found
from .trees import found as found_in


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter, or the scales of one.

    path            where it stands
    shape           as stored afterwards
    found           dtype before; None for scales that are made
    storage         dtype afterwards; None for scales that are dissolved
    compute         what the compute slot says; None: narrow kernels as stored, anything else in the activations' dtype
    storage_rule    the key of the `params` slot that decided, "default", or None
    storage_source  file and line of that key
    compute_rule    likewise of the `compute` slot
    compute_source  likewise
    change          kept, cast, quantised, dequantised or requantised; of scales also made or dissolved
    bytes_before    as found
    bytes           as stored
    matmul          of a kernel, where the plan was asked for a target: what multiplies with it, for a row | for 512
    """

    path: str
    shape: tuple[int, ...]
    found: np.dtype | None
    storage: np.dtype | None
    compute: np.dtype | None
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
    """What a policy resolved to; `str(plan)` is the table, in which equal layers share a line.

    rows         one a parameter, in the tree's order, scales after their kernel
    activations  the dtype of activations, None where the policy leaves it to the model
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
        """Bytes of all parameters as found."""
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
            ("path", "shape", "found", "storage", "compute", *named, "rule (params | compute)", "bytes")
        ]
        for label, rows in self._folded():
            lines.append((label, *self._cells(rows[0]), human_bytes(sum(row.bytes for row in rows))))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line[:-1], widths[:-1], strict=True)) for line in lines
        ]
        return "\n".join(
            [*(f"{row}  {line[-1]:>{widths[-1]}}" for row, line in zip(table, lines, strict=True)), "", self.summary()]
        )

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
        found = "–" if row.found is None else dtypes.dtype_name(row.found)
        storage = "" if row.storage is None else dtypes.dtype_name(row.storage)
        change = "" if row.change == "kept" else row.change
        if is_scale(row.path):
            compute = ""
        elif row.compute is not None:
            compute = dtypes.dtype_name(row.compute)
        elif row.storage is not None and dtypes.is_narrow(row.storage):
            compute = "as stored"
        else:
            compute = "–" if self.activations is None else f"({dtypes.dtype_name(self.activations)})"
        rules = [_key(row.storage_rule, row.storage_source), _key(row.compute_rule, row.compute_source)]
        cells = ["×".join(map(str, row.shape)), found, f"{storage} {change}".strip(), compute]
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
                f"{len(self.rows) - scales} parameters and {scales} grids of scales: "
                + ", ".join(f"{count} {change}" for change, count in sorted(changed.items())),
                f"stored in {human_bytes(self.total_bytes)} ({totals}), "
                f"found in {human_bytes(self.total_bytes_before)}",
                *([f"largest: {self.largest.path}, {human_bytes(self.largest.bytes)}"] if self.largest else []),
                *filter(None, [", ".join(names)]),
            ]
        )


def human_bytes(count: int) -> str:
    """`count` bytes as people read them: 1.5 MiB."""
    power = min(max(count.bit_length() - 1, 0) // 10, 4)
    return f"{count} B" if power == 0 else f"{count / 1024**power:.1f} {'KMGT'[power - 1]}iB"


def explain(policy: Policy, tree: Any, activations: np.dtype | None = None, target: str | Target | None = None) -> Plan:
    """See `Policy.explain`; `activations` is the model's own dtype, for where the policy names none."""
    found = found_in(tree)
    steps, answers = plan_storage(policy, found)
    own = activations or getattr(getattr(tree, "config", None), "dtype", None)
    activations = policy.activations or own
    # The compute slot speaks of what is there once things are stored: a dissolved scale is gone, a made one has come.
    stored = [path for path in found if not is_scale(path)]
    computed = resolve(
        "compute", policy.compute, [*stored, *(scale_path(path) for path in stored if steps[path].scale)]
    )
    rows = []
    for path, step in steps.items():
        check_compute(path, found[path], computed[path])
        # Rules name integers and the like without effect; a row says what happens.
        cast = step.scale is not None or step.found_scale is not None or dtypes.is_floating(found[path].dtype)
        params, compute = (answers[path], computed[path]) if cast else (Answer(), Answer())
        row = _row(path, found[path].shape, found[path], step.storage, step.change, params, compute)
        if target is not None and path.rpartition("/")[2] == "kernel" and len(row.shape) == 2:
            row = dataclasses.replace(row, matmul=_matmul(row, step, activations, target))
        rows.append(row)
        if step.scale or step.found_scale:
            scales = scale_path(path)
            answer = computed.get(scales, Answer())
            rows.append(_scale_row(found[path], step, scales, found.get(scales), answers[scales], answer))
    # A module that knows nothing of perparam returns what it will; a model of ours its activations' dtype.
    kv_cache = policy.kv_cache or activations
    kv_bytes = 0 if kv_cache is None else _kv_bytes(found, kv_cache)
    output = policy.output or (activations if own is not None else None)
    return Plan(tuple(rows), activations, output, kv_cache if kv_bytes else None, kv_bytes)


def _kv_bytes(found: Mapping[str, Found], dtype: np.dtype) -> int:
    """Bytes that attention layers keep of a token: what their `k_proj` and `v_proj` make, and scales for each head."""
    total = 0
    for path, one in found.items():
        if path.endswith(("/k_proj/kernel", "/v_proj/kernel")):
            total += one.shape[0] * dtype.itemsize
            norm = found.get(f"{path.rpartition('/')[0].rpartition('/')[0]}/k_norm/scale")
            if dtypes.is_narrow(dtype) and norm is not None:
                total += 4 * one.shape[0] // norm.shape[0]
    return total


def check_compute(path: str, one: Found, answer: Answer) -> None:
    """Raises InvalidPolicy where a parameter that no matmul takes is to be computed narrow."""
    if answer.dtype is not None and dtypes.is_narrow(answer.dtype) and len(one.shape) < 2:
        raise InvalidPolicy(
            f"{answer.where}{answer.rule!r} (compute) asks "
            f"{dtypes.dtype_name(answer.dtype)} of {path!r}, whose shape is {one.shape}. "
            "Only kernels of two or more dimensions are computed narrow."
        )


def _matmul(row: Row, step: Step, activations: np.dtype | None, target: str | Target) -> str:
    """The implementations that multiply with a kernel, for a row of activations and for 512."""
    assert row.storage is not None
    out_features, in_features = row.shape
    names = [
        matmul_plan(
            rows,
            (out_features, in_features),
            x=activations or np.dtype(np.float32),
            kernel=row.storage,
            block=step.block or DEFAULT_BLOCK,
            compute=row.compute,
            target=target,
        ).implementation
        for rows in (1, 512)
    ]
    return " | ".join(dict.fromkeys(names))


def _scale_row(kernel: Found, step: Step, path: str, before: Found | None, params: Answer, compute: Answer) -> Row:
    """The row of the scales at `path`, which belong to `kernel`."""
    if step.scale is None or step.block is None:
        assert before is not None
        return _row(path, before.shape, before, None, "dissolved", params, Answer())
    change: Change = "made" if before is None else step.change
    if change == "kept" and step.scale != step.found_scale:
        change = "cast"
    return _row(path, grid_shape(kernel.shape, step.block), before, step.scale, change, params, compute)


def _row(
    path: str,
    shape: tuple[int, ...],
    before: Found | None,
    storage: np.dtype | None,
    change: Change,
    params: Answer,
    compute: Answer,
) -> Row:
    after = Found(shape, storage).bytes if storage is not None else 0
    return Row(
        path,
        shape,
        before.dtype if before else None,
        storage,
        compute.dtype,
        params.rule,
        params.source,
        compute.rule,
        compute.source,
        change,
        before.bytes if before else 0,
        after,
    )


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
