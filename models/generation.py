"""Greedy generation: prefill and the whole decoding loop in one compiled program."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import ArrayLike

from ..policies.errors import InvalidTokens
from .attention import KVCache
from .qwen3 import Qwen3


def generate(
    model: Qwen3,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    max_new_tokens: int = 20,
    eos_token_id: int | Iterable[int] | None = None,
) -> jax.Array:
    """The most likely continuation, token by token: `(batch, max_new_tokens)` int32, the new tokens alone.

    input_ids       (batch, length) integers
    attention_mask  (batch, length), nonzero for real tokens; prompts may be padded left or right; None: all are real
    eos_token_id    ids that end a row, which goes on with the config's pad_token_id (or else the id that ended it);
                    None: the config's; (): nothing ends a row

    One program is compiled for each shape of the prompt, `max_new_tokens` and model; it stops when all rows have ended.

    Raises:
      InvalidTokens: ids outside the vocabulary, a row without a real token, shapes that do not fit.
    """
    config = model.config
    ids = np.asarray(input_ids)
    mask = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
    _check(ids, mask, config.vocab_size, max_new_tokens)
    if eos_token_id is None:
        eos_token_id = config.eos_token_id
    eos = (eos_token_id,) if isinstance(eos_token_id, (int, np.integer)) else tuple(eos_token_id)
    if max_new_tokens == 0:
        return jnp.zeros((ids.shape[0], 0), jnp.int32)
    pad = config.pad_token_id if config.pad_token_id is not None else (eos[0] if eos else 0)
    graphdef, state = nnx.split(model)
    cache = model.empty_cache(ids.shape[0], ids.shape[1] + max_new_tokens)
    ends = jnp.asarray(eos, jnp.int32)
    tokens, _ = _generate(
        graphdef, state, jnp.asarray(ids, jnp.int32), jnp.asarray(mask), ends, cache, pad, max_new_tokens
    )
    return tokens


def _check(ids: np.ndarray, mask: np.ndarray, vocabulary: int, max_new_tokens: int) -> None:
    if ids.ndim != 2 or 0 in ids.shape or not np.issubdtype(ids.dtype, np.integer):
        raise InvalidTokens(f"input_ids: expected integers of shape (batch, length), found {ids.dtype} {ids.shape}.")
    if mask.shape != ids.shape:
        raise InvalidTokens(f"attention_mask: expected the shape of input_ids, {ids.shape}, found {mask.shape}.")
    outside = mask & ((ids < 0) | (ids >= vocabulary))
    if outside.any():
        row, column = (int(i) for i in np.argwhere(outside)[0])
        raise InvalidTokens(
            f"input_ids[{row}, {column}] is {ids[row, column]}, outside the vocabulary of {vocabulary}. "
            "Use the tokenizer that belongs to the checkpoint."
        )
    if not mask.any(axis=1).all():
        row = int(np.argmin(mask.any(axis=1)))
        raise InvalidTokens(f"attention_mask: row {row} has no real token, so there is nothing to continue.")
    if max_new_tokens < 0:
        raise InvalidTokens(f"max_new_tokens: expected 0 or more, found {max_new_tokens}.")


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

    # A padding token is never looked up, whatever its id.
    hidden, cache = model.hidden(jnp.where(mask, ids, 0), mask, cache)
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
