"""Dense Qwen3: a decoder that norms queries and keys."""

from __future__ import annotations

import dataclasses

from flax import nnx

from ..policies.scope import Scope
from .config import DecoderConfig
from .decoder import Decoder
from .layers import RMSNorm
from .transformer import Attention, LinearFactory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Config(DecoderConfig):
    """The shape of a dense Qwen3; see `DecoderConfig`.

    attention_bias  whether the projections of attention have biases
    """

    attention_bias: bool = False

    def use_bias(self, projection: str) -> bool:
        """Whether a projection has a bias."""
        return self.attention_bias and projection in ("q_proj", "k_proj", "v_proj", "o_proj")


class Qwen3Attention(Attention):
    """Attention with an RMS norm of each query and key head."""

    def __init__(
        self, config: DecoderConfig, layer: int, *, policy: Scope, linear: LinearFactory, rngs: nnx.Rngs | None
    ):
        super().__init__(config, layer, policy=policy, linear=linear, rngs=rngs)
        self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, policy=policy.at("q_norm"), rngs=rngs)
        self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, policy=policy.at("k_norm"), rngs=rngs)

    def head_norms(self) -> tuple[RMSNorm, RMSNorm]:
        """The norms of queries and of keys."""
        return self.q_norm, self.k_norm


class Qwen3(Decoder):
    """A dense Qwen3; see `Decoder`."""

    config_class = Qwen3Config
    attention = Qwen3Attention
