"""Dense Qwen3 in Flax NNX.  Numerics follow transformers' `modeling_qwen3`, rounding points included."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import ArrayLike

from ..policies.modules import fill
from ..policies.policy import Policy
from ..policies.presets import get_policy
from ..policies.resolved import Resolved, resolve
from ..policies.scope import Scope
from ..policies.store import store
from ..policies.trees import variables_by_path
from . import rope, taps
from .attention import EMPTY, Alone, Kept, KVCache, attend, token_positions
from .config import Qwen3Config
from .layers import Embedding, Linear, RMSNorm, project, scope_of
from .tokens import checked_tokens

LinearFactory = Callable[..., nnx.Module]
"""Called as `linear(in_features, out_features, use_bias=…, policy=…, rngs=…)`."""


class Attention(nnx.Module):
    """Grouped-query attention with normalised queries and keys."""

    def __init__(self, config: Qwen3Config, layer: int, *, policy: Scope, linear: LinearFactory, rngs: nnx.Rngs | None):
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.window = config.window(layer)

        def projection(name: str, features: int, out: int) -> nnx.Module:
            return linear(features, out, use_bias=config.attention_bias, policy=policy.at(name), rngs=rngs)

        self.q_proj = projection("q_proj", config.hidden_size, self.heads * self.head_dim)
        self.k_proj = projection("k_proj", config.hidden_size, self.kv_heads * self.head_dim)
        self.v_proj = projection("v_proj", config.hidden_size, self.kv_heads * self.head_dim)
        self.o_proj = projection("o_proj", self.heads * self.head_dim, config.hidden_size)
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps, policy=policy.at("q_norm"), rngs=rngs)
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps, policy=policy.at("k_norm"), rngs=rngs)

    def __call__(self, x: jax.Array, step: _Step, past: Kept | None) -> tuple[jax.Array, Kept]:
        """x (b, t, hidden) to the same, and the keys and values to keep."""
        b, t, _ = x.shape
        q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)
        q = self.q_norm(q.reshape(b, t, self.heads, self.head_dim))
        k = self.k_norm(k.reshape(b, t, self.kv_heads, self.head_dim))
        v = v.reshape(b, t, self.kv_heads, self.head_dim)
        q = rope.rotate(q, step.cos, step.sin)
        k = rope.rotate(k, step.cos, step.sin)
        kept = Kept.of(k, v, step.kept_in)
        if past is not None:
            kept = past.put(kept, step.start)
        alone = None if step.alone is None else Alone(k, v, step.alone)
        mixed, weights = attend(q, kept, step.queries, step.slots, self.window, alone)
        if alone is not None:  # or XLA fills the cache last, and holds what goes into it until then
            mixed, kept = jax.lax.optimization_barrier((mixed, kept))
        taps.offer("weights", weights)
        return self.o_proj(mixed), kept


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Qwen3Config, *, policy: Scope, linear: LinearFactory, rngs: nnx.Rngs | None):
        wide, narrow = config.intermediate_size, config.hidden_size
        self.gate_proj = linear(narrow, wide, use_bias=False, policy=policy.at("gate_proj"), rngs=rngs)
        self.up_proj = linear(narrow, wide, use_bias=False, policy=policy.at("up_proj"), rngs=rngs)
        self.down_proj = linear(wide, narrow, use_bias=False, policy=policy.at("down_proj"), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (b, t, hidden) to the same."""
        gate, up = project(x, self.gate_proj, self.up_proj)
        return self.down_proj(jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up)


class Layer(nnx.Module):
    """Attention, then the MLP, each on normalised input and added to the stream."""

    def __init__(self, config: Qwen3Config, layer: int, *, policy: Scope, linear: LinearFactory, rngs: nnx.Rngs | None):
        def norm(name: str) -> RMSNorm:
            return RMSNorm(config.hidden_size, eps=config.rms_norm_eps, policy=policy.at(name), rngs=rngs)

        self.self_attn = Attention(config, layer, policy=policy.at("self_attn"), linear=linear, rngs=rngs)
        self.mlp = MLP(config, policy=policy.at("mlp"), linear=linear, rngs=rngs)
        self.input_layernorm = norm("input_layernorm")
        self.post_attention_layernorm = norm("post_attention_layernorm")

    def __call__(self, x, step, past):
        """See `Attention`."""
        with taps.within("self_attn"):
            mixed, kept = self.self_attn(self.input_layernorm(x), step, past)
        x = x + taps.tap("self_attn", mixed)
        return x + taps.tap("mlp", self.mlp(self.post_attention_layernorm(x))), kept


@dataclasses.dataclass(frozen=True)
class _Step:
    """What all layers share in one call: rotations, positions, where in the cache its tokens go.

    alone  which of them are real, where nothing came before; None: something may have
    """

    cos: jax.Array
    sin: jax.Array
    queries: jax.Array
    slots: jax.Array
    start: jax.Array | int
    kept_in: np.dtype
    alone: jax.Array | None


