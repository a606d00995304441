"""The decoder that all model families share, in Flax NNX, and the protocol that generation and saving require.

Numerics follow transformers' `modeling_llama` and `modeling_qwen3`, rounding points included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import ArrayLike

from ..policies.errors import InvalidTokens, UnsupportedConfig, UnsupportedTask
from ..policies.modules import fill
from ..policies.presets import PolicyLike, get_policy
from ..policies.resolved import Resolved, resolve
from ..policies.scope import Scope
from ..policies.store import store
from ..policies.targets import here
from ..policies.trees import variables_by_path
from . import rope, taps
from .adapters import Adapter
from .config import DecoderConfig
from .decoding import step as decoding
from .heads import check_causal_lm, last_token
from .kv_cache import EMPTY, KVCache, LayerCache, token_positions
from .layers import Embedding, Linear, RMSNorm, scope_of
from .lora_layers import adapters_of, insert_adapters
from .remat import remat_like
from .segments import checked_segments, segment_positions
from .sharding.arrays import splits
from .sharding.model_sharding import ModelSharding
from .summary import ModelSummary, summarise
from .tokens import checked_tokens, padding_last
from .transformer import MLP, Attention, Layer, LinearFactory, MLPFactory, Step, through


class CausalLM(Protocol):
    """The protocol of causal language models in generation, saving, `audit` and `compare`; `Decoder` implements it.

    A class that implements it is also an `nnx.Module`.
    """

    @property
    def config(self) -> DecoderConfig:
        """The model's shape."""
        ...

    @property
    def policy(self) -> Any:
        """The policy the model was built under."""
        ...

    @property
    def activations(self) -> np.dtype:
        """The dtype of its activations."""
        ...

    def __call__(self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None) -> jax.Array:
        """Logits (b, t, vocabulary)."""
        ...

    def hidden(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        cache: KVCache | None = None,
        *,
        first: bool = False,
    ) -> tuple[jax.Array, KVCache]:
        """Hidden states (b, t, hidden) before the last norm, and the cache that includes the call's tokens.

        first  `cache` is empty; then padding is in the last of the slots that the call fills
        """
        ...

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits (..., vocabulary) of hidden states (..., hidden)."""
        ...

    def empty_cache(self, batch: int, slots: int) -> KVCache:
        """A cache for `slots` tokens of each of `batch` rows."""
        ...

    def with_policy(self, policy: PolicyLike) -> CausalLM:
        """The same parameters, stored and computed under another policy."""
        ...

    def as_resolved(self, resolved: Resolved) -> CausalLM:
        """The same parameters, stored and computed as a resolved policy says."""
        ...


class Decoder(nnx.Module):
    """A decoder under a policy; `model(input_ids, attention_mask)` returns the outputs of its task, such as logits.

    config  its shape and its task
    policy  anything `get_policy` accepts; None stores parameters in float32 and computes in the config's dtype
    linear  class of all projections and of a head that is not tied: called as
            `linear(in_features, out_features, use_bias=…, policy=…, rngs=…)`
    rngs    random keys for the initial parameters; None: parameters are shapes, to be filled later

    A model family is a subclass with its own `config_class`, `attention` class and `mlp`.

    Raises:
      UnsupportedConfig: a config of another family.
      UnmatchedRule, ShadowedRule: a rule of the policy that decides none of the model's parameters.
    """

    config_class: ClassVar[type[DecoderConfig]] = DecoderConfig
    attention: ClassVar[type[Attention]] = Attention
    mlp: ClassVar[MLPFactory] = MLP

    def __init__(
        self,
        config: DecoderConfig,
        *,
        policy: PolicyLike | Scope = None,
        linear: LinearFactory = Linear,
        rngs: nnx.Rngs | None,
    ):
        if not isinstance(config, self.config_class):
            raise UnsupportedConfig(
                f"{type(self).__name__}: expected a {self.config_class.__name__}, found {type(config).__name__}."
            )
        scope = scope_of(policy)
        activations = scope.activations or config.dtype or np.dtype(np.float32)
        scope = dataclasses.replace(scope, activations=activations)
        self.config, self.linear, self.activations = config, linear, activations
        self.sharding: ModelSharding | None = None
        self.policy, self.kv_cache = scope.policy, scope.policy.kv_cache or activations
        self.output = scope.policy.output or activations
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, policy=scope.at("embed_tokens"), rngs=rngs)
        self.layers = nnx.List(
            Layer(
                config,
                i,
                attention=self.attention,
                mlp=self.mlp,
                policy=scope.at("layers", i),
                linear=linear,
                rngs=rngs,
            )
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, policy=scope.at("norm"), rngs=rngs)

        def head(name: str, out: int, use_bias: bool) -> nnx.Module | None:
            if config.head != name:
                return None
            return linear(config.hidden_size, out, use_bias=use_bias, policy=scope.at(name), rngs=rngs)

        self.lm_head = nnx.data(head("lm_head", config.vocab_size, use_bias=False))
        # transformers has a bias for the classes of tokens only.
        self.score = nnx.data(head("score", len(config.id2label), use_bias=config.task == "token_classification"))
        if not isinstance(policy, Scope):
            resolve(scope.policy, self)  # raises an error for a rule that decides nothing

    def __call__(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        *,
        segment_ids: ArrayLike | None = None,
    ) -> jax.Array:
        """The outputs of the model's task, in the policy's output dtype, or else the activations' dtype.

        input_ids       (b, t) int32
        attention_mask  (b, t), nonzero for real tokens, anywhere in a row; None: all are real
        segment_ids     (b, t) integers, in place of a mask for rows of several sequences: equal positive numbers for
                        the adjacent tokens of one, which see each other and have positions from 0 on; 0 for padding

        By `config.task`:
          causal_lm                (b, t, vocabulary)  logits
          token_classification     (b, t, classes)     logits; `config.id2label` has the names of the classes
          sequence_classification  (b, classes)        logits, from the last real token of each row
          feature_extraction       (b, t, hidden)      hidden states after the last norm

        Raises:
          InvalidTokens: shapes or dtypes that do not fit, ids outside the vocabulary, a segment in two places of a row.
          UnsupportedTask: segment ids for sequence_classification, which has one output for each row.
        """
        if self.config.task == "feature_extraction":
            return self.last_hidden_state(input_ids, attention_mask, segment_ids=segment_ids)
        if self.config.task == "sequence_classification" and segment_ids is not None:
            raise UnsupportedTask(
                "segment_ids: this model has one output for each row, and rows with segments hold several sequences. "
                "Pass one sequence in each row, with an attention_mask."
            )
        hidden, _ = self.hidden(input_ids, attention_mask, segment_ids=segment_ids)
        if self.config.task == "sequence_classification":
            hidden = last_token(hidden, attention_mask)
        return self.logits(hidden)

    def last_hidden_state(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        *,
        segment_ids: ArrayLike | None = None,
    ) -> jax.Array:
        """Hidden states (b, t, hidden) after the last norm, as `last_hidden_state` in transformers, for every task.

        Arguments, dtype and errors are those of a call.
        """
        hidden, _ = self.hidden(input_ids, attention_mask, segment_ids=segment_ids)
        return taps.tap("norm", self.norm(hidden)).astype(self.output)

    def observe(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        *,
        capture: str | Iterable[str] = (),
        intervene: Mapping[str, Callable[[jax.Array], jax.Array]] | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The outputs of a call, and the captured intermediate values by path.

        capture    patterns of paths: `embed_tokens`, `layers/3` (the stream after the layer), `layers/3/self_attn` and
                   `layers/3/mlp` (their additions to the stream), `layers/*/self_attn/weights` (b, heads, t, t), `norm`
        intervene  {pattern: function}: the function takes the value and returns its replacement; attention weights
                   cannot be replaced

        Raises:
          UnmatchedRule: a pattern that matches nothing.
          InvalidTokens: as in a call.
        """
        values = taps.Taps(capture, intervene)
        with taps.using(values):
            outputs = self(input_ids, attention_mask)
        values.check()
        return outputs, values.captured

    def hidden(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        cache: KVCache | None = None,
        *,
        first: bool = False,
        segment_ids: ArrayLike | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Hidden states (b, t, hidden) before the last norm, and the cache that includes the call's tokens.

        cache        the tokens so far; None: the returned cache holds this call's tokens and has no room for more
        first        whether `cache` is empty, which allows cuDNN's flash attention on a GPU, also with padding; the
                     tokens enter the slots of the cache without the padding between them, which is in the last slots
        segment_ids  as in a call, without a mask and a cache: rows of several sequences cannot be continued
        """
        if segment_ids is not None:
            if attention_mask is not None or cache is not None or first:
                raise InvalidTokens("segment_ids: expected no attention_mask and no cache. Mark padding with 0.")
            checked = checked_segments(segment_ids, input_ids)
            segment_ids, attention_mask = checked, checked > 0
        ids, mask = checked_tokens(input_ids, attention_mask, self.config.vocab_size)
        if first:
            # Once for all layers, since cuDNN supports padding at the end only.
            order, back = padding_last(mask)
            ids, mask = (jnp.take_along_axis(x, order, axis=1) for x in (ids, mask))
        if cache is not None:
            cache.check_room(ids.shape[1])
        past = jnp.zeros(ids.shape[0], jnp.int32) if cache is None else cache.tokens
        segments = None
        if segment_ids is None:
            queries, slots = token_positions(mask, past)
        else:
            queries, slots, segments = segment_positions(jnp.asarray(segment_ids, jnp.int32))
        start: jax.Array | int = 0
        if cache is not None:
            start = cache.length
            slots = jax.lax.dynamic_update_slice_in_dim(cache.positions, slots, start, axis=1)
        config = self.config
        cos_sin = rope.cos_sin(queries, config.head_dim, config.rope_theta, config.rope_scaling, self.activations)
        unpadded = cache is None and attention_mask is None
        step = Step(*cos_sin, queries, slots, start, self.kv_cache, mask if first or unpadded else None, segments)
        x = taps.tap("embed_tokens", self.embed_tokens(ids))
        if cache is None:
            x, caches = through(self.layers, x, step, [None] * len(self.layers))
        else:
            past_layers = [cache.layer(i) for i in range(len(self.layers))]
            is_fused = not first and decoding.refuses(self.layers, x, past_layers, here()) is None
            x, caches = (decoding.decode if is_fused else through)(self.layers, x, step, past_layers)
        tokens = past + mask.sum(axis=1, dtype=jnp.int32)
        if first:
            x = jnp.take_along_axis(x, back[:, :, None], axis=1)
        return x, KVCache.of(caches, slots, jnp.asarray(start + ids.shape[1], jnp.int32), tokens)

    def summary(self) -> ModelSummary:
        """A table of the model's modules: parameters, formats and bytes."""
        return summarise(self)

    def __repr__(self) -> str:
        try:
            return summarise(self).describe()
        except Exception:  # a model that is not complete, or has arrays replaced by something else
            return super().__repr__()

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits (..., vocabulary or classes) of hidden states (..., hidden): the last norm and the head.

        Raises:
          UnsupportedTask: a model without a head.
        """
        if self.config.task == "feature_extraction":
            check_causal_lm(self.config.task, "logits")
        x, head = taps.tap("norm", self.norm(hidden)), self.score if self.lm_head is None else self.lm_head
        return (self.embed_tokens.attend(x) if head is None else head(x)).astype(self.output)

    def empty_cache(self, batch: int, slots: int) -> KVCache:
        """A cache for `slots` tokens of each of `batch` rows, in the policy's `kv_cache` dtype."""

        def empty(layer: Layer) -> LayerCache:
            split = None if self.sharding is None else layer.self_attn.heads_split(batch)
            heads = self.config.num_key_value_heads if split is None else split.kv_heads
            zeros = jnp.zeros((batch, slots, heads, self.config.head_dim), self.activations)
            return LayerCache.of(zeros, zeros, self.kv_cache)

        layers = [empty(layer) for layer in self.layers]
        return KVCache.of(layers, jnp.full((batch, slots), EMPTY), jnp.int32(0), jnp.zeros(batch, jnp.int32))

    def with_policy(self, policy: PolicyLike) -> Self:
        """The same parameters, stored and computed under another policy; unchanged arrays are shared."""
        return self.as_resolved(resolve(get_policy(policy), self))

    def as_resolved(self, resolved: Resolved) -> Self:
        """The same parameters, stored and computed as `resolved`, the policy resolved on this model, says."""
        parameters = variables_by_path(store(resolved, nnx.state(self)))
        model = assemble(type(self), self.config, resolved, parameters, self.linear, self.sharding, adapters_of(self))
        return remat_like(model, self)


Model = TypeVar("Model", bound=Decoder)


def assemble(
    model: type[Model],
    config: DecoderConfig,
    resolved: Resolved,
    parameters: Mapping[str, Any],
    linear: LinearFactory = Linear,
    sharding: ModelSharding | None = None,
    adapters: Mapping[str, Adapter] | None = None,
) -> Model:
    """A model of class `model` with these parameters, by path, stored and computed as `resolved` says.

    sharding  how the parameters are divided over a mesh; None: on one device, or in a way that XLA handles
    adapters  the settings of low-rank adapters, by the path of their layer
    """
    found = None if sharding is None else splits(sharding, config, resolved.stored)
    scope = Scope(resolved.policy, resolved.policy.activations, stored=resolved.specs, splits=found)
    if linear is Linear:
        shapes = model(config, policy=scope, rngs=None)
    else:
        shapes = nnx.eval_shape(lambda: model(config, policy=scope, linear=linear, rngs=nnx.Rngs(0)))
    insert_adapters(shapes, adapters or {}, scope)
    filled = fill(shapes, parameters)
    filled.sharding = sharding
    return filled
