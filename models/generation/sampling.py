"""Sampling of the next token from logits: penalties, temperature, filters."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...policies.errors import InvalidSampling, shown


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """The tokens so far, for a processor of logits.

    tokens  (b, slots) int32, prompt and answer; meaningless where `real` is False
    real    (b, slots) bool, True for tokens of prompt or answer, False for padding and empty slots; padding may stand
            between the prompt and the answer
    prompt  (b, vocabulary) bool, whether a token is in the prompt; None without penalties
    answer  (b, vocabulary) int32, count of each token in the answer; likewise
    """

    tokens: jax.Array
    real: jax.Array
    prompt: jax.Array | None = None
    answer: jax.Array | None = None


Processor = Callable[[History, jax.Array], jax.Array]
"""A function of the history and logits (b, vocabulary) float32 that returns logits; JAX traces it."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The steps are applied in this order:

    repetition_penalty  positive logits of tokens in prompt or answer are divided by it, negative ones multiplied
                        (CTRL, arXiv:1909.05858)
    presence_penalty    subtracted from the logits of tokens in the answer
    frequency_penalty   likewise, times the count of the token there
    logit_bias          {id: number added to its logit}; -inf forbids a token
    processors          the caller's own functions, see `Processor`
    temperature         divides the logits; 0: the most likely token, without the steps below
    top_k               keeps the k most likely tokens, and those as likely as the last of them; 0: all
    top_p               keeps the most likely tokens that together have probability p (arXiv:1904.09751); 1: all
    min_p               keeps tokens at least min_p times as likely as the most likely one (arXiv:2407.01082); 0: all

    The order and the definitions are those of transformers; presence and frequency penalties are OpenAI's.

    Raises:
      InvalidSampling: a sampling parameter is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Any = ()
    processors: tuple[Processor, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        object.__setattr__(self, "processors", tuple(self.processors))
        ranges = {
            "temperature": (0, math.inf),
            "top_k": (0, 2**31),
            "top_p": (0, 1),
            "min_p": (0, 1),
            "repetition_penalty": (1e-6, math.inf),
            "presence_penalty": (-math.inf, math.inf),
            "frequency_penalty": (-math.inf, math.inf),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            number = isinstance(value, (int, np.integer) if name == "top_k" else (int, float, np.number))
            if not number or isinstance(value, bool) or not low <= value <= high or not math.isfinite(value):
                raise InvalidSampling(f"{name}: expected a number from {low:g} to {high:g}, found {shown(value)}.")
        if 0 < self.temperature < 1e-6:
            raise InvalidSampling(f"temperature: {self.temperature:g} is too small. Use 0 for the most likely token.")

    @property
    def counts_tokens(self) -> bool:
        """Whether a penalty depends on the tokens of prompt and answer."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def kind(self) -> Kind:
        """The static settings, for which a program is compiled."""
        draws = self.temperature > 0
        return Kind(
            draws,
            self.top_k if draws else 0,
            draws and self.top_p < 1,
            draws and self.min_p > 0,
            self.counts_tokens,
            self.processors,
        )

    def numbers(self, vocabulary: int) -> dict[str, jax.Array]:
        """The numeric settings, which are arguments of a program: float32 scalars, and `bias` (vocabulary,) or (1,).

        Raises:
          InvalidSampling: a biased id outside the vocabulary.
        """
        outside = [i for i, _ in self.logit_bias if not 0 <= i < vocabulary]
        if outside:
            raise InvalidSampling(f"logit_bias: {outside[0]} is outside the vocabulary of {vocabulary}.")
        bias = np.zeros(vocabulary if self.logit_bias else 1, np.float32)
        for i, added in self.logit_bias:
            bias[i] = added
        names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        return {"bias": jnp.asarray(bias), **{name: jnp.float32(getattr(self, name)) for name in names}}


def _bias(bias: Any) -> tuple[tuple[int, float], ...]:
    """`logit_bias` as pairs of an id and the number added to its logit."""
    try:
        pairs = tuple((operator.index(i), float(added)) for i, added in dict(bias).items())
    except (TypeError, ValueError):
        pairs = ((-1, math.nan),)
    if not all(math.isfinite(added) or added == -math.inf for _, added in pairs):
        raise InvalidSampling(f"logit_bias: expected {{id: number}}, found {shown(bias)}.")
    return pairs


GREEDY = Sampling(temperature=0.0)
"""The most likely token, always."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """The static settings of a `Sampling`: which steps a program has.

    draws       False: the most likely token is taken
    top_k       0: no such step
    top_p       whether there is such a step
    min_p       whether there is such a step
    counts      whether there are penalties, which need the tokens of prompt and answer
    processors  the caller's functions
    """

    draws: bool
    top_k: int
    top_p: bool
    min_p: bool
    counts: bool
    processors: tuple[Processor, ...]


def process(kind: Kind, numbers: Mapping[str, jax.Array], logits: jax.Array, history: History) -> jax.Array:
    """Logits (b, vocabulary) float32 after every step of a `Sampling`, -inf where a token is filtered out."""
    if kind.counts:
        assert history.prompt is not None
        assert history.answer is not None
        penalty = numbers["repetition_penalty"]
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(history.prompt | (history.answer > 0), penalised, logits)
        logits = logits - numbers["presence_penalty"] * (history.answer > 0).astype(jnp.float32)
        logits = logits - numbers["frequency_penalty"] * history.answer.astype(jnp.float32)
    logits = logits + numbers["bias"]
    for processor in kind.processors:
        logits = processor(history, logits)
    if not kind.draws:
        return logits
    logits = logits / numbers["temperature"]
    ranked = None
    if 0 < kind.top_k < logits.shape[-1]:
        ranked, _ = jax.lax.top_k(logits, kind.top_k)
        logits = jnp.where(logits < ranked[:, -1:], -jnp.inf, logits)
    if kind.top_p:
        ranked = jnp.flip(jnp.sort(logits, axis=-1), axis=-1) if ranked is None else ranked
        share = jnp.exp(ranked - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
        # A token stays if the more likely ones together have a probability below p; the first one always stays.
        stays = (jnp.cumsum(share, axis=-1) - share < numbers["top_p"]).at[:, 0].set(True)
        least = jnp.min(ranked, axis=-1, keepdims=True, where=stays, initial=jnp.inf)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if kind.min_p:
        floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(numbers["min_p"])
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    return logits


def draw(kind: Kind, logits: jax.Array, keys: jax.Array) -> jax.Array:
    """The next token of each row, (b,) int32, from processed logits (b, vocabulary) and a key for each row (b,)."""
    if not kind.draws:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
