"""Plans: the effect of a policy on every parameter, as data and as a table, without allocating arrays."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
from jax.sharding import Sharding

from . import dtypes
from .checks import clauses
from .errors import InvalidSharding, count
from .labels import folded_label, human_bytes
from .matmul import Choice, Target, matmul_plan
from .matmul.dispatch import FALLBACKS, candidates
from .matmul.grouped_dispatch import LOOP_OF, grouped_plan
from .paths import is_scale
from .resolved import Change, Decisions, Resolved, ResolvedParam
from .tables import Column, Report, Table, json_lines
from .training.memory import ParamMemory, TrainingMemory
from .trees import ArrayInfo

_RULE = "rule (params | compute)"
_TRAINING = "grads | state | master"

Shardings = Mapping[str, Sharding | None]
"""{path: sharding} of every parameter and all scales after storage; None: on one device."""

ToShardings = Callable[[Mapping[str, ArrayInfo]], Shardings]
"""A function of {path: shape and format} after storage that returns Shardings."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a plan: a parameter, or the scales of a parameter.

    path            path of the parameter or of the scales
    shape           shape after storage; for scales that storage removes, the current shape
    current         dtype before storage; None for scales that storage creates
    storage         dtype after storage; None for scales that storage removes
    format          the format after storage as text: "f8_e4m3fn", "int8 1×all" or a format's name; None likewise
    compute         dtype in the compute slot; None: a narrow parameter as stored, another in the activations' dtype
    compute_format  the format in the compute slot as text; None likewise
    storage_rule    key of the rule in the `params` slot that applies: a pattern, "default", or None
    storage_source  file and line of that rule
    compute_rule    key of the rule in the `compute` slot that applies
    compute_source  file and line of that rule
    change          kept, cast, quantised, dequantised or requantised; for scales also made or dissolved (removed)
    bytes_before    bytes before storage
    bytes           bytes after storage
    matmul          for a kernel in a plan with a target: the implementations of the matmul for 1 | 512 rows
    matmul_refused  for a kernel without an implementation made for the target: which ones do not accept it, and why,
                    or that none is made
    matmul_checks   for a kernel whose implementations include kernels made for the target: which of them were checked
                    on a device of this process or refused, which were not, and why
    device_bytes    in a plan with shardings: bytes after storage on a device that has a part of it
    training        in a plan with an optimizer, for a parameter that is trained: formats and bytes of its gradient, of
                    the optimizer's state for it and of its master
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
    matmul_refused: str | None = None
    matmul_checks: str | None = None
    device_bytes: int | None = None
    training: ParamMemory | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields of the row, with the names of dtypes; `training` only if the parameter is trained."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.training is None:
            del fields["training"]
        else:
            fields["training"] = self.training.to_dict()
        return {name: dtypes.dtype_name(x) if isinstance(x, np.dtype) else x for name, x in fields.items()}


