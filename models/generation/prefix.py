"""Prefill: prompts that a model has processed, and that generation continues."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import ArrayLike

from ...policies.dtypes import dtype_name
from ...policies.errors import InvalidTokens, count, shown
from ...policies.hosts import on_host
from ..decoder import CausalLM
from ..heads import check_causal_lm
from ..kv_cache import EMPTY
from ..tokens import checked_tokens
from . import programs
from .config import checked_count
from .programs import Prefix


def bucket(count: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, … that is not less than `count`.

    Prompts and caches are padded to such lengths, so that few programs are compiled.

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
    max_new_tokens: int = 256,
    prefix: Prefix | None = None,
) -> Prefix:
    """Processes prompts; returns a `Prefix` that `generate` continues.

    input_ids       (batch, length) integers
    attention_mask  (batch, length), nonzero for real tokens; prompts may be padded left or right; None: all are real
    max_new_tokens  tokens that the cache has room for after the prompts, at least; unused with a prefix
    prefix          prompts that these ones continue, in the prefix's own cache; stays unchanged

    Raises:
      InvalidTokens: ids outside the vocabulary, a row without a real token, shapes that do not fit, a full cache.
    """
    ids, mask = checked_prompts(model, input_ids, attention_mask)
    max_new_tokens = checked_count("max_new_tokens", max_new_tokens, 0)
    length = bucket(ids.shape[1])
    if prefix is not None:
        check_prefix(model, prefix)
        length = min(length, max(prefix.room, ids.shape[1]))
        prefix.cache.check_room(length)
        if ids.shape[0] != prefix.tokens.shape[0]:
            raise InvalidTokens(f"input_ids: the prefix has {count(len(prefix.tokens), 'row')}, found {len(ids)}.")
    ids, mask = (np.pad(x, ((0, 0), (length - x.shape[1], 0))) for x in (ids, mask))
    graphdef, state = nnx.split(model)
    if prefix is None:
        return programs.prefill(graphdef, state, ids, mask, bucket(length + max_new_tokens))
    return programs.extend(graphdef, state, ids, mask, prefix.cache, prefix.tokens)


def extend_prefix(model: CausalLM, prefix: Prefix, input_ids: ArrayLike, *, max_new_tokens: int = 256) -> Prefix:
    """`prefill` of one prompt, but only of the tokens after its longest common beginning with `prefix`.

    input_ids       (1, length) integers
    max_new_tokens  as for `prefill`

    `prefix` stays unchanged. The whole prompt is processed where the two have no beginning in common, or the cache of
    `prefix` has no room for the rest and for `max_new_tokens`.

    Raises:
      InvalidTokens: more than one row, and as `prefill`.
    """
    ids, mask = checked_prompts(model, input_ids, None)
    check_prefix(model, prefix)
    if ids.shape[0] != 1 or prefix.tokens.shape[0] != 1:
        raise InvalidTokens(
            f"input_ids: expected one row and a prefix of one row, found {ids.shape[0]} and {prefix.tokens.shape[0]}."
        )
    past = on_host(prefix.tokens)[on_host(prefix.cache.positions) != EMPTY]
    most = min(past.size, ids.size - 1)  # the last token is processed again for its logits
    differs = np.flatnonzero(ids[0, :most] != past[:most])
    shared = int(differs[0]) if differs.size else most
    beginning = truncated(prefix, shared)
    if shared == 0 or beginning.room < bucket(ids.size - shared) + max_new_tokens:
        return prefill(model, ids, mask, max_new_tokens=max_new_tokens)
    return prefill(model, ids[:, shared:], prefix=beginning)


def truncated(prefix: Prefix, count: int) -> Prefix:
    """The first `count` real tokens of each row; the logits are NaN until more tokens are processed."""
    inside = prefix.cache.positions < count
    filled = jnp.max(jnp.where(inside, jnp.arange(inside.shape[1], dtype=jnp.int32) + 1, 0))
    cache = dataclasses.replace(
        prefix.cache,
        positions=jnp.where(inside, prefix.cache.positions, EMPTY),
        length=filled,
        tokens=jnp.minimum(prefix.cache.tokens, count),
    )
    return Prefix(cache, prefix.tokens, jnp.full_like(prefix.logits, jnp.nan))


def repeated(prefix: Prefix, count: int) -> Prefix:
    """Every prompt `count` times, one after the other."""
    if count == 1:
        return prefix
    return jax.tree.map(lambda x: jnp.repeat(x, count, axis=0) if x.ndim else jnp.copy(x), prefix)


def check_prefix(model: CausalLM, prefix: Prefix) -> None:
    """Raises InvalidTokens unless the cache of `prefix` is one of `model` under its policy."""
    if not isinstance(prefix, Prefix):
        raise InvalidTokens(f"prefix: expected a Prefix, found {shown(prefix)}.")
    own = jax.eval_shape(lambda: model.empty_cache(1, 1))
    layouts = [(cache.dtype, [(key.shape[1:3], key.dtype) for key in cache.keys]) for cache in (own, prefix.cache)]
    if layouts[0] != layouts[1]:
        theirs, ours = (
            f"{count(len(cache.keys), 'layer')} in {dtype_name(cache.dtype)}" for cache in (prefix.cache, own)
        )
        raise InvalidTokens(
            f"prefix: its cache has {theirs}, the model's has {ours}, or heads of another shape. Make a prefix with "
            "this model under this policy."
        )


def checked_prompts(
    model: CausalLM, input_ids: ArrayLike, attention_mask: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask (batch, length) of prompts that can be continued.

    Raises:
      UnsupportedTask: a model without a language-model head.
      InvalidTokens: a row without a real token, and as `checked_tokens`.
    """
    check_causal_lm(model.config.task, "generation")
    ids, mask = map(np.asarray, checked_tokens(input_ids, attention_mask, model.config.vocab_size))
    if 0 in ids.shape:
        raise InvalidTokens(f"input_ids: expected integers of shape (batch, length), found {ids.dtype} {ids.shape}.")
    has_tokens = mask.any(axis=1)
    if not has_tokens.all():
        raise InvalidTokens(
            f"attention_mask: row {int(np.argmin(has_tokens))} has no real token, so there is nothing to continue."
        )
    return ids, mask