class Qwen3(nnx.Module):
    """A dense Qwen3 causal language model under a policy: `model(input_ids, attention_mask)` gives logits.

    config  its shape
    policy  anything `get_policy` takes; None stores parameters in float32 and computes in the config's dtype
    linear  the class of all projections and of an untied head, for LoRA and the like: called as
            `linear(in_features, out_features, use_bias=…, policy=…, rngs=…)`
    rngs    None: parameters are shapes, to be filled

    Raises:
      UnmatchedRule, ShadowedRule: a rule of the policy that decides none of the model's parameters.
    """

    def __init__(
        self,
        config: Qwen3Config,
        *,
        policy: Policy | Scope | Any = None,
        linear: LinearFactory = Linear,
        rngs: nnx.Rngs | None,
    ):
        scope = scope_of(policy)
        activations = scope.activations or config.dtype or np.dtype(np.float32)
        scope = dataclasses.replace(scope, activations=activations)
        self.config, self.linear, self.activations = config, linear, activations
        self.policy, self.kv_cache = scope.policy, scope.policy.kv_cache or activations
        self.output = scope.policy.output or activations
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, policy=scope.at("embed_tokens"), rngs=rngs)
        self.layers = nnx.List(
            Layer(config, i, policy=scope.at("layers", i), linear=linear, rngs=rngs)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, policy=scope.at("norm"), rngs=rngs)
        head = None
        if not config.tie_word_embeddings:
            head = linear(config.hidden_size, config.vocab_size, use_bias=False, policy=scope.at("lm_head"), rngs=rngs)
        self.lm_head = nnx.data(head)
        if not isinstance(policy, Scope):
            resolve(scope.policy, self)  # every rule of the policy has to decide something

    def __call__(self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None) -> jax.Array:
        """Logits (b, t, vocabulary) in the policy's output dtype, or the activations' one.

        input_ids       (b, t) int32
        attention_mask  (b, t), nonzero for real tokens, which may stand anywhere in a row; None: all are real

        Raises:
          InvalidTokens: for shapes and dtypes that do not fit, and ids outside the vocabulary.
        """
        hidden, _ = self.hidden(input_ids, attention_mask)
        return self.logits(hidden)

    def observe(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        *,
        capture: str | Iterable[str] = (),
        intervene: Mapping[str, Callable[[jax.Array], jax.Array]] | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The logits as a call gives them, and what was captured on the way, by path.

        capture    patterns of paths: `embed_tokens`, `layers/3` (the stream after it), `layers/3/self_attn` and
                   `layers/3/mlp` (what they add to the stream), `layers/*/self_attn/weights` (b, heads, t, t), `norm`
        intervene  {pattern: function}: the function is given the value and returns what goes on in its place; attention
                   weights cannot be changed

        Raises:
          UnmatchedRule: for a pattern that matches nothing.
          InvalidTokens: as in a call.
        """
        seen = taps.Taps(capture, intervene)
        with taps.tapped(seen):
            logits = self(input_ids, attention_mask)
        seen.check()
        return logits, seen.captured

    def hidden(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        cache: KVCache | None = None,
        *,
        first: bool = False,
    ) -> tuple[jax.Array, KVCache]:
        """The stream before the last norm, (b, t, hidden), and the cache with the call's tokens added.

        Without a cache the one returned holds this call's tokens and has no room for more.  `first` says that the one
        given is empty, and allows what has no derivative: cuDNN's flash attention on a GPU.
        """
        ids, mask = checked_tokens(input_ids, attention_mask, self.config.vocab_size)
        if cache is not None:
            cache.check_room(ids.shape[1])
        before = jnp.zeros(ids.shape[0], jnp.int32) if cache is None else cache.tokens
        queries, slots = token_positions(mask, before)
        start: jax.Array | int = 0
        if cache is not None:
            start = cache.length
            slots = jax.lax.dynamic_update_slice_in_dim(cache.positions, slots, start, axis=1)
        cos_sin = rope.cos_sin(queries, self.config, self.activations)
        step = _Step(*cos_sin, queries, slots, start, self.kv_cache, mask if first else None)
        x, kept = taps.tap("embed_tokens", self.embed_tokens(ids)), []
        for i, layer in enumerate(self.layers):
            with taps.within("layers", i):
                x, keys_values = layer(x, step, None if cache is None else cache.layer(i))
            x = taps.tap(f"layers/{i}", x)
            kept.append(keys_values)
        tokens = before + mask.sum(axis=1, dtype=jnp.int32)
        return x, KVCache.of(kept, slots, jnp.asarray(start + ids.shape[1], jnp.int32), tokens)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """The last norm and the head: (..., hidden) to (..., vocabulary)."""
        x = taps.tap("norm", self.norm(hidden))
        logits = self.embed_tokens.attend(x) if self.lm_head is None else self.lm_head(x)
        return logits.astype(self.output)

    def empty_cache(self, batch: int, slots: int) -> KVCache:
        """A cache for `slots` tokens of each of `batch` rows, in the policy's `kv_cache` dtype."""
        heads, width = self.config.num_key_value_heads, self.config.head_dim

        def layer() -> Kept:
            nothing = jnp.zeros((batch, slots, heads, width), self.activations)
            return Kept.of(nothing, nothing, self.kv_cache)

        kept = [layer() for _ in range(self.config.num_hidden_layers)]
        return KVCache.of(kept, jnp.full((batch, slots), EMPTY), jnp.int32(0), jnp.zeros(batch, jnp.int32))

    def with_policy(self, policy: Any) -> Qwen3:
        """The same parameters stored and computed under another policy; what is already as asked is shared."""
        return self.as_resolved(resolve(get_policy(policy), self))

    def as_resolved(self, resolved: Resolved) -> Qwen3:
        """The same parameters stored and computed as `resolved`, which was resolved on this model, says."""
        parameters = variables_by_path(store(resolved, nnx.state(self)))
        return assemble(self.config, resolved, parameters, self.linear)


def assemble(
    config: Qwen3Config, resolved: Resolved, parameters: Mapping[str, Any], linear: LinearFactory = Linear
) -> Qwen3:
    """The model whose parameters, by path, are `parameters`, stored and computed as `resolved` says."""
    scope = Scope(resolved.policy, resolved.policy.activations, stored=resolved.specs)
    if linear is Linear:
        shapes = Qwen3(config, policy=scope, rngs=None)
    else:
        shapes = nnx.eval_shape(lambda: Qwen3(config, policy=scope, linear=linear, rngs=nnx.Rngs(0)))
    return fill(shapes, parameters)
