"""`rerank`: how well documents answer a query, as Qwen3-Reranker judges it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..models.decoder import Decoder
from ..models.generation.config import checked_count
from ..models.heads import check_causal_lm, last_token
from ..policies.errors import InvalidText, InvalidTokens
from .batches import BATCH_TOKENS, check_arguments, checked_text, listed, run_in_batches
from .tokenizer import Tokenizer

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
"""The task, where none is given."""

_BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
_ANSWERS = ("no", "yes")


def rerank(
    model: Decoder,
    tokenizer: Tokenizer,
    query: str,
    documents: str | Sequence[str],
    *,
    instruction: str = INSTRUCTION,
    max_length: int = 8192,
    batch_tokens: int = BATCH_TOKENS,
) -> np.ndarray:
    """Scores from 0 to 1 of documents for a query, (documents,) float32, in the order of the documents.

    model         a causal language model; `load_model("Qwen/Qwen3-Reranker-0.6B")` and its siblings are trained for
                  this
    instruction   the task, in one sentence
    max_length    most tokens of a prompt, the end of the document is cut off; at most the model's
                  max_position_embeddings
    batch_tokens  most tokens processed at a time, padding included

    The prompt is that of Qwen3-Reranker, which asks for "yes" or "no"; the score is the probability of "yes", as
    against "no". Only the last token of a prompt gets logits.

    Raises:
      UnsupportedTask: not a model and its tokenizer, or a model without a language-model head.
      InvalidText: not texts, or no room for a document within `max_length`.
      InvalidTokens: a number out of range, or a tokenizer of another model.
    """
    check_arguments("rerank", model, tokenizer)
    check_causal_lm(model.config.task, "rerank")
    query, instruction = checked_text("query", query), checked_text("instruction", instruction)
    documents = listed("documents", documents)
    longest = min(checked_count("max_length", max_length, 1), model.config.max_position_embeddings)
    checked_count("batch_tokens", batch_tokens, 1)
    before, after = (tokenizer.encode(text, add_special_tokens=False) for text in (_BEFORE, _AFTER))
    question = f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: "
    room = longest - len(before) - len(after)
    if room <= (taken := len(tokenizer.encode(question))):
        raise InvalidText(
            f"max_length: the prompt around a document has {longest - room + taken} tokens with the query, which "
            f"leaves no room for a document within {longest}. Shorten the query, or raise max_length."
        )
    prompts = [f"{question}{document}" for document in documents]
    rows = [before + tokenizer.encode(prompt, max_length=room) + after for prompt in prompts]
    program = functools.partial(_logits_of, tokens=_answer_ids(tokenizer))
    no, yes = run_in_batches(program, model, rows, batch_tokens, 2).T
    return np.asarray(jax.nn.sigmoid(yes - no))


def _answer_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    try:
        return tuple(map(tokenizer.token_id, _ANSWERS))
    except InvalidTokens as error:
        raise InvalidTokens(
            "rerank needs a tokenizer in which 'yes' and 'no' are tokens. Use a model such as Qwen/Qwen3-Reranker-0.6B."
        ) from error


@functools.partial(jax.jit, static_argnames=("graphdef", "tokens"))
def _logits_of(graphdef: Any, params: nnx.State, ids: jax.Array, mask: jax.Array, tokens: tuple[int, ...]) -> jax.Array:
    """The logits (b, tokens) float32 of the given tokens, after the last real token of each row."""
    model = nnx.merge(graphdef, params)
    hidden, _ = model.hidden(ids, mask, first=True)
    return model.logits(last_token(hidden, mask))[:, jnp.array(tokens)].astype(jnp.float32)
