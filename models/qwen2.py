"""Qwen2 and Qwen2.5: a decoder whose queries, keys and values have biases."""

from __future__ import annotations

import dataclasses

from .config import DecoderConfig
from .decoder import Decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Config(DecoderConfig):
    """The shape of a Qwen2; see `DecoderConfig`."""

    def use_bias(self, projection: str) -> bool:
        """Whether a projection has a bias."""
        return projection in ("q_proj", "k_proj", "v_proj")


class Qwen2(Decoder):
    """A Qwen2; see `Decoder`."""

    config_class = Qwen2Config
