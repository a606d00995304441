"""The compiled programs of generation, and the values they pass on.

A prefill is compiled for each bucket of prompt lengths, decoding for each size of the cache. Numbers such as the
temperature are arguments of a program, not part of it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..decoder import CausalLM
from ..heads import last_token
from ..kv_cache import EMPTY, KVCache
from ..tokens import padding_last
from .sampling import History, Kind, draw, process


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """Prompts that a model has processed: `generate(model, prefix)` continues them, any number of times.

    cache   keys and values, with room for more tokens
    tokens  (b, slots) int32, the token in every filled slot
    logits  (b, vocabulary) float32, for the token after each prompt
    """

    cache: KVCache
    tokens: jax.Array
    logits: jax.Array

    @property
    def room(self) -> int:
        """Number of tokens that the cache still has room for."""
        return self.tokens.shape[1] - int(self.cache.length)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The state of a decoding loop.

    token           (b,) int32, the last drawn token, not yet in the cache
    tokens          (b, slots) int32, the token in every filled slot and in the next one
    done            (b,) bool, whether a row has ended
    lengths         (b,) int32, tokens drawn before the end of a row
    count           () int32, tokens drawn for the longest row
    keys            (b,) random keys
    prompt, answer  fields of `History`
    logprobs        log-probabilities (b, slots), most likely tokens (b, slots, n) and their log-probabilities; empty
                    unless requested
    """

    cache: KVCache
    token: jax.Array
    tokens: jax.Array
    done: jax.Array
    lengths: jax.Array
    count: jax.Array
    keys: jax.Array
    prompt: jax.Array | None
    answer: jax.Array | None
    logprobs: tuple[jax.Array, ...]


@functools.partial(jax.jit, static_argnames=("graphdef", "slots"))
def prefill(graphdef: Any, params: nnx.State, ids: jax.Array, mask: jax.Array, slots: int) -> Prefix:
    """The prompts `ids` (b, t) in a new cache of `slots`."""
    model = nnx.merge(graphdef, params)
    tokens = jnp.zeros((ids.shape[0], slots), jnp.int32)
    return _process(model, ids, mask, model.empty_cache(ids.shape[0], slots), tokens, first=True)


@functools.partial(jax.jit, static_argnames=("graphdef",))
def extend(
    graphdef: Any, params: nnx.State, ids: jax.Array, mask: jax.Array, cache: KVCache, tokens: jax.Array
) -> Prefix:
    """The prompts `ids` (b, t) after the tokens in `cache`."""
    return _process(nnx.merge(graphdef, params), ids, mask, cache, tokens)


def _process(
    model: CausalLM, ids: jax.Array, mask: jax.Array, cache: KVCache, tokens: jax.Array, *, first: bool = False
) -> Prefix:
    # As `hidden` places them in the cache.
    in_cache = jnp.take_along_axis(ids, padding_last(mask)[0], axis=1) if first else ids
    tokens = jax.lax.dynamic_update_slice_in_dim(tokens, in_cache, cache.length, axis=1)
    hidden, cache = model.hidden(ids, mask, cache, first=first)
    return Prefix(cache, tokens, model.logits(last_token(hidden, mask)).astype(jnp.float32))


@functools.partial(jax.jit, static_argnames=("kind", "logprobs"), donate_argnames=("cache", "tokens"))
def begin(
    kind: Kind,
    logprobs: int | None,
    numbers: Mapping[str, jax.Array],
    cache: KVCache,
    tokens: jax.Array,
    logits: jax.Array,
    keys: jax.Array,
    eos: jax.Array,
) -> State:
    """The state with the first token drawn, from the parts of a `Prefix`.

    kind, numbers  static and numeric settings of a `Sampling`
    logprobs       as in `GenerationConfig`
    eos            (count,) int32, ids that end a row
    """
    (rows, slots), vocabulary = tokens.shape, logits.shape[-1]
    prompt = answer = None
    if kind.counts:
        each = jnp.arange(rows)[:, None]
        prompt = jnp.zeros((rows, vocabulary), bool).at[each, tokens].max(cache.positions != EMPTY)
        answer = jnp.zeros((rows, vocabulary), jnp.int32)
    records: tuple[jax.Array, ...] = ()
    if logprobs is not None:
        several = (rows, slots, logprobs)
        records = jnp.zeros((rows, slots)), jnp.zeros(several, jnp.int32), jnp.zeros(several)
    zeros = jnp.zeros(rows, jnp.int32)
    state = State(cache, zeros, tokens, jnp.zeros(rows, bool), zeros, jnp.int32(0), keys, prompt, answer, records)
    return _draw_next(kind, numbers, state, logits, eos, 0)


@functools.partial(jax.jit, static_argnames=("graphdef", "kind", "logprobs"), donate_argnames=("state",))
def decode(
    graphdef: Any,
    kind: Kind,
    logprobs: int | None,
    params: nnx.State,
    state: State,
    numbers: Mapping[str, jax.Array],
    eos: jax.Array,
    pad: int,
    stop: int,
) -> State:
    """The state after `stop` tokens, or when all rows have ended; see `begin`.

    pad  id that fills a row after its end
    """
    model = nnx.merge(graphdef, params)

    def step(state: State) -> State:
        hidden, cache = model.hidden(state.token[:, None], None, state.cache)
        state = dataclasses.replace(state, cache=cache)
        return _draw_next(kind, numbers, state, model.logits(hidden[:, 0]).astype(jnp.float32), eos, pad)

    return jax.lax.while_loop(lambda state: (state.count < stop) & ~state.done.all(), step, state)


def _draw_next(
    kind: Kind, numbers: Mapping[str, jax.Array], state: State, logits: jax.Array, eos: jax.Array, pad: int | jax.Array
) -> State:
    """The state with one more token, drawn from logits (b, vocabulary) float32."""
    history = History(state.tokens, state.cache.positions != EMPTY, state.prompt, state.answer)
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.count) if kind.draws else state.keys
    token = draw(kind, process(kind, numbers, logits, history), keys)
    slot, records = state.cache.length, state.logprobs
    if records:
        log_likelihood = jax.nn.log_softmax(logits)
        best, ids = jax.lax.top_k(log_likelihood, records[1].shape[-1])
        new = jnp.take_along_axis(log_likelihood, token[:, None], axis=1)[:, 0], ids, best
        records = tuple(
            jax.lax.dynamic_update_slice_in_dim(
                old, _zero_where(state.done, one)[:, None].astype(old.dtype), slot, axis=1
            )
            for old, one in zip(records, new, strict=True)
        )
    token = jnp.where(state.done, pad, token)
    answer = state.answer
    if answer is not None:
        answer = answer.at[jnp.arange(token.shape[0]), token].add((~state.done).astype(jnp.int32))
    return dataclasses.replace(
        state,
        token=token,
        tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], slot, axis=1),
        done=state.done | jnp.isin(token, eos),
        lengths=state.lengths + (~state.done).astype(jnp.int32),
        count=state.count + 1,
        answer=answer,
        logprobs=records,
    )


def _zero_where(done: jax.Array, values: jax.Array) -> jax.Array:
    """`values` (b, ...), zero in rows that are done."""
    return jnp.where(done.reshape(-1, *(1,) * (values.ndim - 1)), 0, values)
