"""Generation: a prefill in buckets, then a compiled loop that draws token after token, as a whole or in chunks.

A program is compiled for each bucket of prompt lengths, and one for each size of the cache.  Prompts are padded to 16,
24, 32, 48, 64, … tokens, and so is the cache; numbers such as the temperature are no part of a program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Generator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import ArrayLike

from ..policies.errors import InvalidTokens
from .decoder import CausalLM
from .kv_cache import EMPTY, KVCache
from .sampling import GREEDY, History, Kind, Sampling, draw, process, row_keys
from .tokens import checked_tokens

CHUNK = 8
"""Tokens between two looks at what has come, where somebody is waiting for them."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """Prompts that a model has read: `generate(model, prefix)` goes on from it, as often as one likes.

    cache   keys and values, with room for more
    tokens  (b, slots) int32, the token of every filled slot
    logits  (b, vocabulary) float32, for the token after each prompt
    """

    cache: KVCache
    tokens: jax.Array
    logits: jax.Array

    @property
    def room(self) -> int:
        """How many more tokens fit."""
        return self.tokens.shape[1] - int(self.cache.length)

    def rewound(self, count: int) -> Prefix:
        """With the first `count` real tokens of each row alone, and no logits until more is read."""
        kept = self.cache.positions < count
        filled = jnp.max(jnp.where(kept, jnp.arange(kept.shape[1], dtype=jnp.int32) + 1, 0))
        cache = dataclasses.replace(
            self.cache,
            positions=jnp.where(kept, self.cache.positions, EMPTY),
            length=filled,
            tokens=jnp.minimum(self.cache.tokens, count),
        )
        return Prefix(cache, self.tokens, jnp.full_like(self.logits, jnp.nan))

    def repeat(self, count: int) -> Prefix:
        """Every prompt `count` times, one after the other."""
        if count == 1:
            return self
        return jax.tree.map(lambda x: jnp.repeat(x, count, axis=0) if x.ndim else jnp.copy(x), self)


@dataclasses.dataclass(frozen=True)
class Generated:
    """What was generated, one row an answer.

    tokens          (rows, count) int32, padding after the end of a row
    lengths         (rows,) tokens before that, the one that ended it included
    ended           (rows,) bool, whether a row ended by itself; False: it was cut off
    logprobs        (rows, count) float32, of each token before any processing of the logits; None: not asked for
    top_tokens      (rows, count, n) int32, the n likeliest tokens at each place, likewise
    top_logprobs    (rows, count, n) float32, and how likely they are
    """

    tokens: np.ndarray
    lengths: np.ndarray
    ended: np.ndarray
    logprobs: np.ndarray | None = None
    top_tokens: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None


def bucket(count: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, … that is not less than `count`.

    >>> [bucket(count) for count in (1, 17, 25, 100)]
    [16, 24, 32, 128]
    """
    power = max(1 << max(count - 1, 0).bit_length(), 16)
    return power * 3 // 4 if power > 16 and count <= power * 3 // 4 else power


def prefill(
    model: CausalLM,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    room: int = 256,
    prefix: Prefix | None = None,
) -> Prefix:
    """The prompts as the model has read them, after those of `prefix` where one is given, which stays as it is.

    input_ids       (batch, length) integers
    attention_mask  (batch, length), nonzero for real tokens; prompts may be padded left or right; None: all are real
    room            for at least how many tokens more the cache has slots; with a prefix its cache has what it has

    Raises:
      InvalidTokens: ids outside the vocabulary, a row without a real token, shapes that do not fit, a full cache.
    """
    ids, mask = _prompts(model, input_ids, attention_mask)
    length = bucket(ids.shape[1])
    if prefix is not None:
        length = min(length, max(prefix.room, ids.shape[1]))
        prefix.cache.check_room(length)
        if ids.shape[0] != prefix.tokens.shape[0]:
            raise InvalidTokens(f"input_ids: the prefix has {prefix.tokens.shape[0]} rows, found {ids.shape[0]}.")
    ids, mask = (np.pad(x, ((0, 0), (length - x.shape[1], 0))) for x in (ids, mask))
    graphdef, state = nnx.split(model)
    if prefix is None:
        return _prefill(graphdef, state, ids, mask, bucket(length + room))
    return _extend(graphdef, state, ids, mask, prefix.cache, prefix.tokens)


