"""The next-token loss of a decoder, whose logits are computed in slices of the vocabulary."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from ..policies.errors import InvalidTokens, UnsupportedTask
from ..policies.formats import ScaledArray
from ..policies.paths import proxy_path, scale_path
from . import taps
from .cross_entropy import CHUNK, IGNORED, cross_entropy_of, rows, slice_size
from .decoder import Decoder
from .heads import check_causal_lm
from .layers import Embedding, Linear, weights
from .segments import checked_segments
from .tokens import checked_tokens, integers

_BY_OUTPUT = ("bias", "lora_b")
_WHOLE = ("lora_a",)


def next_token_loss(
    model: Decoder,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    labels: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    chunk: int = CHUNK,
) -> jax.Array:
    """Returns the mean cross-entropy of the next tokens, () float32; its logits never exist as a whole.

    input_ids       (b, t) int32
    attention_mask  (b, t), nonzero for real tokens; None: all are real
    labels          (b, t) integers, not shifted: the label at t + 1 is compared with the logits at t, and -100 is
                    ignored, as in transformers; None: the input ids
    segment_ids     (b, t) integers, in place of a mask for rows of several sequences, see `Decoder`
    chunk           outputs of the head that are computed at a time, see `chunked_cross_entropy`

    A token counts if it, and the token before it, is real and of the same sequence: `label_count` has their number.
    Without any, the loss is 0. Logits have the bits of those that `model(input_ids)` returns.

    Raises:
      InvalidTokens: as in a call of the model; labels outside the vocabulary, except under jit.
      UnsupportedTask: a model without a language-model head, or with a head whose outputs cannot be sliced.
    """
    check_causal_lm(model.config.task, "next_token_loss")
    head = model.embed_tokens if model.lm_head is None else model.lm_head
    path = "embed_tokens" if model.lm_head is None else "lm_head"
    block = _block(path, head)
    vocabulary = model.config.vocab_size
    targets = _targets(vocabulary, input_ids, attention_mask, labels, segment_ids)
    hidden, _ = model.hidden(input_ids, attention_mask, segment_ids=segment_ids)
    x = taps.tap("norm", model.norm(hidden))

    def logits(x: jax.Array, start: ArrayLike, size: int) -> jax.Array:
        part: Any = _slice(head, start, size)
        return (part.attend(x) if isinstance(part, Embedding) else part(x)).astype(model.output)

    losses = cross_entropy_of(logits, x, targets, vocabulary, slice_size(vocabulary, block, chunk))
    return losses.sum() / jnp.maximum((targets != IGNORED).sum(dtype=jnp.int32), 1).astype(jnp.float32)


def label_count(
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    labels: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
) -> jax.Array:
    """Returns the number of tokens whose mean `next_token_loss` is, () float32: the weight of a batch among others.

    >>> int(label_count([[5, 6, 7, 8]])), int(label_count([[5, 6, 7, 8]], segment_ids=[[1, 1, 2, 0]]))
    (3, 1)
    """
    targets = _targets(None, input_ids, attention_mask, labels, segment_ids)
    return (targets != IGNORED).sum(dtype=jnp.int32).astype(jnp.float32)


def _targets(
    vocabulary: int | None,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None,
    labels: ArrayLike | None,
    segment_ids: ArrayLike | None,
) -> jax.Array:
    """The label (b, t) int32 of the token after each, IGNORED if there is none.

    vocabulary  None: ids and labels are not checked against it
    """
    if segment_ids is not None:
        if attention_mask is not None:
            raise InvalidTokens("segment_ids: expected no attention_mask. Mark padding with 0.")
        segments = jnp.asarray(checked_segments(segment_ids, input_ids))
        follows = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    ids, mask = checked_tokens(
        input_ids,
        attention_mask if segment_ids is None else segments > 0,
        np.iinfo(np.int32).max if vocabulary is None else vocabulary,
    )
    if segment_ids is None:
        follows = mask[:, 1:] & mask[:, :-1]
    following = ids[:, 1:] if labels is None else _checked_labels(labels, ids.shape, vocabulary)[:, 1:]
    # As many as tokens, so that the rows of a product are a multiple of what the batch has.
    return jnp.pad(jnp.where(follows, following, IGNORED), ((0, 0), (0, 1)), constant_values=IGNORED)


def _checked_labels(labels: ArrayLike, shape: tuple[int, ...], vocabulary: int | None) -> jax.Array:
    """The labels (b, t) int32.

    Raises:
      InvalidTokens: labels of another shape or dtype, or except under jit outside the vocabulary.
    """
    array = integers("labels", labels)
    if array.shape != shape:
        raise InvalidTokens(f"labels: expected the shape of input_ids, {shape}, found {array.shape}.")
    if vocabulary is not None and not isinstance(array, jax.core.Tracer):
        outside = (array != IGNORED) & ((array < 0) | (array >= vocabulary))
        if outside.any():
            row, column = (int(i) for i in np.argwhere(outside)[0])
            raise InvalidTokens(
                f"labels[{row}, {column}] is {array[row, column]}, outside the vocabulary of {vocabulary}. Write "
                f"{IGNORED} for tokens without a loss."
            )
    return jnp.asarray(array, jnp.int32)


def _block(path: str, head: nnx.Module) -> int:
    """The number of outputs of a head that share scales; 1 for a head that is not narrow.

    Raises:
      UnsupportedTask: a head with parameters for which it is not known how outputs depend on them.
    """
    name = _matrix(head)
    known = [name, scale_path(name), proxy_path(name), *(() if isinstance(head, Embedding) else (*_BY_OUTPUT, *_WHOLE))]
    parameters = [str(path[0]) for path, _ in nnx.to_flat_state(nnx.state(head))]
    others = [name for name in parameters if name not in known]
    if others or not isinstance(head, (Embedding, Linear)):
        raise UnsupportedTask(
            f"{path}: a {type(head).__name__} with the parameters {', '.join(parameters)} cannot be computed in slices "
            "of its outputs, which a Linear can, with a bias or adapter. Use perparam.training.chunked_cross_entropy."
        )
    kernel = weights(head, name)
    return kernel.block[0] if isinstance(kernel, ScaledArray) else 1


def _matrix(head: nnx.Module) -> str:
    """The name of the parameter of a head by which it multiplies."""
    return "embedding" if isinstance(head, Embedding) else "kernel"


def _slice(head: Any, start: ArrayLike, size: int) -> Any:
    """The same module with `size` outputs from `start` on."""
    graphdef, state = nnx.split(head)
    part = nnx.merge(graphdef, state)
    name = _matrix(head)
    sliced = rows(weights(head, name), start, size)
    arrays: dict[str, Any] = {name: sliced}
    if isinstance(sliced, ScaledArray):
        arrays = {name: sliced.values, scale_path(name): sliced.scale_inv}
        if sliced.proxy is not None:
            arrays[proxy_path(name)] = sliced.proxy
    for own, array in arrays.items():
        setattr(part, own, getattr(head, own).replace(array))
    for other in _BY_OUTPUT:
        if (variable := getattr(head, other, None)) is not None:
            setattr(part, other, variable.replace(rows(variable[...], start, size)))
    part.split = None  # of a model on a mesh: XLA divides the product
    return part
