"""`compare`: perplexity, divergence, agreement, bytes and speed of one model under several policies."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import ArrayLike

from ..models.decoder import CausalLM
from ..models.generation import generate
from ..models.tokens import checked_tokens
from ..policies.errors import InvalidTokens, MissingPackage, UnsupportedExport
from ..policies.plan import human_bytes, plan
from ..policies.policy import Policy
from ..policies.presets import PolicyLike, get_policy
from ..policies.resolved import resolve
from ..policies.tables import table
from .load import load_model
from .metrics import divergence, mean_and_error, next_token_loss

WINDOW = 256
"""Tokens of a window; no window sees the one before it."""

TEXT = (
    "When on board H.M.S. Beagle, as naturalist, I was much struck with certain facts in the distribution of the "
    "inhabitants of South America, and in the geological relations of the present to the past inhabitants of that "
    "continent. These facts seemed to me to throw some light on the origin of species, that mystery of mysteries, "
    "as it has been called by one of our greatest philosophers. On my return home, it occurred to me, in 1837, "
    "that something might perhaps be made out on this question by patiently accumulating and reflecting on all "
    "sorts of facts which could possibly have any bearing on it. After five years' work I allowed myself to "
    "speculate on the subject, and drew up some short notes; these I enlarged in 1844 into a sketch of the "
    "conclusions, which then seemed to me probable: from that period to the present day I have steadily pursued "
    "the same object. I hope that I may be excused for entering on these personal details, as I give them to show "
    "that I have not been hasty in coming to a decision."
)
"""The default text: the beginning of Darwin's Origin of Species (1859)."""