def reread(model: CausalLM, input_ids: ArrayLike, before: Prefix, *, room: int = 256) -> Prefix:
    """`prefill` of one prompt, of which only what the one in `before` did not begin with is read; `before` stays.

    All of it is read where nothing is shared, or the cache has no room for the rest and for `room` tokens more.

    Raises:
      InvalidTokens: for more than one row, and as `prefill`.
    """
    ids, mask = _prompts(model, input_ids, None)
    if ids.shape[0] != 1 or before.tokens.shape[0] != 1:
        raise InvalidTokens(f"input_ids: expected one row, found {ids.shape[0]}, and {before.tokens.shape[0]} before.")
    known = np.asarray(before.tokens)[np.asarray(before.cache.positions) != EMPTY]
    least = min(known.size, ids.size - 1)  # the last one's logits are wanted
    differs = np.flatnonzero(ids[0, :least] != known[:least])
    shared = int(differs[0]) if differs.size else least
    rest = before.rewound(shared)
    if shared == 0 or rest.room < bucket(ids.size - shared) + room:
        return prefill(model, ids, mask, room=room)
    return prefill(model, ids[:, shared:], prefix=rest)


def generate(
    model: CausalLM,
    input_ids: ArrayLike | Prefix,
    attention_mask: ArrayLike | None = None,
    max_new_tokens: int = 20,
    eos_token_id: ArrayLike | None = None,
    *,
    sampling: Sampling = GREEDY,
    seed: Any = 0,
    samples: int = 1,
) -> jax.Array:
    """The continuation of every prompt: `(batch * samples, max_new_tokens)` int32, the new tokens alone.

    input_ids       (batch, length) integers, or a `Prefix`
    attention_mask  (batch, length), nonzero for real tokens; prompts may be padded left or right; None: all are real
    eos_token_id    an id or several that end a row, which goes on with the config's pad_token_id (or else the first of
                    them); None: the config's; (): nothing ends a row
    sampling        how tokens are drawn; by default the likeliest is taken
    seed            an integer, or one a row: with its own seed a row is answered alike in whatever batch
    samples         answers to each prompt, one after the other

    Raises:
      InvalidTokens: ids outside the vocabulary, a row without a real token, shapes that do not fit.
      InvalidSampling: a seed or a bias that does not fit.
    """
    answer = generate_with_logprobs(
        model, input_ids, attention_mask, max_new_tokens, eos_token_id, sampling=sampling, seed=seed, samples=samples,
        logprobs=None,
    )  # fmt: skip
    return jnp.asarray(answer.tokens)


def generate_with_logprobs(
    model: CausalLM,
    input_ids: ArrayLike | Prefix,
    attention_mask: ArrayLike | None = None,
    max_new_tokens: int = 20,
    eos_token_id: ArrayLike | None = None,
    *,
    sampling: Sampling = GREEDY,
    seed: Any = 0,
    samples: int = 1,
    logprobs: int | None = 0,
) -> Generated:
    """`generate`, with where each row ended and how likely its tokens were.

    logprobs  how many of the likeliest tokens to tell at each place beside the one that was drawn; None: none at all
    """
    asked = checked_count("max_new_tokens", max_new_tokens, 0)
    parts = list(
        decode(
            model, input_ids, attention_mask, asked, eos_token_id,
            sampling=sampling, seed=seed, samples=samples, logprobs=logprobs, chunk=max(asked, 1),
        )
    )  # fmt: skip
    whole = parts[-1] if parts else _nothing(input_ids, samples, logprobs)
    missing = asked - whole.tokens.shape[1]

    def padded(array: Any, fill: float) -> Any:
        if array is None:
            return None
        return np.pad(array, ((0, 0), (0, missing), *((0, 0),) * (array.ndim - 2)), constant_values=fill)

    pad = _pad(model, eos_token_id)
    return dataclasses.replace(
        whole,
        tokens=padded(whole.tokens, pad),
        logprobs=padded(whole.logprobs, 0.0),
        top_tokens=padded(whole.top_tokens, pad),
        top_logprobs=padded(whole.top_logprobs, 0.0),
    )


def decode(
    model: CausalLM,
    input_ids: ArrayLike | Prefix,
    attention_mask: ArrayLike | None = None,
    max_new_tokens: int = 20,
    eos_token_id: ArrayLike | None = None,
    *,
    sampling: Sampling = GREEDY,
    seed: Any = 0,
    samples: int = 1,
    logprobs: int | None = None,
    chunk: int = CHUNK,
) -> Generator[Generated, np.ndarray | None, None]:
    """The continuation as it comes: the first token, then `chunk` at a time; no more than `chunk` in all come together.
    `lengths` are those of the part, `ended` so far.

    What is sent to the iterator, (rows,) bool, ends rows from outside.  Arguments and errors are those of `generate`.
    """
    count, samples = checked_count("max_new_tokens", max_new_tokens, 0), checked_count("samples", samples, 1)
    chunk = checked_count("chunk", chunk, 1)
    if logprobs is not None:
        logprobs = checked_count("logprobs", logprobs, 0, model.config.vocab_size)
    if isinstance(input_ids, Prefix):
        rows = input_ids.tokens.shape[0]
    else:
        rows = _prompts(model, input_ids, attention_mask)[0].shape[0]
    keys = row_keys(seed, rows, samples)
    decoding = _Decoding(model, sampling, _ends(model, eos_token_id), _pad(model, eos_token_id), logprobs)
    return decoding.parts(input_ids, attention_mask, count, keys, samples, chunk)


