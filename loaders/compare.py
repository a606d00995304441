"""`compare`: what policies cost and buy, side by side: perplexity, divergence, agreement, bytes and speed."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
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
from ..policies.presets import get_policy
from ..policies.resolved import resolve
from .load import load_model

WINDOW = 256
"""Tokens that are read at a time; each window begins anew."""

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
"""What is read where no text is given: the beginning of Darwin's Origin of Species (1859)."""


@dataclasses.dataclass(frozen=True)
class Compared:
    """What one policy came to.

    perplexity         exp of the mean loss of the text's next tokens
    kl                 mean over tokens of KL(first policy || this one), in nats
    top1               share of tokens whose likeliest successor is the first policy's
    bytes              of all parameters as stored
    kv_bytes           of keys and values, a token
    tokens_per_second  in decoding, one row
    """

    name: str
    perplexity: float
    kl: float
    top1: float
    bytes: int
    kv_bytes: int
    tokens_per_second: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Policies side by side, the first one the measure; `str` of it is the table."""

    rows: tuple[Compared, ...]
    tokens: int

    def __str__(self) -> str:
        lines = [("policy", "perplexity", "KL to the first", "top-1 agrees", "parameters", "cache a token", "tokens/s")]
        lines += [
            (
                row.name, f"{row.perplexity:.4f}", f"{row.kl:.2e}", f"{row.top1:.2%}", human_bytes(row.bytes),
                human_bytes(row.kv_bytes), f"{row.tokens_per_second:.1f}",
            )
            for row in self.rows
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(pairs)
            ).rstrip()
            for pairs in (list(zip(line, widths, strict=True)) for line in lines)
        ]
        return "\n".join([*table, "", f"{self.tokens} tokens of text"])

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Writes a picture of the table.

        Raises:
          MissingPackage, UnsupportedExport: see `check_plot`.
        """
        check_plot(path)
        from matplotlib.figure import Figure

        panels = (
            ("perplexity", [row.perplexity for row in self.rows]),
            ("KL to the first, nats", [row.kl for row in self.rows]),
            ("parameters, MiB", [row.bytes / 2**20 for row in self.rows]),
            ("decoding, tokens/s", [row.tokens_per_second for row in self.rows]),
        )
        names = [row.name if len(row.name) <= 24 else f"…{row.name[-23:]}" for row in self.rows]
        figure = Figure(figsize=(10, 1.2 + 0.45 * len(names) * 2), layout="constrained")
        for axes, (title, values) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            bars = axes.barh(names[::-1], values[::-1], color="#4878a8")
            axes.bar_label(bars, [f"{value:.3g}" for value in values[::-1]], padding=3)
            axes.set_title(title, fontsize=10, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
            axes.margins(x=0.15)
        figure.savefig(path, dpi=120)


def check_plot(path: str | os.PathLike[str]) -> None:
    """Raises what would keep a picture from being written, before anything is computed.

    Raises:
      MissingPackage: without matplotlib.
      UnsupportedExport: for a kind of picture that it cannot write, or a folder that is not there.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise MissingPackage("a plot needs matplotlib. Install it: pip install matplotlib.") from error
    path = pathlib.Path(path)
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds or not path.parent.is_dir():
        raise UnsupportedExport(
            f"{path}: no place for a picture. Name a file such as costs.png in a folder that is there."
        )


def compare(path: str | os.PathLike[str], policies: Mapping[str, Any] | Sequence[Any], tokens: ArrayLike) -> Comparison:
    """What each policy costs and buys on a checkpoint, beside the first one.

    path      a folder or a name on the hub, as for `load_model`
    policies  anything `get_policy` takes, by name or named by themselves
    tokens    (count,) ids of a text

    The model is held under two policies at a time.

    Raises:
      InvalidTokens: for less than two tokens; and what `load_model` raises.
    """
    named = policies if isinstance(policies, Mapping) else {str(policy): policy for policy in policies}
    ids = np.asarray(tokens)
    if ids.ndim != 1 or ids.size < 2 or not named:
        raise InvalidTokens(f"expected two token ids or more, and a policy, found {ids.shape} and {len(named)}.")
    first, rows = None, []
    for name, policy in named.items():
        model = load_model(path, policy)
        first = first or model
        checked_tokens(ids[None], None, model.config.vocab_size)
        costs = plan(resolve(get_policy(policy), model))
        loss, kl, top1 = _read(first, model, ids)
        speed = _speed(model, ids)
        rows.append(Compared(name, math.exp(loss), kl, top1, costs.total_bytes, costs.kv_bytes, speed))
        del model  # before the next one is loaded
    return Comparison(tuple(rows), len(ids))


def _read(first: CausalLM, model: CausalLM, ids: np.ndarray) -> tuple[float, float, float]:
    """Mean loss, divergence from `first` and agreement with it over a text."""
    length = min(WINDOW, len(ids))
    programs = [_program(each) for each in (first, model)]
    sums, count, kept = np.zeros(3), 0, 0
    for start in range(0, len(ids), length):
        window = ids[start : start + length]
        padding = length - len(window)
        mask = np.arange(length) < len(window)
        padded = np.pad(window, (0, padding))[None]
        before, after = (run(padded, mask[None])[0] for run in programs)
        sums += np.asarray(_compared(before, after, jnp.asarray(padded[0]), jnp.asarray(mask)), np.float64)
        count, kept = count + len(window), kept + len(window) - 1
    # Equal models differ by less than nothing in the last bits.
    return float(sums[0] / max(kept, 1)), max(float(sums[1] / count), 0.0), float(sums[2] / count)


def _program(model: CausalLM) -> Any:
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, ids, mask: nnx.merge(graphdef, state)(ids, mask).astype(jnp.float32))
    return lambda ids, mask: run(state, ids, mask)


@jax.jit
def _compared(before: jax.Array, after: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Sums over the real tokens of logits (t, v): loss of the next token, divergence, agreement."""
    log_p, log_q = jax.nn.log_softmax(before), jax.nn.log_softmax(after)
    loss = -jnp.take_along_axis(log_q[:-1], ids[1:, None], axis=1)[:, 0]
    divergence = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    same = jnp.argmax(before, -1) == jnp.argmax(after, -1)
    return jnp.stack([
        jnp.sum(jnp.where(mask[1:], loss, 0.0)),
        jnp.sum(jnp.where(mask, divergence, 0.0)),
        jnp.sum(jnp.where(mask, same.astype(jnp.float32), 0.0)),
    ])  # fmt: skip


def _speed(model: CausalLM, ids: np.ndarray, count: int = 16) -> float:
    """Tokens a second in decoding, one row: what `count` more tokens take."""
    prompt = ids[None, : min(32, len(ids))]

    def seconds(more: int) -> float:
        start = time.perf_counter()
        generate(model, prompt, max_new_tokens=1 + more, eos_token_id=()).block_until_ready()
        return time.perf_counter() - start

    seconds(count), seconds(0)  # compiled
    taken = sorted(seconds(count) - seconds(0) for _ in range(5))[2]
    return count / taken if taken > 0 else math.nan
