"""The audit: the numerical error that a policy causes, in each parameter and in the logits."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from ..models.decoder import CausalLM
from ..models.heads import check_causal_lm
from ..policies.blocks import Block, block_amax, expand, split_blocks
from ..policies.dtypes import largest
from ..policies.errors import InvalidTokens, count
from ..policies.formats import Format
from ..policies.labels import human_bytes
from ..policies.plan import Plan, Row, plan
from ..policies.presets import PolicyLike, get_policy
from ..policies.resolved import Resolved, ResolvedParam, resolve
from ..policies.scaled_array import ScaledArray
from ..policies.store import store_param
from ..policies.tables import Column, Report, Table, json_lines
from ..policies.trees import parameters
from .load import load_model
from .metrics import divergence, float32_logits
from .windows import token_ids, token_windows


@dataclasses.dataclass(frozen=True)
class AuditRow:
    """The error that storage causes in one parameter, relative to its present value in float32.

    plan         the plan's row
    error        Frobenius norm of the difference over that of the parameter
    worst_error  the same for the block with the largest relative error
    worst_block  that block's index in the grid, leading axes first
    saturated    share of values beyond the range of the storage dtype, which were clipped
    """

    plan: Row
    error: float
    worst_error: float
    worst_block: tuple[int, ...]
    saturated: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the numbers, with path, change and formats of the plan's row."""
        row = self.plan.to_dict()
        plan = {name: row[name] for name in ("path", "change", "current", "format", "bytes")}
        return plan | {name: getattr(self, name) for name in ("error", "worst_error", "worst_block", "saturated")}


_SHOWN = 20
"""Rows in the printed table."""


