"""`generate`, `generate_with_logprobs` and `decode`: prefill, then a compiled loop, as a whole or in chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import ArrayLike

from ...policies.errors import InvalidTokens, shown
from ...policies.hosts import on_host
from ..decoder import CausalLM
from . import programs
from .config import GenerationConfig, checked_count
from .keys import row_keys
from .prefix import check_prefix, checked_prompts, prefill, repeated
from .programs import Prefix
from .sampling import GREEDY, Sampling

CHUNK = 8
"""Tokens that `decode` generates between two results by default."""


@dataclasses.dataclass(frozen=True)
class Generated:
    """Generated tokens, one row for each answer.

    tokens        (rows, count) int32, padding after the end of a row
    lengths       (rows,) tokens before the padding, the token that ended the row included
    ended         (rows,) bool, whether a token ended the row; False: the row was cut off
    logprobs      (rows, count) float32, log-probability of each token before any processing of the logits; None unless
                  requested
    top_tokens    (rows, count, n) int32, the n most likely tokens at each place; likewise
    top_logprobs  (rows, count, n) float32, their log-probabilities; likewise
    """

    tokens: np.ndarray
    lengths: np.ndarray
    ended: np.ndarray
    logprobs: np.ndarray | None = None
    top_tokens: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None


def generate(
    model: CausalLM,
    input_ids: ArrayLike | Prefix,
    attention_mask: ArrayLike | None = None,
    max_new_tokens: int = 20,
    *,
    eos_token_id: ArrayLike | None = None,
    sampling: Sampling = GREEDY,
    key: Any = 0,
    num_return_sequences: int = 1,
) -> jax.Array:
    """The new tokens after every prompt, `(batch * num_return_sequences, max_new_tokens)` int32.

    input_ids             (batch, length) integers, or a `Prefix` with room for `max_new_tokens`
    attention_mask        (batch, length), nonzero for real tokens; prompts may be padded left or right; None: all real
    max_new_tokens        tokens to generate for each row; a row that ends earlier is filled with the config's
                          pad_token_id, or else with the first of `eos_token_id`, or else with 0
    eos_token_id          an id or several that end a row; None: those of the model's config; (): nothing ends a row
    sampling              how tokens are drawn; by default the most likely one is taken
    key                   an integer or a JAX key, or one for each row: a row with its own key gets the same answer in
                          any batch
    num_return_sequences  answers to each prompt, one after the other

    Raises:
      InvalidTokens: ids outside the vocabulary, a row without a real token, shapes that do not fit, a `Prefix` without
        room for `max_new_tokens`.
      InvalidSampling: a key or a bias that does not fit.
    """
    config = GenerationConfig(
        max_new_tokens,
        eos_token_id=eos_token_id,
        sampling=sampling,
        key=key,
        num_return_sequences=num_return_sequences,
    )
    return jnp.asarray(_generate(model, input_ids, attention_mask, config).tokens)


def generate_with_logprobs(
    model: CausalLM,
    input_ids: ArrayLike | Prefix,
    attention_mask: ArrayLike | None = None,
    config: GenerationConfig = GenerationConfig(logprobs=0),  # noqa: B008, since it is immutable
) -> Generated:
    """The new tokens after every prompt, where each row ends, and log-probabilities if `config` requests them.

    Arguments and errors are those of `generate`, with the settings in one value. `logprobs=None` means 0 here.
    """
    _check_config(config)
    if config.logprobs is None:
        config = dataclasses.replace(config, logprobs=0)
    return _generate(model, input_ids, attention_mask, config)


def _generate(
    model: CausalLM, input_ids: ArrayLike | Prefix, attention_mask: ArrayLike | None, config: GenerationConfig
) -> Generated:
    """All parts of `decode` as one, padded to `max_new_tokens`."""
    count = config.max_new_tokens
    parts = list(decode(model, input_ids, attention_mask, config, chunk=max(count, 1)))
    whole = parts[-1] if parts else _no_tokens(input_ids, config)
    missing = count - whole.tokens.shape[1]

    def padded(array: Any, fill: float) -> Any:
        if array is None:
            return None
        return np.pad(array, ((0, 0), (0, missing), *((0, 0),) * (array.ndim - 2)), constant_values=fill)

    pad = config.pad_id(model.config)
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
    config: GenerationConfig = GenerationConfig(),  # noqa: B008, since it is immutable
    *,
    chunk: int = CHUNK,
) -> Generator[Generated, np.ndarray | None, None]:
    """An iterator over the new tokens: the first token, then `chunk` tokens at a time.

    At most `chunk` tokens in all come as one part. The `lengths` of a part count its own tokens, `ended` is
    about all tokens so far. Send a bool array (rows,) to the iterator to end the rows where it is True.

    Arguments and errors are those of `generate_with_logprobs`.
    """
    chunk = checked_count("chunk", chunk, 1)
    _check_config(config)
    if config.logprobs is not None:
        checked_count("logprobs", config.logprobs, 0, model.config.vocab_size)
    if isinstance(input_ids, Prefix):
        if attention_mask is not None:
            raise InvalidTokens("attention_mask: expected None with a Prefix, whose cache knows its padding.")
        check_prefix(model, input_ids)
        if config.max_new_tokens > input_ids.room:
            raise InvalidTokens(
                f"max_new_tokens: the cache of the prefix has room for {input_ids.room}, found "
                f"{config.max_new_tokens}. Ask for fewer tokens, or pass a larger max_new_tokens to prefill."
            )
        rows = input_ids.tokens.shape[0]
    else:
        rows = checked_prompts(model, input_ids, attention_mask)[0].shape[0]
    keys = row_keys(config.key, rows, config.num_return_sequences)
    eos, pad = config.end_ids(model.config), config.pad_id(model.config)
    return _parts(model, input_ids, attention_mask, config, keys, eos, pad, chunk)


def _check_config(config: GenerationConfig) -> None:
    """Raises InvalidTokens for settings that are not a `GenerationConfig`."""
    if not isinstance(config, GenerationConfig):
        raise InvalidTokens(f"config: expected a GenerationConfig, found {shown(config)}.")


def _parts(
    model: CausalLM,
    prompt: ArrayLike | Prefix,
    mask: ArrayLike | None,
    config: GenerationConfig,
    keys: jax.Array,
    eos: np.ndarray,
    pad: int,
    chunk: int,
) -> Generator[Generated, np.ndarray | None, None]:
    """See `decode`."""
    count = config.max_new_tokens
    if count == 0:
        return
    prefix = prompt if isinstance(prompt, Prefix) else prefill(model, prompt, mask, max_new_tokens=count)
    graphdef, params = nnx.split(model)  # while the prefill runs
    start, yielded = int(on_host(prefix.cache.length)), 0
    if config.num_return_sequences > 1:
        prefix = repeated(prefix, config.num_return_sequences)
    elif prefix is prompt:  # decoding overwrites its cache
        prefix = jax.tree.map(jnp.copy, prefix)
    kind, numbers = config.sampling.kind, config.sampling.numbers(model.config.vocab_size)
    state = programs.begin(kind, config.logprobs, numbers, prefix.cache, prefix.tokens, prefix.logits, keys, eos)
    del prefix
    lengths = np.zeros(state.done.shape, np.int32)
    while True:
        stop = min(yielded + chunk if yielded or chunk >= count else 1, count)
        if stop > 1:  # `begin` has drawn the first token
            state = programs.decode(graphdef, kind, config.logprobs, params, state, numbers, eos, pad, stop)
        drawn, done, total = int(on_host(state.count)), on_host(state.done), on_host(state.lengths)
        records = [on_host(each)[:, start + yielded : start + drawn] for each in state.logprobs]
        tokens = on_host(state.tokens)[:, start + yielded : start + drawn]
        ended = yield Generated(tokens, total - lengths, done, *records)
        yielded, lengths = drawn, total
        if ended is not None:
            done = done | np.asarray(ended, bool)
            state = dataclasses.replace(state, done=jnp.asarray(done))
        if yielded >= count or done.all():
            return


def _no_tokens(input_ids: ArrayLike | Prefix, config: GenerationConfig) -> Generated:
    """Answers without a token."""
    prompts = input_ids.tokens if isinstance(input_ids, Prefix) else np.asarray(input_ids)
    rows = prompts.shape[0] * config.num_return_sequences
    tokens, several = np.zeros((rows, 0), np.int32), (rows, 0, config.logprobs or 0)
    records = (np.zeros((rows, 0), np.float32), np.zeros(several, np.int32), np.zeros(several, np.float32))
    return Generated(
        tokens, np.zeros(rows, np.int32), np.zeros(rows, bool), *(records if config.logprobs is not None else ())
    )
