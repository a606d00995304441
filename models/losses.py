"""The next-token loss of a decoder, whose logits are computed in slices of the vocabulary."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from ..policies.errors import InvalidTokens, UnsupportedTask
from ..policies.matmul.sharded import Split
from ..policies.paths import proxy_path, scale_path
from ..policies.scaled_array import ScaledArray
from ..policies.trainable import TrainableValues
from ..policies.trees import Narrow
from . import taps
from .cross_entropy import CHUNK, slice_size_of
from .decoder import Decoder
from .head_losses import IGNORED, head_losses
from .head_slices import Head, Logits, layout_of
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
    Without any, the loss is 0. Logits have the bits of those that `model(input_ids)` returns. Derivatives are those of
    reverse mode. Over a mesh, each device computes its rows of the head for its tokens, and gathers the columns of one
    slice at a time; XLA divides the products of a batch that does not divide evenly, and may gather the head.

    Raises:
      InvalidTokens: as in a call of the model; labels outside the vocabulary, except under jit.
      UnsupportedTask: another kind of model; one without a language-model head, or with a head whose outputs cannot be
        sliced.
    """
    if not isinstance(model, Decoder):
        raise UnsupportedTask(
            f"next_token_loss: expected a Decoder, such as perparam.models.Qwen3, found {type(model).__name__}. Pass "
            "the hidden states and the head of another model to perparam.training.chunked_cross_entropy."
        )
    check_causal_lm(model.config.task, "next_token_loss")
    head: Any = model.embed_tokens if model.lm_head is None else model.lm_head
    path = "embed_tokens" if model.lm_head is None else "lm_head"
    name = _kernel_name(path, head)
    vocabulary = model.config.vocab_size
    targets = _targets(vocabulary, input_ids, attention_mask, labels, segment_ids)
    hidden, _ = model.hidden(input_ids, attention_mask, segment_ids=segment_ids)
    x = taps.tap("norm", model.norm(hidden))

    arrays = _arrays(head, name)
    split: Split | None = head.split
    layout = layout_of(np.dtype(head.activations or x.dtype), arrays.kernel, split, x.shape[0], head.compute)
    size_of = functools.partial(slice_size_of, arrays.kernel, head.compute, head.backward, chunk=chunk)
    losses = head_losses(_logits_of(head, name, model.output), x, arrays, targets, size_of, layout)
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


def _kernel_name(path: str, head: nnx.Module) -> str:
    """The name of the kernel of a head.

    Raises:
      UnsupportedTask: a head with parameters for which it is not known how outputs depend on them.
    """
    name = "embedding" if isinstance(head, Embedding) else "kernel"
    of_kernel = (name, scale_path(name), proxy_path(name))
    known = of_kernel if isinstance(head, Embedding) else (*of_kernel, *_BY_OUTPUT, *_WHOLE)
    parameters = [str(path[0]) for path, _ in nnx.to_flat_state(nnx.state(head))]
    if not isinstance(head, (Embedding, Linear)) or any(each not in known for each in parameters):
        raise UnsupportedTask(
            f"{path}: a {type(head).__name__} with the parameters {', '.join(parameters)} cannot be computed in slices "
            "of its outputs, which a Linear can, with a bias or adapter. Use perparam.training.chunked_cross_entropy."
        )
    return name


def _arrays(head: Any, name: str) -> Head:
    """The arrays of a head whose kernel has this name."""

    def found(names: tuple[str, ...]) -> dict[str, jax.Array]:
        variables = {each: getattr(head, each, None) for each in names}
        return {each: variable[...] for each, variable in variables.items() if variable is not None}

    others, whole = found(_BY_OUTPUT), found(_WHOLE)
    if whole:
        whole["lora_a"], others["lora_b"] = head.adapter.placed(whole["lora_a"], others["lora_b"])
    return Head(weights(head, name), others, whole)


def _logits_of(head: Any, name: str, output: np.dtype) -> Logits:
    """A function that returns the logits of a slice of a head, computed by a module of the same class."""
    graphdef, state = nnx.split(head)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)

    def logits(x: jax.Array, part: Head) -> jax.Array:
        module: Any = nnx.merge(graphdef, shapes)
        kernel, scales, proxy = name, scale_path(name), proxy_path(name)
        if isinstance(part.kernel, ScaledArray):
            block = part.kernel.format.block
            values: Any = part.kernel.values
            if part.kernel.proxy is not None:
                values = TrainableValues(values, part.kernel.proxy)
            setattr(module, kernel, Narrow(values, block=block))
            setattr(module, scales, Narrow(part.kernel.scale_inv, block=block))
            if hasattr(module, proxy):
                delattr(module, proxy)
        else:
            setattr(module, kernel, getattr(module, kernel).replace(part.kernel))
        for each, array in (part.others | part.whole).items():
            setattr(module, each, getattr(module, each).replace(array))
        module.split = None  # the device has its part, or XLA divides the product
        if not isinstance(module, Embedding) and module.adapter is not None:
            module.adapter = dataclasses.replace(module.adapter, splits=(None, None))
        y: jax.Array = module.attend(x) if isinstance(module, Embedding) else module(x)
        return y.astype(output)

    return logits