@dataclasses.dataclass(frozen=True)
class Plan(Report):
    """The effect of a policy on a tree of parameters, an iterable of rows.

    `str(plan)` is a table with one line for equal layers; in a notebook a plan is shown as HTML.

    rows         one for each parameter and for its scales, in the tree's order, scales after their kernel
    activations  the dtype of activations; None if neither the policy nor the model specifies it
    output       the dtype of the model's result; None likewise
    kv_cache     the dtype of keys and values; None for a tree without them, or a model without a cache and a rule
    kv_bytes     bytes of cached keys and values for each token, including scales; 0 without a cache
    unused       what the policy sets without effect on this tree, as sentences
    training     the memory that training adds; None for a plan without an optimizer
    """

    rows: tuple[Row, ...]
    activations: np.dtype | None = None
    output: np.dtype | None = None
    kv_cache: np.dtype | None = None
    kv_bytes: int = 0
    unused: tuple[str, ...] = ()
    training: TrainingMemory | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes of all parameters and scales after storage."""
        return sum(row.bytes for row in self.rows)

    @property
    def total_bytes_before(self) -> int:
        """Bytes of all parameters and scales before storage."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def device_bytes(self) -> int | None:
        """Bytes after storage on a device that has a part of every array; None for a plan without shardings."""
        sizes = [row.device_bytes for row in self.rows]
        return None if not sizes or None in sizes else sum(filter(None, sizes))

    @property
    def bytes_by_dtype(self) -> dict[np.dtype, int]:
        """Bytes after storage by dtype, in descending order."""
        totals: collections.Counter[np.dtype] = collections.Counter()
        for row in self.rows:
            if row.storage is not None:
                totals[row.storage] += row.bytes
        return dict(totals.most_common())

    @property
    def largest(self) -> Row | None:
        """The row with the most bytes after storage; None for a plan without rows."""
        return max(self.rows, key=lambda row: row.bytes, default=None)

    @property
    def totals(self) -> dict[str, Any]:
        """Totals and dtypes that JSON has besides the rows."""
        training = {} if self.training is None else {"training": self.training.to_dict()}
        return {
            "activations": self.activations and dtypes.dtype_name(self.activations),
            "output": self.output and dtypes.dtype_name(self.output),
            "kv_cache": self.kv_cache and dtypes.dtype_name(self.kv_cache),
            "kv_bytes": self.kv_bytes,
            "unused": self.unused,
            "bytes_before": self.total_bytes_before,
            "bytes": self.total_bytes,
            "device_bytes": self.device_bytes,
            "bytes_by_dtype": {dtypes.dtype_name(dtype): count for dtype, count in self.bytes_by_dtype.items()},
            **training,
        }

    def to_json(self) -> str:
        """Returns rows and totals as JSON that suits a diff: one line for each row, the same in every run."""
        return json_lines((row.to_dict() for row in self.rows), self.totals)

    def _table(self) -> Table:
        shares = self.device_bytes is not None
        lines = []
        for label, rows in self._folded():
            sizes = [sum(row.bytes for row in rows)]
            sizes += [sum(row.device_bytes or 0 for row in rows)] if shares else []
            sizes += [sum(row.training.bytes for row in rows if row.training)] if self.training else []
            lines.append((label, *self._cells(rows[0]), *map(human_bytes, sizes)))
        columns = [
            Column("path"),
            Column("shape", leave=2),
            Column("current", leave=1, colour=True),
            Column("storage", colour=True),
            Column("compute", leave=4, colour=True),
            *([Column("matmul (1 | 512 rows)")] if self._has_target else []),
            *([Column(_TRAINING, leave=5, colour=True)] if self.training else []),
            Column(_RULE, leave=3),
            Column("bytes", right=True),
            *([Column("per device", right=True)] if shares else []),
            *([Column("training", right=True)] if self.training else []),
        ]
        return Table(tuple(columns), lines)

    def _legend(self, columns: Collection[str]) -> list[str]:
        changes, cells = {row.change for row in self.rows}, [self._cells(row) for row in self.rows]
        computes = {cell[3] for cell in cells if "compute" in columns}
        activations = self.activations and f"({dtypes.dtype_name(self.activations)})"
        found = {
            "made: scales that storage adds": "made" in changes,
            "dissolved: scales that storage multiplies into the values and removes": "dissolved" in changes,
            "as stored: the matmul takes narrow values and their scales": "as stored" in computes,
            f"{activations}: no dtype from a rule, so that of activations": activations in computes,
            "– under compute: in the dtype of activations, which nothing names": "–" in computes,
            "training: bytes of gradients, the optimizer's state and masters": self.training is not None,
            "– under rule: no rule": _RULE in columns and any("–" in cell[-1] for cell in cells),
        }
        shown = "; ".join(text for text, occurs in found.items() if occurs)
        refused: dict[str, list[str]] = {}
        for label, rows in self._folded():
            if rows[0].matmul_refused is not None:
                refused.setdefault(rows[0].matmul_refused, []).append(label)
        reasons = (
            f"{labels[0]}{f' and {len(labels) - 1} more' if labels[1:] else ''}: {why}"
            for why, labels in refused.items()
        )
        checks = dict.fromkeys(row.matmul_checks for row in self.rows if row.matmul_checks is not None)
        return [*filter(None, [shown]), *reasons, *checks]

    def _notes(self) -> list[str]:
        return self.summary().splitlines()

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def _has_target(self) -> bool:
        return any(row.matmul for row in self.rows)

    def _folded(self) -> list[tuple[str, list[Row]]]:
        """Returns `(label, rows)` for each line of the table.

        Rows that differ only in the numbers of their path share a line: `layers/0-27/mlp/up_proj/kernel ×28`.
        """
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((re.sub(r"(?<![^/])\d+(?![^/])", "#", row.path), *self._cells(row)), []).append(row)
        return [(folded_label([row.path for row in group]), group) for group in groups.values()]

    def _cells(self, row: Row) -> tuple[str, ...]:
        """Returns the cells of a row in the table, without path and bytes."""
        current = "–" if row.current is None else dtypes.dtype_name(row.current)
        storage = row.format or ""
        change = "" if row.change == "kept" else row.change
        if is_scale(row.path) or (row.storage is not None and not dtypes.can_store(row.storage)):  # scales, integers
            compute = ""
        elif row.compute_format is not None:
            compute = row.compute_format
        elif row.storage is not None and dtypes.is_narrow(row.storage):
            compute = "as stored"
        else:
            compute = "–" if self.activations is None else f"({dtypes.dtype_name(self.activations)})"
        rules = [_key(row.storage_rule, row.storage_source), _key(row.compute_rule, row.compute_source)]
        cells = ["×".join(map(str, row.shape)), current, f"{storage} {change}".strip(), compute]
        cells += [row.matmul or ""] if self._has_target else []
        cells += ["" if row.training is None else str(row.training)] if self.training else []
        return *cells, " | ".join(rules)

    def summary(self) -> str:
        """Returns the totals as a few lines of text."""
        totals = ", ".join(
            f"{dtypes.dtype_name(dtype)} {human_bytes(count)}" for dtype, count in self.bytes_by_dtype.items()
        )
        scales = sum(is_scale(row.path) for row in self.rows)
        changed = collections.Counter(row.change for row in self.rows)
        names = [f"activations {dtypes.dtype_name(self.activations)}"] if self.activations else []
        names += [f"output {dtypes.dtype_name(self.output)}"] if self.output else []
        if self.kv_cache is not None:
            kv_cache = dtypes.dtype_name(self.kv_cache)
            cached = f"kv cache {kv_cache}, {human_bytes(self.kv_bytes)} a token"
            names.append(cached if self.kv_bytes else f"keys and values {kv_cache}")
        return "\n".join(
            [
                f"{count(len(self.rows) - scales, 'parameter')} and {count(scales, 'grid')} of scales: "
                + ", ".join(f"{number} {change}" for change, number in sorted(changed.items())),
                f"stored in {human_bytes(self.total_bytes)} ({totals}), now in {human_bytes(self.total_bytes_before)}",
                *([] if self.device_bytes is None else [f"on each device: {human_bytes(self.device_bytes)}"]),
                *([f"largest: {self.largest.path}, {human_bytes(self.largest.bytes)}"] if self.largest else []),
                *filter(None, [", ".join(names)]),
                *([] if self.training is None else self.training.lines(self.total_bytes)),
                *self.unused,
            ]
        )


