"""The models that `train.py` trains: one of Flax's own layers, which every library can train, and perparam's Qwen3.

Both have the same shapes, except for what only one of them has: Qwen3 norms queries and keys and rotates them by their
position, the other adds an embedding of the position.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

SEED = 0


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of a model and of its batch."""

    vocabulary: int
    hidden: int
    wide: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    rows: int
    tokens: int

    @property
    def kernels(self) -> int:
        """The number of values of all kernels, that of the head included."""
        attention = 2 * self.hidden * self.head * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.wide) + self.hidden * self.vocabulary


SIZES = {
    "small": Size(vocabulary=4096, hidden=512, wide=1408, layers=4, heads=8, kv_heads=2, head=64, rows=4, tokens=128),
    "toy": Size(vocabulary=64, hidden=128, wide=128, layers=1, heads=2, kv_heads=1, head=64, rows=2, tokens=8),
}
"""A model whose step takes about half a second on 2 cores, and one to test the script."""


class Layer(nn.Module):
    """A decoder layer of Flax's own layers: hidden states (b, t, hidden) in and out."""

    size: Size

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the hidden states after attention and a gated MLP."""
        size = self.size
        dense = lambda features, name: nn.Dense(features, use_bias=False, name=name)  # noqa: E731

        def heads(y: jax.Array, count: int) -> jax.Array:
            return y.reshape(*y.shape[:-1], count, size.head)

        normed = nn.RMSNorm(name="input_layernorm")(x)
        queries = heads(dense(size.heads * size.head, "q_proj")(normed), size.heads)
        keys = heads(dense(size.kv_heads * size.head, "k_proj")(normed), size.kv_heads)
        values = heads(dense(size.kv_heads * size.head, "v_proj")(normed), size.kv_heads)
        shared = size.heads // size.kv_heads
        keys, values = jnp.repeat(keys, shared, axis=-2), jnp.repeat(values, shared, axis=-2)
        mask = nn.make_causal_mask(jnp.zeros(x.shape[:2], jnp.int32), dtype=jnp.bool_)
        attended = nn.dot_product_attention(queries, keys, values, mask=mask)
        x = x + dense(size.hidden, "o_proj")(attended.reshape(*x.shape[:-1], -1))
        normed = nn.RMSNorm(name="post_attention_layernorm")(x)
        gated = nn.silu(dense(size.wide, "gate_proj")(normed)) * dense(size.wide, "up_proj")(normed)
        return x + dense(size.hidden, "down_proj")(gated)


class Stock(nn.Module):
    """A decoder of Flax's own layers, which know nothing of policies: ids (b, t) to logits (b, t, vocabulary)."""

    size: Size

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Returns the logits."""
        size = self.size
        x = nn.Embed(size.vocabulary, size.hidden, name="embed_tokens")(ids)
        x = x + nn.Embed(size.tokens, size.hidden, name="embed_positions")(jnp.arange(ids.shape[1]))
        for index in range(size.layers):
            x = Layer(size, name=f"layers_{index}")(x)
        x = nn.RMSNorm(name="norm")(x)
        return nn.Dense(size.vocabulary, use_bias=False, name="lm_head")(x)


def qwen3(size: Size, policy: Any) -> Any:
    """Returns perparam's Qwen3 under a policy, with random weights and activations in bfloat16."""
    from flax import nnx

    from perparam.models import Qwen3, Qwen3Config

    config = Qwen3Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.wide,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head,
        dtype=np.dtype(jnp.bfloat16),
    )
    return Qwen3(config, policy=policy, rngs=nnx.Rngs(SEED))


def batch(size: Size) -> jax.Array:
    """Returns random token ids (rows, tokens + 1), the same in every process: inputs, and labels one place later."""
    ids = np.random.default_rng(SEED).integers(0, size.vocabulary, (size.rows, size.tokens + 1))
    return jnp.asarray(ids, jnp.int32)


def cross_entropy(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy () of the ids after the first, in float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), ids[:, 1:]).mean()
