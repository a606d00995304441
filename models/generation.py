"""Greedy generation: prefill and the whole decoding loop in one compiled program."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import ArrayLike

from ..policies.errors import InvalidTokens
from .attention import KVCache
from .qwen3 import Qwen3
from .tokens import checked_tokens


def generate(
    model: Qwen3,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    max_new_tokens: int = 20,
    eos_token_id: ArrayLike | None = None,
) -> jax.Array:
    """The most likely continuation, token by token: `(batch, max_new_tokens)` int32, the new tokens alone.

    input_ids       (batch, length) integers
    attention_mask  (batch, length), nonzero for real tokens; prompts may be padded left or right; None: all are real
    eos_token_id    an id or several that end a row, which goes on with the config's pad_token_id (or else the first of
                    them); None: the config's; (): nothing ends a row

    One program is compiled for each shape of the prompt, `max_new_tokens` and model; it stops when all rows have ended.

    Raises:
      InvalidTokens: ids outside the vocabulary, a row without a real token, shapes that do not fit.
    """
    config = model.config
    ids, mask = checked_tokens(input_ids, attention_mask, config.vocab_size)
    if 0 in ids.shape:
        raise InvalidTokens(f"input_ids: expected integers of shape (batch, length), found {ids.dtype} {ids.shape}.")
    alive = np.asarray(mask).any(axis=1)
    if not alive.all():
        raise InvalidTokens(
            f"attention_mask: row {int(np.argmin(alive))} has no real token, so there is nothing to continue."
        )
    if not isinstance(max_new_tokens, (int, np.integer)) or not 0 <= max_new_tokens < 2**31 - ids.shape[1]:
        raise InvalidTokens(f"max_new_tokens: expected an integer of 0 or more, found {max_new_tokens!r}.")
    count = int(max_new_tokens)
    eos = _ends(config.eos_token_id if eos_token_id is None else eos_token_id)
    if count == 0:
        return jnp.zeros((ids.shape[0], 0), jnp.int32)
    pad = config.pad_token_id if config.pad_token_id is not None else int(eos[0]) if eos.size else 0
    graphdef, state = nnx.split(model)
    cache = model.empty_cache(ids.shape[0], ids.shape[1] + count)
    tokens, _ = _generate(graphdef, state, ids, mask, eos, cache, pad, count)
    return tokens


def _ends(eos_token_id: ArrayLike) -> np.ndarray:
    """The ids that end a row, (count,) int32."""
    ids = np.atleast_1d(np.asarray(eos_token_id))
    whole = ids.size == 0 or np.issubdtype(ids.dtype, np.integer)
    if ids.ndim != 1 or not whole or not ((ids >= 0) & (ids < 2**31)).all():
        raise InvalidTokens(f"eos_token_id: expected a token id or several, found {eos_token_id!r}.")
    return ids.astype(np.int32)


@functools.partial(jax.jit, static_argnames=("graphdef", "count"), donate_argnames=("cache",))
def _generate(
    graphdef: nnx.GraphDef[Qwen3],
    state: nnx.State,
    ids: jax.Array,
    mask: jax.Array,
    eos: jax.Array,
    cache: KVCache,
    pad: int,
    count: int,
) -> tuple[jax.Array, KVCache]:
    model = nnx.merge(graphdef, state)

    def choose(hidden: jax.Array) -> jax.Array:
        """(b, hidden) to the likeliest ids, (b,)."""
        return jnp.argmax(model.logits(hidden), axis=-1).astype(jnp.int32)

    hidden, cache = model.hidden(ids, mask, cache)
    last = ids.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    first = choose(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])
    tokens = jnp.full((ids.shape[0], count), pad, jnp.int32).at[:, 0].set(first)

    def unfinished(carry):
        index, _, _, done, _ = carry
        return (index < count) & ~done.all()

    def step(carry):
        index, tokens, token, done, cache = carry
        hidden, cache = model.hidden(token[:, None], None, cache)
        token = jnp.where(done, pad, choose(hidden[:, 0]))
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], index, axis=1)
        return index + 1, tokens, token, done | jnp.isin(token, eos), cache

    carry = (jnp.int32(1), tokens, first, jnp.isin(first, eos), cache)
    _, tokens, _, _, cache = jax.lax.while_loop(unfinished, step, carry)
    return tokens, cache
