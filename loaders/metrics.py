"""Logits of a model, and numbers that compare those of two."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import ArrayLike

from ..models.decoder import CausalLM


def float32_logits(model: CausalLM) -> Callable[[ArrayLike, ArrayLike], jax.Array]:
    """A compiled function of ids and mask, (b, t), that returns the logits (b, t, vocabulary) in float32."""
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, ids, mask: nnx.merge(graphdef, state)(ids, mask).astype(jnp.float32))
    return lambda ids, mask: run(state, ids, mask)


@jax.jit
def divergence(reference: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`(kl, agrees)` of each token, from logits (..., vocabulary) in float32.

    kl      (...) float32, KL(reference || logits) in nats; rounding can make it slightly negative
    agrees  (...) bool, whether both have the same most likely token
    """
    log_p, log_q = jax.nn.log_softmax(reference), jax.nn.log_softmax(logits)
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return kl, jnp.argmax(reference, -1) == jnp.argmax(logits, -1)


@jax.jit
def next_token_loss(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Negative log-likelihood (..., t - 1) float32, in nats, of each token after the first.

    logits  (..., t, vocabulary) float32
    ids     (..., t) int32
    """
    log_likelihood = jax.nn.log_softmax(logits[..., :-1, :])
    return -jnp.take_along_axis(log_likelihood, ids[..., 1:, None], axis=-1)[..., 0]


def mean_and_error(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """The mean over tokens and its standard error, from sums over windows of text and the tokens in each.

    Windows are the sampling unit, since tokens of one window are correlated: the error is that of a ratio of means
    (Cochran, Sampling Techniques, 6.4). It is NaN for a single window.

    >>> mean_and_error(np.array([2.0, 4.0]), np.array([1, 1]))
    (3.0, 1.0)
    """
    total, windows = counts.sum(), len(counts)
    mean = float(sums.sum() / total)
    if windows < 2:
        return mean, float("nan")
    residuals = sums - mean * counts
    return mean, float(np.sqrt(windows / (windows - 1) * np.sum(residuals**2)) / total)