def plan(
    resolved: Resolved,
    target: str | Target | None = None,
    sharding: Shardings | ToShardings | None = None,
    training: TrainingMemory | None = None,
) -> Plan:
    """Returns the plan of a resolved tree; see `Policy.explain`."""
    rows: list[Row] = []
    for param in resolved.params.values():
        row = _row(param)
        # Only in perparam's models, which have a cache, kernels with three axes are those of experts.
        if param.path.rpartition("/")[2] == "kernel" and len(param.shape) in ((2, 3) if resolved.kv_bytes else (2,)):
            row = row if target is None else _with_matmul(row, param, resolved.activations, Target.parse(target))
        rows.append(row if training is None else dataclasses.replace(row, training=training.params.get(param.path)))
        if param.has_scales or param.format.scale is not None:
            rows.append(_scale_row(param))
    if sharding is not None:
        where = sharding(resolved.stored) if callable(sharding) else sharding
        rows = [dataclasses.replace(row, device_bytes=_device_bytes(row, where)) for row in rows]
    unused: tuple[str, ...] = ()
    if resolved.policy.kv_cache is not None and resolved.kv_cache is None:
        kv_cache = dtypes.dtype_name(resolved.policy.kv_cache)
        unused = (f"kv_cache: {kv_cache} has no effect on this tree, which is not a model of perparam with a cache.",)
    dtypes_of_model = resolved.activations, resolved.output, resolved.kv_cache, resolved.kv_bytes
    return Plan(tuple(rows), *dtypes_of_model, unused, training)