@dataclasses.dataclass(frozen=True)
class Audit(Report):
    """The error that a policy causes, an iterable of rows; `str(audit)` is the table of the parameters it changes.

    In a notebook an audit is shown as HTML.

    plan         the policy's plan
    rows         one for each parameter, without the scales
    logit_error  Frobenius norm of the logits' difference over that of the float32 logits
    kl           mean over tokens of KL(float32 || policy), in nats
    top1         share of tokens for which both models have the same most likely next token
    tokens       number of tokens compared
    """

    plan: Plan
    rows: tuple[AuditRow, ...]
    logit_error: float
    kl: float
    top1: float
    tokens: int

    def to_json(self) -> str:
        """Returns rows and totals as JSON that suits a diff: one line for each row, the same in every run."""
        totals = {
            "logit_error": self.logit_error,
            "kl": self.kl,
            "top1": self.top1,
            "tokens": self.tokens,
            "bytes_before": self.plan.total_bytes_before,
            "bytes": self.plan.total_bytes,
        }
        return json_lines((row.to_dict() for row in self.rows), totals)

    @property
    def _changed(self) -> list[AuditRow]:
        """The rows that storage changes, the largest error first."""
        return sorted((row for row in self.rows if row.error > 0), key=lambda row: -row.error)

    def _table(self) -> Table:
        columns = (
            Column("path"),
            Column("change", colour=True),
            Column("error", right=True),
            Column("worst block", right=True),
            Column("at", leave=2),
            Column("saturated", right=True, leave=1),
        )
        lines = [
            (
                row.plan.path,
                row.plan.change,
                f"{row.error:.2e}",
                f"{row.worst_error:.2e}",
                ",".join(map(str, row.worst_block)) or "–",
                f"{row.saturated:.2%}",
            )
            for row in self._changed[:_SHOWN]
        ]
        return Table(columns, lines)

    def _legend(self, columns: Collection[str]) -> list[str]:
        more = len(self._changed) - _SHOWN
        if not self._changed:
            return ["storage changes no parameter"]
        return [f"and {more} more that change less"] if more > 0 else []

    def _notes(self) -> list[str]:
        before, after = (human_bytes(size) for size in (self.plan.total_bytes_before, self.plan.total_bytes))
        return [
            f"{count(self.tokens, 'token')} against float32: logits off by {self.logit_error:.2e} (relative), "
            f"KL {self.kl:.2e} nats, top-1 agreement {self.top1:.2%}",
            f"stored in {after}, now in {before}",
        ]

    def __iter__(self) -> Iterator[AuditRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def audit(
    model: CausalLM | str | os.PathLike[str],
    policy: PolicyLike,
    tokens: ArrayLike | None = None,
    attention_mask: ArrayLike | None = None,
    *,
    text: str | None = None,
    revision: str | None = None,
) -> Audit:
    """The error that `policy` causes, relative to the same parameters dequantised and computed in float32.

    model           a model, or a checkpoint as for `load_model`
    policy          anything `get_policy` accepts
    tokens          (length,) or (batch, length) ids to compare logits on; rows are cut into windows of 256 tokens
    attention_mask  the same shape, nonzero for real tokens; None: all are real
    text            a text instead of tokens, for the checkpoint's tokenizer
    revision        branch, tag or commit of a repository on the hub

    Holds two models in memory at once: in float32 and under the policy.

    Raises:
      InvalidTokens: tokens that do not fit the model, or neither or both of tokens and text.
      UnsupportedTask: a model without a language-model head.
    """
    model = load_model(model, revision=revision) if isinstance(model, (str, os.PathLike)) else model
    check_causal_lm(model.config.task, "audit")
    source = model.config.source
    given = token_ids(tokens, text, None if source is None else source.parent)
    ids, mask = token_windows(given, attention_mask, model.config.vocab_size)
    if not mask.any():
        raise InvalidTokens(f"tokens: expected real tokens, found none in {np.shape(given)}.")
    resolved = resolve(get_policy(policy), model)
    costs = plan(resolved)
    rows = _rows(resolved, costs, parameters(model))
    programs = [float32_logits(each) for each in (model.with_policy("f32"), model.as_resolved(resolved))]
    sums = np.zeros(4)
    for window, real in zip(ids, mask, strict=True):
        exact, logits = (run(window[None], real[None])[0][real] for run in programs)
        kl, agrees = divergence(exact, logits)
        squares = (jnp.square(x).sum() for x in (logits - exact, exact))
        sums += np.array([*squares, kl.sum(), agrees.sum()], np.float64)
    (difference, size, kls, agreements), count = sums, int(mask.sum())
    return Audit(
        costs,
        rows,
        logit_error=float(np.sqrt(difference / size)) if difference else 0.0,
        kl=float(kls) / count,
        top1=float(agreements) / count,
        tokens=count,
    )


def _relative(difference: jax.Array, exact: jax.Array) -> float:
    """|difference| / |exact| in the Frobenius norm; 0 where both are zero."""
    norm = float(jnp.linalg.norm(difference.ravel()))
    return norm / float(jnp.linalg.norm(exact.ravel())) if norm else 0.0


def _rows(resolved: Resolved, costs: Plan, before: Mapping[str, Any]) -> tuple[AuditRow, ...]:
    return tuple(_row(row, resolved.params[row.path], before) for row in costs.rows if row.path in resolved.params)


def _row(row: Row, param: ResolvedParam, before: Mapping[str, Any]) -> AuditRow:
    if param.change == "kept":
        return AuditRow(row, 0.0, 0.0, (), 0.0)
    values, scales = before[param.path], before.get(param.scale_path)
    exact = _weight(param.current.format, values, scales)
    values, scales = store_param(param, values, scales)
    stored = _weight(param.format, values, scales)
    at_limit = jnp.abs(values.astype(jnp.float32)) == largest(param.format.values)
    # Clipped, and not merely rounded: a block's largest value becomes the largest code, give or take an ulp.
    clipped = at_limit & (jnp.abs(exact) > jnp.abs(stored) * (1 + 2.0**-20))
    worst_error, worst_block = _worst(exact, stored, param.format.block or param.current.block)
    return AuditRow(row, _relative(stored - exact, exact), worst_error, worst_block, float(clipped.mean()))


def _weight(format: Format, values: jax.Array, scale_inv: jax.Array | None) -> jax.Array:
    """A parameter in float32."""
    return values.astype(jnp.float32) if scale_inv is None else ScaledArray(values, scale_inv, format).dequantize()


def _worst(exact: jax.Array, stored: jax.Array, block: Block | None) -> tuple[float, tuple[int, ...]]:
    """The largest relative error of a block, and the block's index; without blocks the parameter is one block."""
    if block is None:
        return _relative(stored - exact, exact), ()
    # Divided by the block's largest value first, so that the squares of small blocks do not underflow.
    amax = block_amax(exact, block)
    unit = expand(jnp.where(amax > 0, amax, 1.0), exact.shape, block)
    error, size = (jnp.square(split_blocks(x / unit, block)).sum(axis=(-3, -1)) for x in (stored - exact, exact))
    ratio = jnp.sqrt(jnp.where(size > 0, error / jnp.where(size > 0, size, 1.0), 0.0))
    place = tuple(int(i) for i in np.unravel_index(int(jnp.argmax(ratio)), ratio.shape))
    return float(ratio[place]), place
