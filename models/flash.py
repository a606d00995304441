"""cuDNN's flash attention for prompts on NVIDIA GPUs, which holds no attention scores in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ..policies.targets import Target

LEAST = 128
"""Tokens of the shortest prompt that uses it; the scores of shorter ones are small."""

SLOTS = 8
"""Keys of a call with a mask are a multiple of this, so that the rows of the mask begin at multiples of 16 bytes."""

_CAPABILITY, _WIDEST = (8, 0), 128


def refuses(target: Target, tokens: int, head_dim: int, dtype: np.dtype, cache_dtype: np.dtype) -> str | None:
    """The reason not to use cuDNN's flash attention for a prompt; None if it can be used.

    target       device that the program is compiled for
    tokens       length of the prompt
    dtype        of queries, keys and values
    cache_dtype  of the cache that the prompt enters

    >>> refuses(Target("cuda", (9, 0)), 4096, 128, np.dtype(np.float32), np.dtype(np.float32))
    'it supports bf16 and f16'
    """
    if target.platform != "cuda" or target.capability is None or target.capability < _CAPABILITY:
        return "it needs an NVIDIA GPU of compute capability 8.0 or more"
    if dtype not in (jnp.bfloat16, np.float16):
        return "it supports bf16 and f16"
    if cache_dtype != dtype:
        return "the cache has another dtype"
    if head_dim % 8 or head_dim > _WIDEST:
        return f"head_dim is {head_dim}, it supports multiples of 8 up to {_WIDEST}"
    if tokens < LEAST:
        return f"the prompt has fewer than {LEAST} tokens"
    return None


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    window: int | None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Causal attention within prompts that follow no other tokens, (b, t, h, d) in q's dtype.

    q               (b, t, h, d)
    k, v            (b, t, kv, d), in q's dtype
    mask            (b, t) bool, True for real tokens, which are at the beginning of each row, since cuDNN supports
                    padding at the end only; the result of padding is zero
    window          a query sees the keys less than `window` positions before it; None: all
    implementation  of `jax.nn.dot_product_attention`; "xla" holds all scores, and is a reference for tests

    Raises:
      RuntimeError, NotImplementedError: from JAX, without a cuDNN that supports the call; see `traces`.
    """
    lengths = mask.sum(axis=1, dtype=jnp.int32)
    with jax.numpy_dtype_promotion("standard"):  # which JAX's own function needs
        mixed = jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            local_window_size=None if window is None else (window - 1, 0),
            implementation=implementation,
        )
    # Padding is zero, since its values in the next layer are multiplied by weights of zero, and NaN would stay NaN.
    return jnp.where(mask[:, :, None, None], mixed, 0)


def attend_masked(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, implementation: Literal["cudnn", "xla"] = "cudnn"
) -> jax.Array:
    """Attention of q over those keys that each query sees, (b, t, h, d) in q's dtype.

    cuDNN adds the mask to scores as a bias in q's dtype, which is in memory, once for all heads.

    q               (b, t, h, d)
    k, v            (b, s, kv, d), in q's dtype; s is a multiple of `SLOTS`
    seen            (b, t, s) bool; a query that sees nothing has the mean of all values
    implementation  as for `attend`

    Raises:
      RuntimeError, NotImplementedError: from JAX, without a cuDNN that supports the call; see `traces_masked`.
    """
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], implementation=implementation)


def traces(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, window: int | None) -> bool:
    """Whether the installed cuDNN supports this call of `attend`."""
    return _traces(lambda q, k, v, mask: attend(q, k, v, mask, window), q, k, v, mask)


def traces_masked(q: jax.Array, values: jax.Array) -> bool:
    """Whether the installed cuDNN supports calls of `attend_masked` for values (b, kv, s, d)."""
    b, kv, s, d = values.shape
    k = jax.ShapeDtypeStruct((b, s, kv, d), values.dtype)
    return _traces(attend_masked, q, k, k, jax.ShapeDtypeStruct((b, q.shape[1], s), jnp.bool_))


def _traces(function: Callable[..., jax.Array], *operands: Any) -> bool:
    try:
        jax.eval_shape(function, *operands)
    except (RuntimeError, NotImplementedError):
        return False
    return True
