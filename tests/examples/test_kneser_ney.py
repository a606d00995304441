"""The Kneser-Ney model: a hand computation, a plain implementation by dictionaries, and distributions that sum to 1."""

import collections
import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perparam.examples import kneser_ney
from perparam.examples.kneser_ney import FALLBACK, KneserNey, estimated_discounts

# Sums of fewer than 100 float64 terms of at most 1, a few roundings each.
ROUNDING = 1e-12


def probabilities(model, context):
    """The distribution of the token after a context, (vocabulary,)."""
    rows = [np.array([*context, token]) for token in range(model.vocabulary)]
    return np.exp2([model.log2_probabilities(row)[-1] for row in rows])


def test_a_bigram_model_is_that_of_a_hand_computation():
    # Bigrams of 0 1 0 2 0 1: 01 twice, 10, 02, 20. Too few for estimates, so 1/2 is taken from counts of 1, 1 from 2.
    model = KneserNey(np.array([0, 1, 0, 2, 0, 1]), vocabulary=3, order=2)
    # Different tokens before 0: 2; before 1: 1; before 2: 1. All discounts, 1 + 1/2 + 1/2 of 4, go to the uniform.
    unigrams = np.array([(2 - 1) / 4, 0.5 / 4, 0.5 / 4]) + 2 / 4 / 3
    np.testing.assert_allclose(np.exp2(model.log2_probabilities(np.arange(3))[0]), unigrams[0], rtol=ROUNDING)
    # After 0: 1 twice and 2 once of 3, of which 1 + 1/2 go to the unigrams. After 1: 0 once of 1.
    after_0 = np.array([0, 2 - 1, 1 - 0.5]) / 3 + 1.5 / 3 * unigrams
    after_1 = np.array([1 - 0.5, 0, 0]) + 0.5 * unigrams
    np.testing.assert_allclose(probabilities(model, [0]), after_0, rtol=ROUNDING)
    np.testing.assert_allclose(probabilities(model, [1]), after_1, rtol=ROUNDING)


def test_discounts_are_those_of_the_counts_of_counts():
    counts = np.repeat([1, 2, 3, 4, 9], [40, 15, 8, 5, 7])
    y = 40 / (40 + 2 * 15)
    expected = [1 - 2 * y * 15 / 40, 2 - 3 * y * 8 / 15, 3 - 4 * y * 5 / 8]
    np.testing.assert_allclose(estimated_discounts(counts), expected, rtol=ROUNDING)
    assert estimated_discounts(np.array([1, 1, 2, 3])).tolist() == list(FALLBACK)  # no n-gram occurs 4 times


texts = st.lists(st.integers(0, 3), min_size=8, max_size=60).map(np.array)


@given(text=texts, context=st.lists(st.integers(0, 3), max_size=5))
def test_a_distribution_sums_to_one_after_any_context(text, context):
    model = KneserNey(text, vocabulary=4, order=3)
    assert probabilities(model, context).sum() == pytest.approx(1, abs=ROUNDING)


def by_dictionaries(text, vocabulary, order, context, token):
    """The same probability from the definition, without arrays."""
    grams = [tuple(text[i : i + order]) for i in range(len(text) - order + 1)]
    counts = collections.Counter(grams)
    orders = [counts]
    for n in range(order - 1, 0, -1):
        counts = collections.Counter(gram[-n:] for gram in counts)
        orders.append(counts)
    probability = 1 / vocabulary
    for n, counts in enumerate(reversed(orders), 1):
        if n - 1 > len(context):
            break
        discounts = estimated_discounts(np.array(list(counts.values())))
        before = tuple(context[len(context) - n + 1 :])
        after = {gram[-1]: count for gram, count in counts.items() if gram[:-1] == before}
        if not after:
            continue
        taken = {each: min(count, discounts[min(count, 3) - 1]) for each, count in after.items()}
        left = sum(discounts[min(count, 3) - 1] for count in after.values())
        probability = (after.get(token, 0) - taken.get(token, 0) + left * probability) / sum(after.values())
    return probability


@given(text=texts, context=st.lists(st.integers(0, 3), min_size=3, max_size=3), token=st.integers(0, 3))
def test_it_is_the_model_of_the_definition(text, context, token):
    model = KneserNey(text, vocabulary=4, order=4)
    found = np.exp2(model.log2_probabilities(np.array([*context, token])))[-1]
    assert found == pytest.approx(by_dictionaries(text.tolist(), 4, 4, context, token), rel=1e-9)


def test_n_grams_that_do_not_fit_and_short_texts_are_errors():
    with pytest.raises(ValueError, match=r"order 5 with 8192 tokens needs numbers above 2\*\*63\. Use a lower order"):
        KneserNey(np.arange(9), vocabulary=8192)
    with pytest.raises(ValueError, match="expected a text of 5 tokens or more, the order of the model, found 4"):
        KneserNey(np.arange(4), vocabulary=8)


def test_the_examples_of_the_docstrings_hold():
    assert doctest.testmod(kneser_ney).failed == 0
