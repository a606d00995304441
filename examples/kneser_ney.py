"""An n-gram model with interpolated modified Kneser-Ney smoothing, the baseline of `train_tiny`.

Chen and Goodman, An Empirical Study of Smoothing Techniques for Language Modeling (1998), section 3: the highest order
counts occurrences, each lower one the different tokens before an n-gram, and three discounts of each order are
estimated from its counts of counts.
"""

from __future__ import annotations

import dataclasses
from typing import Self

import numpy as np

FALLBACK = (0.5, 1.0, 1.5)
"""Discounts of an order with too few n-grams to estimate them, as in KenLM's `--discount_fallback`."""


def estimated_discounts(counts: np.ndarray) -> np.ndarray:
    """Discounts (3,) float64 for counts of 1, of 2, and of 3 or more, from the counts of all n-grams of one order.

    Chen and Goodman's equation 26. FALLBACK where an n-gram count from 1 to 4 does not occur, or a discount is
    negative.

    >>> estimated_discounts(np.array([1, 1, 1, 1, 2, 2, 3, 4]))
    array([0.5 , 1.25, 1.  ])
    """
    n1, n2, n3, n4 = (float(np.sum(counts == count)) for count in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:
        return np.array(FALLBACK)
    y = n1 / (n1 + 2 * n2)
    discounts = np.array([1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return discounts if (discounts >= 0).all() else np.array(FALLBACK)


@dataclasses.dataclass(frozen=True)
class _Order:
    """The n-grams of one order, each a number in base `vocabulary`, and their contexts.

    keys, counts      (n-grams,) int64, keys ascending
    contexts          (contexts,) int64, ascending: n-grams without their last token
    totals            (contexts,) sum of the counts after each context
    left              (contexts,) float64: the sum of the discounts after each context, which the lower order receives
    discounts         (3,) float64
    """

    keys: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    left: np.ndarray
    discounts: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, counts: np.ndarray, vocabulary: int) -> Self:
        discounts = estimated_discounts(counts)
        contexts, index = np.unique(keys // vocabulary, return_inverse=True)
        totals = np.bincount(index, counts).astype(np.int64)
        left = np.bincount(index, discounts[np.minimum(counts, 3) - 1])
        return cls(keys, counts, contexts, totals, left, discounts)

    def interpolated(self, keys: np.ndarray, vocabulary: int, lower: np.ndarray) -> np.ndarray:
        """Probabilities of the n-grams `keys`, from the lower order's probabilities of the same last tokens."""
        count = _values(self.keys, self.counts, keys)
        total = _values(self.contexts, self.totals, keys // vocabulary)
        left = _values(self.contexts, self.left, keys // vocabulary)
        discounted = np.maximum(count - self.discounts[np.clip(count, 1, 3) - 1], 0) * (count > 0)
        seen = total > 0
        return np.where(seen, (discounted + left * lower) / np.where(seen, total, 1), lower)


def _values(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key; 0 for a key that does not occur."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


class KneserNey:
    """The model of the n-grams of a text over a closed vocabulary; the lowest order is interpolated with 1/vocabulary.

    tokens      (length,) ids in [0, vocabulary)
    vocabulary  number of tokens, all of which have a probability
    order       longest n-gram

    >>> model = KneserNey(np.array([0, 1, 0, 2, 0, 1]), vocabulary=3, order=2)
    >>> probabilities = np.exp2([model.log2_probabilities(np.array([0, w]))[1] for w in range(3)])
    >>> round(float(probabilities.sum()), 12)
    1.0

    Raises:
      ValueError: n-grams that do not fit into 63 bits, or a text shorter than the order.
    """

    def __init__(self, tokens: np.ndarray, vocabulary: int, order: int = 5):
        if vocabulary**order >= 2**63:
            raise ValueError(
                f"order {order} with {vocabulary} tokens needs numbers above 2**63. Use a lower order or a smaller "
                "vocabulary."
            )
        if len(tokens) < order:
            raise ValueError(f"expected a text of {order} tokens or more, the order of the model, found {len(tokens)}.")
        self.vocabulary, self.order = vocabulary, order
        keys, counts = np.unique(_ngrams(tokens, order, vocabulary), return_counts=True)
        orders = [_Order.of(keys, counts, vocabulary)]
        for n in range(order - 1, 0, -1):
            # Each different n-gram of the order above is one token before the n-gram that is its end.
            keys, counts = np.unique(keys % vocabulary**n, return_counts=True)
            orders.append(_Order.of(keys, counts, vocabulary))
        self._orders = orders[::-1]

    def log2_probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """Log2 probability (length,) float64 of each token after those before it; the first ones have less context."""
        probabilities = np.full(len(tokens), 1 / self.vocabulary)
        for n, order in enumerate(self._orders, 1):
            keys = _ngrams(tokens, n, self.vocabulary)
            probabilities[n - 1 :] = order.interpolated(keys, self.vocabulary, probabilities[n - 1 :])
        return np.log2(probabilities)


def _ngrams(tokens: np.ndarray, n: int, vocabulary: int) -> np.ndarray:
    """The n-grams (length - n + 1,) int64 of a text, each a number in base `vocabulary` whose last digit is last."""
    tokens = np.asarray(tokens, np.int64)
    keys = np.zeros(max(len(tokens) - n + 1, 0), np.int64)
    for i in range(n):
        keys = keys * vocabulary + tokens[i : len(tokens) - n + 1 + i]
    return keys