def checked_count(name: str, value: Any, least: int, most: int = 2**30) -> int:
    """`value` as an integer; raises InvalidTokens where it is none, or out of range."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= most:
        raise InvalidTokens(f"{name}: expected an integer of {least} or more, found {value!r}.")
    return int(value)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """Where a decoding stands.

    token     (b,) int32, drawn last, and not yet in the cache
    tokens    (b, slots) int32, of every slot that is filled, and of the next one
    done      (b,) bool
    lengths   (b,) int32, tokens drawn before a row was done
    count     () int32, tokens drawn for the longest
    keys      (b,)
    prompt, answer  what `History` holds of them
    told      log-probabilities (b, slots), likeliest tokens (b, slots, n) and theirs, likewise; () where nobody asked
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
    told: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class _Decoding:
    """What stays the same from token to token."""

    model: CausalLM
    sampling: Sampling
    eos: np.ndarray
    pad: int
    logprobs: int | None

    def parts(
        self, prompt: ArrayLike | Prefix, mask: ArrayLike | None, count: int, keys: jax.Array, samples: int, chunk: int
    ) -> Generator[Generated, np.ndarray | None, None]:
        """See `decode`."""
        if count == 0:
            return
        prefix = prompt if isinstance(prompt, Prefix) else prefill(self.model, prompt, mask, room=count)
        count = min(count, prefix.room)
        if count == 0:
            return
        start, given = int(prefix.cache.length), 0
        if samples > 1:
            prefix = prefix.repeat(samples)
        elif prefix is prompt:  # decoding overwrites its cache
            prefix = jax.tree.map(jnp.copy, prefix)
        graphdef, params = nnx.split(self.model)
        kind, numbers = self.sampling.kind, self.sampling.numbers(self.model.config.vocab_size)
        state = _begin(kind, self.logprobs, numbers, prefix.cache, prefix.tokens, prefix.logits, keys, self.eos)
        del prefix
        lengths = np.zeros(state.done.shape, np.int32)
        while True:
            stop = min(given + chunk if given or chunk >= count else 1, count)
            if stop > 1:  # the first is drawn already
                state = _decode(graphdef, kind, self.logprobs, params, state, numbers, self.eos, self.pad, stop)
            made, done, now = int(state.count), np.asarray(state.done), np.asarray(state.lengths)
            told = [np.asarray(each)[:, start + given : start + made] for each in state.told]
            tokens = np.asarray(state.tokens)[:, start + given : start + made]
            ended = yield Generated(tokens, now - lengths, done, *told)
            given, lengths = made, now
            if ended is not None:
                done = done | np.asarray(ended, bool)
                state = dataclasses.replace(state, done=jnp.asarray(done))
            if given >= count or done.all():
                return


@functools.partial(jax.jit, static_argnames=("graphdef", "slots"))
def _prefill(graphdef: Any, params: nnx.State, ids: jax.Array, mask: jax.Array, slots: int) -> Prefix:
    model = nnx.merge(graphdef, params)
    tokens = jnp.zeros((ids.shape[0], slots), jnp.int32)
    return _read(model, ids, mask, model.empty_cache(ids.shape[0], slots), tokens, first=True)


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _extend(
    graphdef: Any, params: nnx.State, ids: jax.Array, mask: jax.Array, cache: KVCache, tokens: jax.Array
) -> Prefix:
    return _read(nnx.merge(graphdef, params), ids, mask, cache, tokens)


def _read(
    model: CausalLM, ids: jax.Array, mask: jax.Array, cache: KVCache, tokens: jax.Array, *, first: bool = False
) -> Prefix:
    tokens = jax.lax.dynamic_update_slice_in_dim(tokens, ids, cache.length, axis=1)
    hidden, cache = model.hidden(ids, mask, cache, first=first)
    last = ids.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return Prefix(cache, tokens, model.logits(hidden).astype(jnp.float32))


@functools.partial(jax.jit, static_argnames=("kind", "logprobs"), donate_argnames=("cache", "tokens"))
def _begin(
    kind: Kind,
    logprobs: int | None,
    numbers: Mapping[str, jax.Array],
    cache: KVCache,
    tokens: jax.Array,
    logits: jax.Array,
    keys: jax.Array,
    eos: jax.Array,
) -> _State:
    """The state with the first token drawn."""
    (rows, slots), vocabulary = tokens.shape, logits.shape[-1]
    prompt = answer = None
    if kind.counts:
        each = jnp.arange(rows)[:, None]
        prompt = jnp.zeros((rows, vocabulary), bool).at[each, tokens].max(cache.positions != EMPTY)
        answer = jnp.zeros((rows, vocabulary), jnp.int32)
    told: tuple[jax.Array, ...] = ()
    if logprobs is not None:
        several = (rows, slots, logprobs)
        told = jnp.zeros((rows, slots)), jnp.zeros(several, jnp.int32), jnp.zeros(several)
    none = jnp.zeros(rows, jnp.int32)
    state = _State(cache, none, tokens, jnp.zeros(rows, bool), none, jnp.int32(0), keys, prompt, answer, told)
    return _drawn(kind, numbers, state, logits, eos, 0)


