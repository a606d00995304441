"""Cross-entropy over a large vocabulary, in slices of it, so that the logits never exist as a whole.

The sum of exponentials is accumulated with a running maximum (Milakov and Gimelshein 2018, arXiv:1805.02867), and the
backward pass computes the logits of each slice again, as in Cut Cross-Entropy (Wijmans et al. 2024, arXiv:2411.09009).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ..policies.errors import UnsupportedCast
from ..policies.formats import ScaledArray
from ..policies.matmul import scaled_matmul

CHUNK = 4096
"""Default number of outputs of a slice: 16 KiB of float32 logits for a token, and 38 slices for Qwen3's vocabulary."""

IGNORED = -100
"""The label of tokens without a loss, as in PyTorch and transformers."""

Kernel = jax.Array | ScaledArray
Logits = Callable[[jax.Array, ArrayLike, int], jax.Array]
"""A function of x (n, features), `start` and `size`, which returns the logits (n, size) from `start` on."""


def chunked_cross_entropy(
    hidden: jax.Array, head: Kernel, labels: ArrayLike, *, chunk: int = CHUNK, compute: Any = None
) -> jax.Array:
    """Returns the cross-entropy of each label, as of `optax.softmax_cross_entropy_with_integer_labels`, float32.

    hidden   (..., features)         f32, bf16 or f16
    head     (vocabulary, features)  any float, or a ScaledArray; the kernel of a Flax `Dense` is its transpose
    labels   (...)                   integers; the loss is 0 for -100, and NaN for other labels outside the vocabulary
    chunk    outputs of a slice, rounded up to whole blocks of scales
    compute  as for `scaled_matmul`, which computes the logits; they are rounded to the dtype of `hidden`

    Of logits, (tokens, chunk) values exist at a time, in the backward pass too. Gradients are those of the plain loss:
    partial sums of the gradient of `hidden` are added in float32.

    >>> hidden, head = jnp.ones((2, 4)), jnp.zeros((8, 4))
    >>> chunked_cross_entropy(hidden, head, jnp.array([3, -100]), chunk=4).round(4).tolist()  # log(8)
    [2.0794, 0.0]

    Raises:
      UnsupportedCast: shapes or dtypes that do not fit.
    """
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != hidden.shape[:-1]:
        raise UnsupportedCast(
            f"labels: expected integers of shape {hidden.shape[:-1]}, found {labels.dtype} {labels.shape}. Pass a "
            "label for each hidden state, and -100 for those without one."
        )

    def logits(x: jax.Array, start: ArrayLike, size: int) -> jax.Array:
        return scaled_matmul(x, rows(head, start, size), compute=compute)

    rows_of = head.block[0] if isinstance(head, ScaledArray) else 1
    return cross_entropy_of(logits, hidden, labels, head.shape[0], slice_size(head.shape[0], rows_of, chunk))


def cross_entropy_of(logits: Logits, hidden: jax.Array, labels: jax.Array, vocabulary: int, size: int) -> jax.Array:
    """The cross-entropy of each label, of the shape of `labels`, float32, from slices of `size` logits.

    The function `logits` may close over arrays that are differentiated.
    """
    # In float32, so that the gradients of all slices are added in it.
    rows = hidden.reshape(-1, hidden.shape[-1]).astype(jnp.float32)
    flat = labels.reshape(-1).astype(jnp.int32)

    def add(size: int, carry: Any, start: ArrayLike) -> tuple[Any, None]:
        peak, total, own = carry
        part = logits(rows.astype(hidden.dtype), start, size).astype(jnp.float32)
        # Any number would do in place of the maximum, so its derivative is 0.
        highest = jax.lax.stop_gradient(jnp.maximum(peak, part.max(axis=-1)))
        total = total * jnp.exp(peak - highest) + jnp.exp(part - highest[:, None]).sum(axis=-1)
        is_own = flat[:, None] - jnp.asarray(start, jnp.int32) == jnp.arange(size, dtype=jnp.int32)
        found = jnp.where(is_own, part, 0).sum(axis=-1)
        return (highest, total, jnp.where(is_own.any(axis=-1), found, own)), None

    def slices(size: int) -> Callable[[Any, ArrayLike], tuple[Any, None]]:
        return jax.checkpoint(functools.partial(add, size), prevent_cse=False)

    count, rest = divmod(vocabulary, size)
    # Finite, so that a first slice of -inf is no NaN; a label that no slice has leaves NaN.
    carry = tuple(jnp.full(flat.shape, value, jnp.float32) for value in (jnp.finfo(jnp.float32).min, 0, jnp.nan))
    carry, _ = jax.lax.scan(slices(size), carry, size * jnp.arange(count, dtype=jnp.int32))
    if rest:
        carry, _ = slices(rest)(carry, count * size)
    peak, total, own = carry
    return jnp.where(flat == IGNORED, 0, peak + jnp.log(total) - own).reshape(labels.shape)


def slice_size(vocabulary: int, block: int, chunk: int) -> int:
    """The number of outputs of a slice: `chunk`, rounded up to whole blocks of `block` outputs.

    >>> slice_size(151936, 128, 4000), slice_size(1000, 1000, 10), slice_size(50, 1, 4096)
    (4096, 10, 50)

    Raises:
      UnsupportedCast: a chunk that is not positive.
    """
    if not isinstance(chunk, int) or chunk < 1:
        raise UnsupportedCast(
            f"chunk: expected a positive number of outputs, found {chunk!r}. Write 4096, for example."
        )
    return min(vocabulary, chunk if block >= vocabulary else -(-chunk // block) * block)


def rows(kernel: Kernel, start: ArrayLike, size: int) -> Kernel:
    """Rows from `start` on of a kernel (out, in); those of a narrow kernel begin where a block does."""
    if not isinstance(kernel, ScaledArray):
        return jax.lax.dynamic_slice_in_dim(kernel, start, size)
    values, scales, proxy = kernel.values, kernel.scale_inv, kernel.proxy
    if scales.shape[0] > 1:  # otherwise one block has all rows
        down = kernel.block[0]
        scales = jax.lax.dynamic_slice_in_dim(scales, jnp.asarray(start) // down, -(-size // down))
    return dataclasses.replace(
        kernel,
        values=jax.lax.dynamic_slice_in_dim(values, start, size),
        scale_inv=scales,
        proxy=None if proxy is None else jax.lax.dynamic_slice_in_dim(proxy, start, size),
    )
