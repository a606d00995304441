"""`compare`: perplexity, divergence, agreement, bytes and speed of one model under several policies."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from ..models.decoder import CausalLM
from ..models.generation import generate
from ..models.heads import check_causal_lm
from ..policies.errors import InvalidTokens, count
from ..policies.labels import human_bytes
from ..policies.plan import plan
from ..policies.policy import Policy
from ..policies.presets import PolicyLike, get_policy
from ..policies.resolved import resolve
from ..policies.tables import Column, Report, Table, json_lines
from .compare_plot import plot
from .load import load_model
from .metrics import divergence, float32_logits, mean_and_error, next_token_loss
from .progress import Progress
from .windows import token_ids, token_windows

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
class Comparison(Report):
    """Several policies side by side, the first one as the reference; `str` of it is the table.

    In a notebook a comparison is shown as HTML.
    """

    rows: tuple[Compared, ...]
    tokens: int

    def __iter__(self) -> Iterator[Compared]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_json(self) -> str:
        """Returns rows and totals as JSON that suits a diff: one line for each policy."""
        return json_lines(map(dataclasses.asdict, self.rows), {"tokens": self.tokens})

    def _table(self) -> Table:
        columns = (
            Column("policy"),
            Column("perplexity", right=True),
            Column("KL, nats", right=True),
            Column("top-1", right=True),
            Column("parameters", right=True),
            Column("cache/token", right=True, leave=1),
            Column("tokens/s", right=True, leave=2),
        )
        lines = [
            (
                row.name, _with_error(row.perplexity, row.perplexity_error), f"{row.kl:.2e}", f"{row.top1:.2%}",
                human_bytes(row.bytes), human_bytes(row.kv_bytes), f"{row.tokens_per_second:.1f}",
            )
            for row in self.rows
        ]  # fmt: skip
        return Table(columns, lines)

    def _notes(self) -> list[str]:
        return [f"KL and top-1 are relative to {self.rows[0].name}", f"{count(self.tokens, 'token')} of text"]

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Writes a picture of the table to `path`: size against divergence, perplexity, and speed.

        Raises:
          MissingPackage: without matplotlib.
          UnsupportedExport: a file type that matplotlib cannot write, or a folder that does not exist.
        """
        plot(self.rows, self.tokens, path)


def _name(index: int, policy: PolicyLike) -> str:
    """The name of a policy in the table: its own text or path, or else a number such as "policy 2"."""
    return str(policy) if isinstance(policy, (str, os.PathLike)) else f"policy {index + 1}"


def _by_name(policies: Sequence[PolicyLike]) -> dict[str, PolicyLike]:
    """{name: policy} of a sequence; a name that occurs again has a number, as in "bf16 (2)"."""
    by_name: dict[str, PolicyLike] = {}
    for index, policy in enumerate(policies):
        name = _name(index, policy)
        numbered = (f"{name} ({number})" for number in itertools.count(2))
        by_name[next(each for each in itertools.chain([name], numbered) if each not in by_name)] = policy
    return by_name


def _with_error(value: float, error: float) -> str:
    """A number with its standard error, where there is one."""
    return f"{value:.4f}" if math.isnan(error) else f"{value:.4f} ± {error:.2g}"


def compare(
    path: str | os.PathLike[str],
    policies: Mapping[str, PolicyLike] | Sequence[PolicyLike],
    tokens: ArrayLike | None = None,
    *,
    text: str | None = None,
    revision: str | None = None,
) -> Comparison:
    """Accuracy, size and speed of a checkpoint under each policy, relative to the first one.

    path      a folder or a name on the hub, as for `load_model`
    policies  anything `get_policy` accepts: a mapping from names, or a sequence, whose second "bf16" is "bf16 (2)"
    tokens    (length,) or (batch, length) ids; rows are cut into windows of 256 tokens
    text      a text instead of tokens, for the checkpoint's tokenizer
    revision  branch, tag or commit of the repository on the hub

    At most two models are in memory at a time. On a terminal, stderr shows the progress.

    Raises:
      InvalidTokens: fewer than two tokens, no policy, or neither or both of tokens and text.
      UnsupportedTask: a model without a language-model head.
      Errors of `load_model`.
    """
    if isinstance(policies, (str, os.PathLike, Policy)):
        policies = [policies]
    by_name = policies if isinstance(policies, Mapping) else _by_name(policies)
    ids = token_ids(tokens, text, path, revision)
    first, rows = None, []
    for name, policy in by_name.items():
        model = load_model(path, policy, revision=revision)
        first = first or model
        check_causal_lm(model.config.task, "compare")
        windows = token_windows(ids, None, model.config.vocab_size)
        if windows[0].shape[1] < 2:
            break
        costs = plan(resolve(get_policy(policy), model))
        with Progress(f"evaluating {name}", len(windows[0]) + 1, unit="window") as progress:
            with_loss, losses, counts, kls, agreements = _evaluate(first, model, windows, progress).T
            speed = _speed(model, windows[0][0])
            progress.add(1)
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
                tokens_per_second=speed,
            )
        )
        del model  # before the next one is loaded
    if not rows:
        raise InvalidTokens(f"expected two token ids or more, and a policy, found {np.shape(ids)} and {len(by_name)}.")
    return Comparison(tuple(rows), int(windows[1].sum()))


def _evaluate(
    first: CausalLM, model: CausalLM, windows: tuple[np.ndarray, np.ndarray], progress: Progress
) -> np.ndarray:
    """Number and sum of the losses, tokens, sum of KL and agreements of each window, (windows, 5) float64."""
    programs = [float32_logits(each) for each in (first, model)]
    rows = []
    for ids, real in zip(*windows, strict=True):
        reference, logits = (run(ids[None], real[None])[0] for run in programs)
        kl, agrees = divergence(reference, logits)
        loss = np.asarray(next_token_loss(logits, ids))[real[1:]]
        rows.append([loss.size, loss.sum(), real.sum(), np.asarray(kl)[real].sum(), np.asarray(agrees)[real].sum()])
        progress.add(1)
    return np.array(rows, np.float64)


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
