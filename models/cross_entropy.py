"""Cross-entropy over a large vocabulary, in slices of it, so that the logits never exist as a whole.

The sum of exponentials is accumulated with a running maximum (Milakov and Gimelshein 2018, arXiv:1805.02867), and the
backward pass computes the logits of each slice again, as in Cut Cross-Entropy (Wijmans et al. 2024, arXiv:2411.09009).
"""

from __future__ import annotations

import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from ..policies.blocks import DEFAULT_BLOCK
from ..policies.errors import UnsupportedCast
from ..policies.formats import Format, as_format
from ..policies.matmul import scaled_matmul
from ..policies.scaled_array import ScaledArray
from ..policies.trainable import TrainableValues
from .head_losses import head_losses
from .head_slices import Head, Kernel

CHUNK = 4096
"""Default number of outputs of a slice: 16 KiB of float32 logits for a token, and 38 slices for Qwen3's vocabulary."""


def chunked_cross_entropy(
    hidden: jax.Array,
    head: Kernel,
    labels: ArrayLike,
    *,
    chunk: int = CHUNK,
    compute: Any = None,
    backward: Any = None,
) -> jax.Array:
    """Returns the cross-entropy of each label, as of `optax.softmax_cross_entropy_with_integer_labels`, float32.

    hidden    (..., features)         f32, bf16 or f16
    head      (vocabulary, features)  any float, or a ScaledArray; the kernel of a Flax `Dense` is its transpose
    labels    (...)                   integers; the loss is 0 for -100, and NaN for other labels outside the vocabulary
    chunk     outputs of a slice, rounded up to whole blocks of scales
    compute   as for `scaled_matmul`, which computes the logits; they are rounded to the dtype of `hidden`
    backward  likewise, for the products of the gradients

    Of logits, (tokens, chunk) values exist at a time, in the backward pass too. Gradients are those of the plain loss:
    partial sums of the gradient of `hidden` are added in float32, and each row of that of `head` is computed once. A
    ScaledArray with a proxy has the gradient of the weight there. Derivatives are those of reverse mode.

    >>> hidden, head = jnp.ones((2, 4)), jnp.zeros((8, 4))
    >>> [round(float(loss), 4) for loss in chunked_cross_entropy(hidden, head, jnp.array([3, -100]), chunk=4)]  # log(8)
    [2.0794, 0.0]

    Raises:
      UnsupportedCast: shapes or dtypes that do not fit.
      InvalidGradients: from a second derivative with a ScaledArray that has a proxy.
    """
    if isinstance(head, TrainableValues):
        raise UnsupportedCast(
            "head: found the TrainableValues of a scaled pair without scales. Pass "
            "perparam.ScaledArray(kernel, scale_inv, format)."
        )
    for name, value in (("hidden", hidden), ("head", head)):
        if not isinstance(value, (jax.Array, np.ndarray, ScaledArray)):
            remedy = f"the value of a variable, {name}[...]" if isinstance(value, nnx.Variable) else "an array"
            raise UnsupportedCast(f"{name}: expected an array, found {type(value).__name__}. Pass {remedy}.")
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != hidden.shape[:-1]:
        raise UnsupportedCast(
            f"labels: expected integers of shape {hidden.shape[:-1]}, found {labels.dtype} {labels.shape}. Pass a "
            "label for each hidden state, and -100 for those without one."
        )

    def logits(x: jax.Array, part: Head) -> jax.Array:
        return scaled_matmul(x, part.kernel, compute=compute, backward=backward)

    in_compute, in_backward = (None if each is None else as_format(each) for each in (compute, backward))
    size_of = functools.partial(slice_size_of, head, in_compute, in_backward, chunk=chunk)
    return head_losses(logits, hidden, Head(head), labels, size_of)


def slice_size_of(
    head: Kernel, compute: Format | None, backward: Format | None, vocabulary: int, block: int, *, chunk: int
) -> int:
    """The number of outputs of a slice: whole blocks of its scales, and of any into which products quantise it.

    block  rows that share scales
    """
    is_quantised = compute is not None and compute.narrow and not isinstance(head, ScaledArray)
    if is_quantised or backward is not None:
        block = math.lcm(block, DEFAULT_BLOCK[0])
    return slice_size(vocabulary, block, chunk)


def slice_size(vocabulary: int, block: int, chunk: int) -> int:
    """The number of outputs of a slice: `chunk`, rounded up to whole blocks of `block` outputs.

    >>> slice_size(151936, 128, 4000), slice_size(1000, 1000, 10), slice_size(50, 1, 4096)
    (4096, 10, 50)

    Raises:
      UnsupportedCast: a chunk that is not positive.
    """
    if not isinstance(chunk, numbers.Integral) or chunk < 1:
        raise UnsupportedCast(
            f"chunk: expected a positive number of outputs, found {chunk!r}. Write 4096, for example."
        )
    size = int(chunk)
    return min(vocabulary, size if block >= vocabulary else -(-size // block) * block)
