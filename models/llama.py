"""Llama 2 and 3, and the models that share their shape, such as SmolLM2 and TinyLlama."""

from __future__ import annotations

import dataclasses

from .config import DecoderConfig
from .decoder import Decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """The shape of a Llama; see `DecoderConfig`.

    attention_bias  whether the projections of attention have biases
    mlp_bias        whether those of the MLP have
    """

    attention_bias: bool = False
    mlp_bias: bool = False

    def use_bias(self, projection: str) -> bool:
        """Whether a projection has a bias."""
        in_attention = projection in ("q_proj", "k_proj", "v_proj", "o_proj")
        return self.attention_bias if in_attention else self.mlp_bias


class Llama(Decoder):
    """A Llama; see `Decoder`."""

    config_class = LlamaConfig