@dataclasses.dataclass(frozen=True)
class Compared:
    """Accuracy, size and speed of a model under one policy.

    perplexity         exp of the mean loss of the text's next tokens
    perplexity_error   its standard error, with windows of text as samples; NaN for a text of one window
    kl                 mean over tokens of KL(first policy || this one), in nats
    top1               share of tokens with the same most likely next token as under the first policy
    bytes              bytes of all parameters as stored
    kv_bytes           bytes of keys and values for each token
    tokens_per_second  speed of decoding one row
    """

    name: str
    perplexity: float
    perplexity_error: float
    kl: float
    top1: float
    bytes: int
    kv_bytes: int
    tokens_per_second: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Several policies side by side, the first one as the reference; `str` of it is the table."""

    rows: tuple[Compared, ...]
    tokens: int

    def __iter__(self) -> Iterator[Compared]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        lines = [("policy", "perplexity", "KL, nats", "top-1", "parameters", "cache/token", "tokens/s")]
        lines += [
            (
                row.name, _with_error(row.perplexity, row.perplexity_error), f"{row.kl:.2e}", f"{row.top1:.2%}",
                human_bytes(row.bytes), human_bytes(row.kv_bytes), f"{row.tokens_per_second:.1f}",
            )
            for row in self.rows
        ]  # fmt: skip
        notes = f"KL and top-1 are relative to {self.rows[0].name}\n{self.tokens} tokens of text"
        return f"{table(lines, right=len(lines[0]) - 1)}\n\n{notes}"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Writes a plot of the table to `path`.

        Raises:
          MissingPackage, UnsupportedExport: see `check_plot`.
        """
        check_plot(path)
        from matplotlib.figure import Figure

        panels = (
            ("perplexity, with standard error", [row.perplexity for row in self.rows]),
            (f"KL from {self.rows[0].name}, nats", [row.kl for row in self.rows]),
            ("parameters, MiB", [row.bytes / 2**20 for row in self.rows]),
            ("decoding, tokens/s", [row.tokens_per_second for row in self.rows]),
        )
        names = [row.name if len(row.name) <= 24 else f"…{row.name[-23:]}" for row in self.rows]
        figure = Figure(figsize=(10, 1.2 + 0.45 * len(names) * 2), layout="constrained")
        for axes, (title, values) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            errors = [row.perplexity_error for row in self.rows[::-1]] if title.startswith("perplexity") else None
            bars = axes.barh(names[::-1], values[::-1], xerr=errors, color="#4878a8", ecolor="#303030")
            axes.bar_label(bars, [f"{value:.3g}" for value in values[::-1]], padding=3)
            axes.set_title(title, fontsize=10, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
            axes.margins(x=0.2)
        figure.savefig(path, dpi=120)


def _name(index: int, policy: PolicyLike) -> str:
    """The name of a policy in the table: its own text or path, or else a number such as "policy 2"."""
    return str(policy) if isinstance(policy, (str, os.PathLike)) else f"policy {index + 1}"


def _with_error(value: float, error: float) -> str:
    """A number with its standard error, where there is one."""
    return f"{value:.4f}" if math.isnan(error) else f"{value:.4f} ± {error:.2g}"


def check_plot(path: str | os.PathLike[str]) -> None:
    """Raises an error if a plot cannot be written to `path`; to be called before anything is computed.

    Raises:
      MissingPackage: without matplotlib.
      UnsupportedExport: a file type that matplotlib cannot write, or a folder that does not exist.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise MissingPackage("a plot needs matplotlib. Install it: pip install matplotlib.") from error
    path = pathlib.Path(path)
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds or not path.parent.is_dir():
        raise UnsupportedExport(
            f"{path}: a plot cannot be written there. Name a file such as costs.png in an existing folder."
        )


def compare(
    path: str | os.PathLike[str],
    policies: Mapping[str, PolicyLike] | Sequence[PolicyLike],
    tokens: ArrayLike,
    *,
    revision: str | None = None,
) -> Comparison:
    """Accuracy, size and speed of a checkpoint under each policy, relative to the first one.

    path      a folder or a name on the hub, as for `load_model`
    policies  anything `get_policy` accepts: a mapping from names, or a sequence
    tokens    (count,) ids of a text
    revision  branch, tag or commit of the repository on the hub

    At most two models are in memory at a time.

    Raises:
      InvalidTokens: fewer than two tokens, or no policy.
      Errors of `load_model`.
    """
    if isinstance(policies, (str, os.PathLike, Policy)):
        policies = [policies]
    by_name = policies if isinstance(policies, Mapping) else {_name(i, each): each for i, each in enumerate(policies)}
    ids = np.asarray(tokens)
    if ids.ndim != 1 or ids.size < 2 or not by_name:
        raise InvalidTokens(f"expected two token ids or more, and a policy, found {ids.shape} and {len(by_name)}.")
    first, rows = None, []
    for name, policy in by_name.items():
        model = load_model(path, policy, revision=revision)
        first = first or model
        checked_tokens(ids[None], None, model.config.vocab_size)
        costs = plan(resolve(get_policy(policy), model))
        with_loss, losses, counts, kls, agreements = _evaluate(first, model, ids).T
        loss, loss_error = mean_and_error(losses, with_loss)
        rows.append(
            Compared(
                name,
                perplexity=math.exp(loss),
                perplexity_error=math.exp(loss) * loss_error,
                kl=max(float(kls.sum() / counts.sum()), 0.0),  # rounding can make it slightly negative
                top1=float(agreements.sum() / counts.sum()),
                bytes=costs.total_bytes,
                kv_bytes=costs.kv_bytes,
                tokens_per_second=_speed(model, ids),
            )
        )
        del model  # before the next one is loaded
    return Comparison(tuple(rows), len(ids))


def _evaluate(first: CausalLM, model: CausalLM, ids: np.ndarray) -> np.ndarray:
    """Number and sum of the losses, tokens, sum of KL and agreements of each window, (windows, 5) float64."""
    length = min(WINDOW, len(ids))
    programs = [_program(each) for each in (first, model)]
    rows = []
    for start in range(0, len(ids), length):
        window = ids[start : start + length]
        real = np.arange(length) < len(window)
        padded = np.pad(window, (0, length - len(window))).astype(np.int32)
        reference, logits = (run(padded[None], real[None])[0] for run in programs)
        kl, agrees = divergence(reference, logits)
        loss = np.asarray(next_token_loss(logits, padded))[real[1:]]
        rows.append([loss.size, loss.sum(), real.sum(), np.asarray(kl)[real].sum(), np.asarray(agrees)[real].sum()])
    return np.array(rows, np.float64)


def _program(model: CausalLM) -> Any:
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, ids, mask: nnx.merge(graphdef, state)(ids, mask).astype(jnp.float32))
    return lambda ids, mask: run(state, ids, mask)


def _speed(model: CausalLM, ids: np.ndarray, count: int = 16) -> float:
    """Speed of decoding one row, in tokens per second, from the time of `count` more tokens."""
    prompt = ids[None, : min(32, len(ids))]

    def seconds(more: int) -> float:
        start = time.perf_counter()
        generate(model, prompt, max_new_tokens=1 + more, eos_token_id=()).block_until_ready()
        return time.perf_counter() - start

    seconds(count), seconds(0)  # compiles both programs
    elapsed = sorted(seconds(count) - seconds(0) for _ in range(5))[2]
    return count / elapsed if elapsed > 0 else math.nan
