"""cuDNN's flash attention, for prompts on NVIDIA GPUs: no scores in memory, whatever the length."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ..policies.targets import Target

LEAST = 128
"""Tokens of a prompt from which on it is used: the scores of fewer are small."""

_CAPABILITY, _WIDEST = (8, 0), 128


def refuses(target: Target, tokens: int, head_dim: int, dtype: np.dtype, kept_in: np.dtype) -> str | None:
    """Why it cannot read a prompt, or should not; None where it can.

    >>> refuses(Target("cuda", (9, 0)), 4096, 128, np.dtype(np.float32), np.dtype(np.float32))
    'it takes bf16 and f16'
    """
    if target.platform != "cuda" or target.capability is None or target.capability < _CAPABILITY:
        return "it needs an NVIDIA GPU of compute capability 8.0 or more"
    if dtype not in (jnp.bfloat16, np.float16):
        return "it takes bf16 and f16"
    if kept_in != dtype:
        return "the cache has another dtype"
    if head_dim % 8 or head_dim > _WIDEST:
        return f"heads are {head_dim} wide, it takes multiples of 8 up to {_WIDEST}"
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
    """Causal attention of tokens that nothing came before: q (b, t, h, d) over k and v (b, t, kv, d), like q.

    mask            (b, t) bool, True for real tokens, wherever they stand; of the others the result is zero
    window          a query sees the keys less than `window` positions before it; None: all
    implementation  of `jax.nn.dot_product_attention`; "xla", which holds all scores, to check this one with

    Raises:
      RuntimeError, NotImplementedError: JAX's, where there is no cuDNN, or it does not take the call, see `traces`.
    """
    # cuDNN knows of padding at the end of rows alone.
    order = jnp.argsort(~mask, axis=1, stable=True)

    def moved(x: jax.Array, order: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, order[:, :, None, None], axis=1)

    lengths = mask.sum(axis=1, dtype=jnp.int32)
    with jax.numpy_dtype_promotion("standard"):  # on which JAX's own function relies
        mixed = jax.nn.dot_product_attention(
            moved(q, order),
            moved(k, order),
            moved(v, order),
            is_causal=True,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            local_window_size=None if window is None else (window - 1, 0),
            implementation=implementation,
        )
    # Zero rather than whatever is there: the next layer's values of padding are multiplied with weights of zero.
    return jnp.where(mask[:, :, None, None], moved(mixed, jnp.argsort(order, axis=1)), 0)


def traces(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, window: int | None) -> bool:
    """Whether JAX finds a cuDNN that takes this call."""
    try:
        jax.eval_shape(lambda q, k, v, mask: attend(q, k, v, mask, window), q, k, v, mask)
    except (RuntimeError, NotImplementedError):
        return False
    return True
