"""The parts of a decoder layer in Flax NNX: attention, MLP, and the layer that joins them.

Numerics follow transformers' `modeling_llama` and `modeling_qwen3`, rounding points included.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..policies.scope import Scope
from . import rope, taps
from .attention import PrefillKV, attend, in_row_major_order
from .config import DecoderConfig
from .kv_cache import LayerCache
from .layers import RMSNorm, project
from .sharding.heads import HeadSplit, heads_split, over_heads

LinearFactory = Callable[..., nnx.Module]
"""Called as `linear(in_features, out_features, use_bias=…, policy=…, rngs=…)`."""


class Attention(nnx.Module):
    """Grouped-query attention with rotary embeddings."""

    def __init__(
        self, config: DecoderConfig, layer: int, *, policy: Scope, linear: LinearFactory, rngs: nnx.Rngs | None
    ):
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.window = config.window(layer)

        def projection(name: str, features: int, out: int) -> nnx.Module:
            return linear(features, out, use_bias=config.use_bias(name), policy=policy.at(name), rngs=rngs)

        self.q_proj = projection("q_proj", config.hidden_size, self.heads * self.head_dim)
        self.k_proj = projection("k_proj", config.hidden_size, self.kv_heads * self.head_dim)
        self.v_proj = projection("v_proj", config.hidden_size, self.kv_heads * self.head_dim)
        self.o_proj = projection("o_proj", self.heads * self.head_dim, config.hidden_size)

    def head_norms(self) -> tuple[RMSNorm, RMSNorm] | None:
        """The norms of each head's queries and keys before their rotation, in families that have them."""
        return None

    def __call__(self, x: jax.Array, step: Step, past: LayerCache | None) -> tuple[jax.Array, LayerCache]:
        """Attention of x (b, t, hidden), of x's shape, and the layer's cache that includes x."""
        b, t, _ = x.shape
        q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (part.reshape(b, t, -1, self.head_dim) for part in (q, k, v))
        if (norms := self.head_norms()) is not None:
            q, k = norms[0](q), norms[1](k)
        q = rope.rotate(q, step.cos, step.sin)
        k = rope.rotate(k, step.cos, step.sin)
        # Observed weights have to leave the function, which they cannot from within `shard_map`.
        split = None if taps.active() else self.heads_split(b)
        whole = functools.partial(_mix, self.window)
        mixed, cache = (whole if split is None else over_heads(split, whole))(q, k, v, step, past)
        return self.o_proj(mixed), cache

    def heads_split(self, batch: int) -> HeadSplit | None:
        """How heads are divided over a mesh for a batch of this size; None: on one device, or as XLA decides."""
        splits = [getattr(projection, "split", None) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        return heads_split(splits, batch, self.heads, self.kv_heads)


def _mix(
    window: int | None, q: jax.Array, k: jax.Array, v: jax.Array, step: Step, past: LayerCache | None
) -> tuple[jax.Array, LayerCache]:
    """Attention (b, t, h * d) of rotated queries and keys, and the layer's cache that includes the keys and values."""
    cache = LayerCache.of(k, v, step.cache_dtype)
    if past is not None:
        cache = past.put(cache, step.start)
    prefill = None if step.prefill_mask is None else PrefillKV(k, v, step.prefill_mask)
    mixed, weights = attend(q, cache, step.queries, step.slots, window, prefill, step.segments)
    if prefill is not None and past is not None:
        # Otherwise XLA fills the cache at the end, and keeps k and v until then.
        mixed, cache = jax.lax.optimization_barrier((mixed, in_row_major_order(cache)))
    taps.offer("weights", weights)
    return mixed, cache


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(
        self, config: DecoderConfig, layer: int, *, policy: Scope, linear: LinearFactory, rngs: nnx.Rngs | None
    ):
        def projection(name: str, features: int, out: int) -> nnx.Module:
            return linear(features, out, use_bias=config.use_bias(name), policy=policy.at(name), rngs=rngs)

        self.gate_proj = projection("gate_proj", config.hidden_size, config.intermediate_size)
        self.up_proj = projection("up_proj", config.hidden_size, config.intermediate_size)
        self.down_proj = projection("down_proj", config.intermediate_size, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The MLP of x (b, t, hidden), of x's shape."""
        gate, up = project(x, self.gate_proj, self.up_proj)
        return self.down_proj(jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up)


MLPFactory = Callable[..., nnx.Module]
"""Called as `mlp(config, layer, policy=…, linear=…, rngs=…)`, such as the class `MLP`."""


class Layer(nnx.Module):
    """Attention, then the MLP; each reads a norm of the residual stream and adds to the stream."""

    def __init__(
        self,
        config: DecoderConfig,
        layer: int,
        *,
        attention: type[Attention],
        mlp: MLPFactory,
        policy: Scope,
        linear: LinearFactory,
        rngs: nnx.Rngs | None,
    ):
        def norm(name: str) -> RMSNorm:
            return RMSNorm(config.hidden_size, eps=config.rms_norm_eps, policy=policy.at(name), rngs=rngs)

        self.self_attn = attention(config, layer, policy=policy.at("self_attn"), linear=linear, rngs=rngs)
        self.mlp = mlp(config, layer, policy=policy.at("mlp"), linear=linear, rngs=rngs)
        self.input_layernorm = norm("input_layernorm")
        self.post_attention_layernorm = norm("post_attention_layernorm")

    def __call__(self, x: jax.Array, step: Step, past: LayerCache | None) -> tuple[jax.Array, LayerCache]:
        """The stream x (b, t, hidden) after this layer, and the layer's cache."""
        with taps.within("self_attn"):
            mixed, cache = self.self_attn(self.input_layernorm(x), step, past)
        x = x + taps.tap("self_attn", mixed)
        return x + taps.tap("mlp", self.mlp(self.post_attention_layernorm(x))), cache


def through(
    layers: Sequence[Layer], x: jax.Array, step: Step, caches: Sequence[LayerCache | None]
) -> tuple[jax.Array, list[LayerCache]]:
    """The stream x (b, t, hidden) after all layers, and their caches."""
    results = []
    for i, (layer, past) in enumerate(zip(layers, caches, strict=True)):
        with taps.within("layers", i):
            x, cache = layer(x, step, past)
        x = taps.tap(f"layers/{i}", x)
        results.append(cache)
    return x, results


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """Values that all layers share in one call.

    cos, sin      rotations of the queries
    queries       positions of the queries, (b, t)
    slots         positions of the cache's slots, (b, s)
    start         first slot of the call's tokens
    cache_dtype   dtype of the cache
    prefill_mask  real tokens (b, t) of a call that follows no other tokens, padding at the end; None for other calls
    segments      the sequence (b, t) of each token of rows that hold several; None: each row is one
    """

    cos: jax.Array
    sin: jax.Array
    queries: jax.Array
    slots: jax.Array
    start: jax.Array | int
    cache_dtype: np.dtype = dataclasses.field(metadata={"static": True})
    prefill_mask: jax.Array | None
    segments: jax.Array | None = None
