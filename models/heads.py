"""Tasks: what a model computes from its last hidden states, and the errors about a model of another task."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from ..policies.errors import UnsupportedTask

Task = Literal["causal_lm", "feature_extraction", "sequence_classification", "token_classification"]
"""The tasks of transformers' `…ForCausalLM`, `…Model`, `…ForSequenceClassification` and `…ForTokenClassification`."""

TASKS: tuple[Task, ...] = get_args(Task)

CLASSIFICATION: tuple[Task, ...] = ("sequence_classification", "token_classification")
"""The tasks whose head is `score`, which has an output for each class."""


def last_token(hidden: jax.Array, attention_mask: ArrayLike | None = None) -> jax.Array:
    """The values (b, n) of the last real token of each row of `hidden` (b, t, n).

    attention_mask  (b, t), nonzero for real tokens; rows may be padded left or right; None: all are real. A row
                    without a real token gives the values of its last position

    >>> last_token(jnp.arange(6.0).reshape(2, 3, 1), [[0, 1, 1], [1, 1, 0]]).ravel().tolist()
    [2.0, 4.0]
    """
    if attention_mask is None:
        return hidden[:, -1]
    mask = jnp.asarray(attention_mask).astype(bool)
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def check_causal_lm(task: Task, what: str) -> None:
    """Raises an error if a model of this task has no language-model head; `what` is what needs one.

    Raises:
      UnsupportedTask
    """
    if task == "feature_extraction":
        raise UnsupportedTask(
            f"{what} needs a language-model head, and this model has no head. Its outputs are hidden states: use "
            "perparam.embed for embeddings of texts."
        )
    if task != "causal_lm":
        raise UnsupportedTask(
            f"{what} needs a language-model head, and this model is for {task.replace('_', ' ')}. Call it for the "
            "logits of its classes: model(input_ids, attention_mask)."
        )