def _device_bytes(row: Row, shardings: Shardings) -> int:
    """Returns the bytes of the row's array after storage on a device that has a part of it."""
    if row.storage is None:
        return 0
    if row.path not in shardings:
        raise InvalidSharding(
            f"{row.path}: no sharding. Pass one for every parameter and all scales after storage; None is one device."
        )
    sharding = shardings[row.path]
    shape = row.shape if sharding is None else sharding.shard_shape(row.shape)
    return math.prod(shape) * row.storage.itemsize


def _with_matmul(row: Row, param: ResolvedParam, activations: np.dtype | None, target: Target) -> Row:
    """Returns the row of a kernel with its fields about the matmul, for 1 and for 512 rows of activations."""
    choices = [_choice(rows, param, activations or np.dtype(np.float32), target) for rows in (1, 512)]
    refused: dict[str, list[str]] = {}
    if choices[0].refused and FALLBACKS.issuperset(one.name for one in candidates(target)):
        unknown = " of unknown compute capability" if target == Target("cuda") else ""
        refused = {f"no implementation is made for {target}{unknown}": []}
    elif all(choice.implementation.removeprefix(LOOP_OF) in FALLBACKS for choice in choices):
        for name, why in choices[0].refused:
            if name not in FALLBACKS and (name, why) in choices[1].refused:
                refused.setdefault(why, []).append(name)
    return dataclasses.replace(
        row,
        matmul=" | ".join(dict.fromkeys(choice.implementation for choice in choices)),
        matmul_refused="; ".join(f"not {' or '.join(names)}: {why}" if names else why for why, names in refused.items())
        or None,
        matmul_checks="; ".join(clauses(check for choice in choices for check in choice.checks)) or None,
    )


def _choice(rows: int, param: ResolvedParam, x: np.dtype, target: Target) -> Choice:
    """Returns the implementation of the products with a kernel (out, in), or with kernels (experts, out, in)."""
    if len(param.shape) == 3:
        experts, out_features, in_features = param.shape
        shape = experts, out_features, in_features
        return grouped_plan(rows, shape, x=x, kernel=param.format, compute=param.compute, target=target)
    out_features, in_features = param.shape
    shape_of_one = out_features, in_features
    return matmul_plan(rows, shape_of_one, x=x, kernel=param.format, compute=param.compute, target=target)


def _row(param: ResolvedParam) -> Row:
    """Returns the row of a parameter without its scales."""
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
    """Returns the row of the scales of a parameter."""
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
    """Returns the fields of a row that show which rules apply; None without a rule."""
    columns: dict[str, Any] = {}
    for slot, column in (("params", "storage"), ("compute", "compute")):
        rule = rules.get(slot)
        columns[f"{column}_rule"] = None if rule is None else rule.key
        columns[f"{column}_source"] = None if rule is None else rule.source
    return columns


def _key(rule: str | None, source: str | None) -> str:
    """Returns the key of a rule, with its line if it has a source; "–" without a rule."""
    line = f":{source.rpartition(':')[2]}" if source else ""
    return f"{rule}{line}" if rule else "–"
