"""The summary of a model: its sizes, and the formats and bytes of its modules."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from typing import TYPE_CHECKING, Any

from ..policies.dtypes import dtype_name
from ..policies.errors import count, shown
from ..policies.labels import folded_label, human_bytes
from ..policies.paths import is_scale
from ..policies.plan import Plan, Row, plan
from ..policies.policy import Policy
from ..policies.resolved import resolve
from ..policies.tables import Column, Report, Table, json_lines

if TYPE_CHECKING:
    from .config import DecoderConfig
    from .decoder import Decoder


@dataclasses.dataclass(frozen=True)
class ModelSummary(Report):
    """A table of a model's modules, with one line for equal layers; in a notebook it is shown as HTML.

    title  name of the model's class
    facts  what the lines below the table say, by name
    plan   formats and bytes of its parameters as they are stored
    """

    title: str
    facts: dict[str, str]
    plan: Plan

    def describe(self) -> str:
        """Returns the title and the facts, one a line."""
        width = max(map(len, self.facts))
        return "\n".join([self.title, *(f"  {name:<{width}}  {fact}" for name, fact in self.facts.items())])

    def to_json(self) -> str:
        """Returns modules and totals as JSON that suits a diff: one line for each module."""
        rows = [
            {"module": module, "parameters": _count(rows), "formats": _formats(rows), "bytes": _bytes(rows)}
            for module, rows in self._modules()
        ]
        return json_lines(rows, {"parameters": _count(self.plan.rows), "bytes": self.plan.total_bytes})

    def _modules(self) -> list[tuple[str, list[Row]]]:
        groups: dict[str, list[Row]] = {}
        for row in self.plan.rows:
            groups.setdefault(re.sub(r"(?<![^/])\d+(?![^/])", "#", _module(row.path)), []).append(row)
        return [(folded_label(sorted({_module(row.path) for row in rows})), rows) for rows in groups.values()]

    def _table(self) -> Table:
        columns = (
            Column("module"),
            Column("parameters", right=True),
            Column("stored as", colour=True),
            Column("bytes", right=True),
            Column("share", right=True, leave=1),
        )
        total = max(self.plan.total_bytes, 1)
        lines = [
            (module, f"{_count(rows):,}", _formats(rows), human_bytes(_bytes(rows)), f"{_bytes(rows) / total:.1%}")
            for module, rows in self._modules()
        ]
        return Table(columns, lines)

    def _notes(self) -> list[str]:
        return self.describe().splitlines()


def summarise(model: Decoder) -> ModelSummary:
    """The summary of a model."""
    config, stored = model.config, plan(resolve(Policy(kv_cache=model.kv_cache), model))
    bytes_by_dtype = ", ".join(f"{dtype_name(d)} {human_bytes(n)}" for d, n in stored.bytes_by_dtype.items())
    facts: dict[str, Any] = {
        "layers": config.num_hidden_layers,
        "sizes": f"hidden {config.hidden_size}, MLP {config.intermediate_size}, vocabulary {config.vocab_size}"
        + _experts(config)
        + (", the head is the embedding" if config.tie_word_embeddings else ""),
        "attention": f"{config.num_attention_heads} heads of {config.head_dim}, "
        f"{config.num_key_value_heads} for keys and values",
        "parameters": f"{_count(stored.rows):,} in {human_bytes(stored.total_bytes)}",
        "stored as": bytes_by_dtype,
        "activations": f"{dtype_name(model.activations)}, output {dtype_name(model.output)}",
    }
    if stored.kv_bytes:
        facts["kv cache"] = f"{dtype_name(model.kv_cache)}, {human_bytes(stored.kv_bytes)} a token"
    facts["policy"] = shown(model.policy)
    if config.source is not None:
        facts["config"] = str(config.source)
    return ModelSummary(type(model).__name__, {name: str(fact) for name, fact in facts.items()}, stored)


def _experts(config: DecoderConfig) -> str:
    """The experts of sparse layers, as a clause; empty without them."""
    sparse = [experts for i in range(config.num_hidden_layers) if (experts := config.experts(i))]
    return f", {max(sparse)} experts of {config.expert_size} in {count(len(sparse), 'layer')}" if sparse else ""


def _module(path: str) -> str:
    """The module of a parameter as the table has it: `layers/3/mlp`, or a part of the model such as `norm`."""
    return "/".join(path.split("/")[:-1][:3])


def _count(rows: Any) -> int:
    return sum(math.prod(row.shape) for row in rows if not is_scale(row.path))


def _bytes(rows: list[Row]) -> int:
    return sum(row.bytes for row in rows)


def _formats(rows: list[Row]) -> str:
    """The formats of the parameters, the one of most bytes first; scales count as part of theirs."""
    sizes: collections.Counter[str] = collections.Counter()
    for row in rows:
        if not is_scale(row.path) and row.format is not None:
            sizes[row.format] += row.bytes
    return ", ".join(name for name, _ in sizes.most_common())
