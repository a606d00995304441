"""`embed`: embeddings of texts, as Qwen3-Embedding defines them."""

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
from ..models.heads import last_token
from .batches import BATCH_TOKENS, check_arguments, checked_text, encoded, listed, run_in_batches
from .tokenizer import Tokenizer


def embed(
    model: Decoder,
    tokenizer: Tokenizer,
    texts: str | Sequence[str],
    *,
    instruction: str | None = None,
    dimensions: int | None = None,
    max_length: int = 8192,
    batch_tokens: int = BATCH_TOKENS,
) -> np.ndarray:
    """Embeddings of texts, (texts, dimensions) float32 of norm 1: their dot products are cosine similarities.

    model         any decoder; `load_model("Qwen/Qwen3-Embedding-0.6B")` and its siblings are trained for this
    instruction   the task, in one sentence, for queries: a text becomes "Instruct: {instruction}\\nQuery:{text}".
                  None for documents
    dimensions    the first dimensions to keep, for models trained for that (Matryoshka, arXiv:2205.13147); None: all
    max_length    most tokens of a text, the rest is cut off; at most the model's max_position_embeddings
    batch_tokens  most tokens processed at a time, padding included

    The embedding is the hidden state of the last token after the last norm, in float32; for Qwen3-Embedding that token
    is the <|endoftext|> that its tokenizer adds to every text. Texts are processed in batches of similar length; the
    batch changes an embedding by rounding only.

    Raises:
      UnsupportedTask: not a model and its tokenizer.
      InvalidText: not texts, or a text without a token.
      InvalidTokens: a number out of range, or a tokenizer of another model.
    """
    check_arguments("embed", model, tokenizer)
    texts, hidden = listed("texts", texts), model.config.hidden_size
    kept = hidden if dimensions is None else checked_count("dimensions", dimensions, 1, hidden)
    longest = min(checked_count("max_length", max_length, 1), model.config.max_position_embeddings)
    checked_count("batch_tokens", batch_tokens, 1)
    if instruction is not None:
        instruction = checked_text("instruction", instruction)
        texts = [f"Instruct: {instruction}\nQuery:{text}" for text in texts]
    states = run_in_batches(_last_states, model, encoded(tokenizer, texts, longest), batch_tokens, hidden)
    states = states[:, :kept]
    # The least norm is that of torch's `normalize`: a state of zeros stays zero.
    return states / np.maximum(np.linalg.norm(states, axis=1, keepdims=True), np.float32(1e-12))


@functools.partial(jax.jit, static_argnames="graphdef")
def _last_states(graphdef: Any, params: nnx.State, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """The hidden state (b, hidden) float32 of the last real token of each row, after the last norm."""
    model = nnx.merge(graphdef, params)
    hidden, _ = model.hidden(ids, mask, first=True)
    return model.norm(last_token(hidden, mask)).astype(jnp.float32)