@functools.partial(jax.jit, static_argnames=("graphdef", "kind", "logprobs"), donate_argnames=("state",))
def _decode(
    graphdef: Any,
    kind: Kind,
    logprobs: int | None,
    params: nnx.State,
    state: _State,
    numbers: Mapping[str, jax.Array],
    eos: jax.Array,
    pad: int,
    stop: int,
) -> _State:
    """The state after `stop` tokens, or when all rows have ended."""
    model = nnx.merge(graphdef, params)

    def step(state: _State) -> _State:
        hidden, cache = model.hidden(state.token[:, None], None, state.cache)
        state = dataclasses.replace(state, cache=cache)
        return _drawn(kind, numbers, state, model.logits(hidden[:, 0]).astype(jnp.float32), eos, pad)

    return jax.lax.while_loop(lambda state: (state.count < stop) & ~state.done.all(), step, state)


def _drawn(
    kind: Kind, numbers: Mapping[str, jax.Array], state: _State, logits: jax.Array, eos: jax.Array, pad: int | jax.Array
) -> _State:
    """The state with one more token, drawn from logits (b, vocabulary) float32."""
    history = History(state.tokens, state.cache.positions != EMPTY, state.prompt, state.answer)
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.count) if kind.draws else state.keys
    token = draw(kind, process(kind, numbers, logits, history), keys)
    slot, told = state.cache.length, state.told
    if told:
        likely = jax.nn.log_softmax(logits)
        best, ids = jax.lax.top_k(likely, told[1].shape[-1])
        new = jnp.take_along_axis(likely, token[:, None], axis=1)[:, 0], ids, best
        told = tuple(
            jax.lax.dynamic_update_slice_in_dim(old, _unless(state.done, one)[:, None].astype(old.dtype), slot, axis=1)
            for old, one in zip(told, new, strict=True)
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
        told=told,
    )


def _unless(done: jax.Array, values: jax.Array) -> jax.Array:
    """`values` (b, ...), zero in rows that are done."""
    return jnp.where(done.reshape(-1, *(1,) * (values.ndim - 1)), 0, values)


def _prompts(model: CausalLM, input_ids: ArrayLike, attention_mask: ArrayLike | None) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask (batch, length) that can be continued."""
    ids, mask = map(np.asarray, checked_tokens(input_ids, attention_mask, model.config.vocab_size))
    if 0 in ids.shape:
        raise InvalidTokens(f"input_ids: expected integers of shape (batch, length), found {ids.dtype} {ids.shape}.")
    alive = mask.any(axis=1)
    if not alive.all():
        raise InvalidTokens(
            f"attention_mask: row {int(np.argmin(alive))} has no real token, so there is nothing to continue."
        )
    return ids, mask


def _ends(model: CausalLM, eos_token_id: ArrayLike | None) -> np.ndarray:
    """The ids that end a row, (count,) int32."""
    ids = np.atleast_1d(np.asarray(model.config.eos_token_id if eos_token_id is None else eos_token_id))
    whole = ids.size == 0 or np.issubdtype(ids.dtype, np.integer)
    if ids.ndim != 1 or not whole or not ((ids >= 0) & (ids < 2**31)).all():
        raise InvalidTokens(f"eos_token_id: expected a token id or several, found {eos_token_id!r}.")
    return ids.astype(np.int32)


def _pad(model: CausalLM, eos_token_id: ArrayLike | None) -> int:
    """What follows in a row that has ended."""
    if model.config.pad_token_id is not None:
        return model.config.pad_token_id
    eos = _ends(model, eos_token_id)
    return int(eos[0]) if eos.size else 0


def _nothing(input_ids: ArrayLike | Prefix, samples: int, logprobs: int | None) -> Generated:
    """Answers without a token."""
    rows = (input_ids.tokens if isinstance(input_ids, Prefix) else np.asarray(input_ids)).shape[0] * samples
    tokens, several = np.zeros((rows, 0), np.int32), (rows, 0, logprobs or 0)
    told = (np.zeros((rows, 0), np.float32), np.zeros(several, np.int32), np.zeros(several, np.float32))
    return Generated(tokens, np.zeros(rows, np.int32), np.zeros(rows, bool), *(told if logprobs is not None else ()))
