"""Qwen3-MoE: a Qwen3 in which a mixture of experts replaces the MLP of some or all layers."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from flax import nnx

from ..policies.errors import UnsupportedConfig
from ..policies.scope import Scope
from .config import DecoderConfig
from .decoder import Decoder
from .moe import SparseMLP
from .qwen3 import Qwen3Attention
from .sharding.axes import DENSE, MIXTURE, LogicalAxes
from .transformer import MLP, LinearFactory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(DecoderConfig):
    """The shape of a Qwen3-MoE; see `DecoderConfig`, whose `intermediate_size` is that of dense layers.

    attention_bias         whether the projections of attention have biases
    num_experts            experts of a sparse layer
    num_experts_per_tok    experts of each token
    moe_intermediate_size  columns of the hidden layer of an expert
    norm_topk_prob         whether the probabilities of a token's experts are divided by their sum
    decoder_sparse_step    every how many layers there is a sparse one: 2 for layers 1, 3, …
    mlp_only_layers        numbers of layers that are dense all the same
    """

    logical_axes: ClassVar[LogicalAxes] = {**DENSE, **MIXTURE}

    attention_bias: bool = False
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Normalises and checks fields; see `DecoderConfig`.

        Raises:
          UnsupportedConfig: sizes that do not fit together.
        """
        super().__post_init__()
        object.__setattr__(self, "mlp_only_layers", tuple(self.mlp_only_layers))
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"):
            if getattr(self, name) < 1:
                raise UnsupportedConfig(f"{type(self).__name__}: {name} must be positive, found {getattr(self, name)}.")
        if self.num_experts_per_tok > self.num_experts:
            raise UnsupportedConfig(
                f"{type(self).__name__}: num_experts_per_tok is {self.num_experts_per_tok}, more than num_experts, "
                f"{self.num_experts}."
            )

    def use_bias(self, projection: str) -> bool:
        """Whether a projection has a bias."""
        return self.attention_bias and projection in ("q_proj", "k_proj", "v_proj", "o_proj")

    def experts(self, layer: int) -> int:
        """The number of experts of a layer; 0 for a dense layer."""
        sparse = layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
        return self.num_experts if sparse else 0

    @property
    def expert_size(self) -> int:
        """Columns of the hidden layer of an expert."""
        return self.moe_intermediate_size

    @property
    def experts_per_token(self) -> int:
        """The number of experts that process each token in a sparse layer."""
        return self.num_experts_per_tok

    @property
    def axis_sizes(self) -> dict[str, int]:
        """{logical axis: its size}; see `DecoderConfig`."""
        return {**super().axis_sizes, "experts": self.num_experts, "expert_mlp": self.moe_intermediate_size}


def mlp_or_experts(
    config: Qwen3MoeConfig, layer: int, *, policy: Scope, linear: LinearFactory, rngs: nnx.Rngs | None
) -> nnx.Module:
    """The MLP of a dense layer, or the mixture of experts of a sparse one."""
    if not config.experts(layer):
        return MLP(config, layer, policy=policy, linear=linear, rngs=rngs)
    return SparseMLP(
        experts=config.num_experts,
        per_token=config.num_experts_per_tok,
        hidden=config.hidden_size,
        width=config.moe_intermediate_size,
        norm_topk_prob=config.norm_topk_prob,
        policy=policy,
        rngs=rngs,
    )


class Qwen3Moe(Decoder):
    """A Qwen3-MoE; see `Decoder`. `linear` is the class of all projections but those of experts."""

    config_class = Qwen3MoeConfig
    attention = Qwen3Attention
    mlp = staticmethod(mlp_or_experts)
