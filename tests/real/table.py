"""Measures SmolLM2-135M-Instruct under several policies on a fixed text, and prints a Markdown table.

    python tests/real/table.py --results results.jsonl

Results are appended to the file window by window, so that an interrupted run continues where it stopped. A window whose
result is in the file is not computed again: delete the file after a change to perparam. README.md has the requirements.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import json
import math
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

_TESTS = str(pathlib.Path(__file__).resolve().parent.parent)
if _TESTS not in sys.path:  # `real`, as pytest finds it
    sys.path.append(_TESTS)

from real.smollm2 import POLICIES, TEXT_SHA256, model_folder, text  # noqa: E402

import perparam  # noqa: E402
from perparam import Policy  # noqa: E402
from perparam.loaders.metrics import divergence, mean_and_error, next_token_loss  # noqa: E402
from perparam.loaders.windows import WINDOW  # noqa: E402
from perparam.policies.labels import human_bytes  # noqa: E402
from perparam.policies.plan import plan  # noqa: E402
from perparam.policies.resolved import resolve  # noqa: E402


def measure(folder: pathlib.Path, ids: np.ndarray, policies: Mapping[str, Policy], results: pathlib.Path) -> None:
    """Appends to `results` what it does not have of the windows of `ids`: a line of JSON for each policy and window.

    A line has `losses` and `loss` (their number and sum), `tokens`, `kl` and `agrees` (sums over the tokens).
    """
    done = {(line["policy"], line["window"]) for line in lines(results)}
    windows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, 1, WINDOW).astype(np.int32)
    programs = {name: _program(folder, policy) for name, policy in policies.items()}
    reference = next(iter(policies))
    keys = {name: key(name, policies) for name in policies}
    with open(results, "a") as file:
        for i, window in enumerate(windows):
            missing = [name for name in policies if (keys[name], i) not in done]
            if not missing:
                continue
            exact = programs[reference](window)
            for name in missing:
                logits = exact if name == reference else programs[name](window)
                loss = np.asarray(next_token_loss(logits, window), np.float64)
                kl, agrees = (np.asarray(each, np.float64) for each in divergence(exact, logits))
                sums = {"losses": loss.size, "loss": loss.sum(), "tokens": window.size}
                sums |= {"kl": kl.sum(), "agrees": agrees.sum()}
                file.write(json.dumps({"policy": keys[name], "window": i, **sums}) + "\n")
            file.flush()
            print(f"window {i + 1} of {len(windows)}", file=sys.stderr)


def key(name: str, policies: Mapping[str, Policy]) -> str:
    """The name of a policy with a digest of what its results depend on: the text, the reference, the policy itself."""
    reference = next(iter(policies.values()))
    digest = hashlib.sha256("\n".join((TEXT_SHA256, reference.dumps(), policies[name].dumps())).encode())
    return f"{name} ({digest.hexdigest()[:12]})"


def lines(results: pathlib.Path) -> Iterator[dict]:
    """The lines of a results file; none if there is no file."""
    if results.exists():
        yield from map(json.loads, results.read_text().splitlines())


def _program(folder: pathlib.Path, policy: Policy) -> Callable[[np.ndarray], jax.Array]:
    graphdef, state = nnx.split(perparam.load_model(folder, policy))
    run = jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids).astype(jnp.float32))
    return lambda ids: run(state, ids)


class Estimate(NamedTuple):
    """A number and its standard error, with windows of text as samples."""

    value: float
    error: float


@dataclasses.dataclass(frozen=True)
class Row:
    """Results under one policy.

    perplexity  exp of the mean loss of the text's next tokens
    excess      perplexity / the reference's - 1; its error is that of the paired difference of the losses
    kl          mean over tokens of KL(reference || this policy), in nats
    top1        share of tokens with the same most likely next token as under the reference
    bytes       bytes of all parameters as stored
    kv_bytes    bytes of keys and values for each token
    """

    name: str
    perplexity: Estimate
    excess: Estimate
    kl: Estimate
    top1: Estimate
    bytes: int
    kv_bytes: int

    def cells(self) -> tuple[str, ...]:
        """The row of the Markdown table; cells that compare the reference with itself are empty."""
        compared = (
            f"{100 * self.excess.value:+.2f}% ± {100 * self.excess.error:.2f}%",
            f"{self.kl.value:.5f} ± {self.kl.error:.5f}",
            f"{100 * self.top1.value:.2f}% ± {100 * self.top1.error:.2f}%",
        )
        return (
            self.name,
            f"{self.perplexity.value:.3f} ± {self.perplexity.error:.3f}",
            *(compared if self.kl.value else [""] * len(compared)),
            human_bytes(self.bytes),
            human_bytes(self.kv_bytes),
        )


def rows(folder: pathlib.Path, policies: Mapping[str, Policy], results: pathlib.Path, windows: int) -> Iterator[Row]:
    """The row of each policy, from the results of the first `windows` windows."""
    by_key: dict[str, dict[int, dict]] = collections.defaultdict(dict)
    for line in lines(results):
        by_key[line["policy"]][line["window"]] = line
    model, reference = perparam.load_model(folder), None
    for name, policy in policies.items():
        found = [by_key[key(name, policies)][i] for i in range(windows)]
        losses, loss, tokens, kl, agrees = (
            np.array([line[sums] for line in found]) for sums in ("losses", "loss", "tokens", "kl", "agrees")
        )
        reference = loss if reference is None else reference
        costs = plan(resolve(policy, model))
        mean, error = mean_and_error(loss, losses)
        more, more_error = mean_and_error(loss - reference, losses)
        yield Row(
            name,
            perplexity=Estimate(math.exp(mean), math.exp(mean) * error),
            excess=Estimate(math.expm1(more), math.exp(more) * more_error),
            kl=Estimate(*mean_and_error(kl, tokens)),
            top1=Estimate(*mean_and_error(agrees, tokens)),
            bytes=costs.total_bytes,
            kv_bytes=costs.kv_bytes,
        )


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table, numbers to the right."""
    head = ("policy", "perplexity", f"against {rows[0].name}", "KL, nats", "top-1 agrees", "parameters", "cache/token")
    marks = ("---", *["---:"] * (len(head) - 1))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, marks, *(row.cells() for row in rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, help="read only this many tokens; the default is the whole text")
    parser.add_argument("--results", type=pathlib.Path, default="smollm2-results.jsonl", help="a file of JSON lines")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = model_folder(pathlib.Path(temporary))
        ids = np.array(perparam.load_tokenizer(folder).encode(text()))[: arguments.tokens]
        windows = len(ids) // WINDOW
        if not windows:
            parser.error(f"--tokens: expected {WINDOW} or more.")
        measure(folder, ids, POLICIES, arguments.results)
        print(markdown(list(rows(folder, POLICIES, arguments.results, windows))))
    print(f"\n{windows * WINDOW} tokens in {windows} windows of {WINDOW}")


if __name__ == "__main__":
    main()
