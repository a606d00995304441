"""The shape of a Qwen3."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..policies.blocks import Block
from ..policies.dtypes import is_narrow


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN's settings (Peng et al. 2023, https://arxiv.org/abs/2309.00071), as transformers reads them.

    factor            by how much the context is stretched
    original_length   positions the model was trained with
    attention_factor  multiplies cos and sin; `0.1 ln(factor) + 1` where the config names none
    beta_fast         rotations over the trained length above which a frequency is kept
    beta_slow         rotations below which it is divided by `factor`
    truncate          whether the bounds of the ramp between are rounded outwards to whole dimensions
    """

    factor: float
    original_length: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What `quantization_config` says of the files: a cross-check, since the tensors decide.

    block          (rows, columns) over which one scale holds
    not_converted  modules it lists as left unquantised, as the checkpoint spells them
    """

    block: Block = (128, 128)
    not_converted: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """The shape of a dense Qwen3.

    windows       per layer the sliding window in tokens, the query itself included; None attends to everything
    dtype         the dtype the checkpoint was meant to run in; None where the config names none that is not narrow
    quantization  None for an unquantised checkpoint
    eos_token_id  ids that end a generation
    pad_token_id  what follows in a row that has ended
    source        the config.json it was read from; configs are compared without it
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    yarn: Yarn | None = None
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    windows: tuple[int | None, ...] = ()
    dtype: np.dtype | None = None
    quantization: Quantization | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    source: pathlib.Path | None = dataclasses.field(default=None, compare=False, repr=False)

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer."""
        return self.windows[layer] if self.windows else None

    def kv_bytes(self, dtype: np.dtype) -> int:
        """Bytes of cached keys and values for each token in `dtype`, scales for each head included."""
        scales = 4 if is_narrow(dtype) else 0
        return 2 * self.num_hidden_layers * self.num_key_value_heads * (self.head_dim * dtype.itemsize + scales)

    @staticmethod
    def from_json(source: str | os.PathLike[str] | Mapping[str, Any]) -> Qwen3Config:
        """The config in a `config.json` (a path) or in the mapping that one holds.

        Both the published form (`torch_dtype`, `rope_theta`, `rope_scaling`) and the newer one (`dtype`,
        `rope_parameters`) are read.

        Raises:
          MissingFile, InvalidCheckpoint: no such file, not JSON, or a field of the wrong type.
          UnsupportedConfig: a field or value that is not implemented, by name.
        """
        from .config_json import config_from_json

        return config_from_json(source)

    def to_json(self) -> dict[str, Any]:
        """The mapping that a `config.json` holds, as transformers and vLLM read it; `from_json` of it is this config.

        Raises:
          UnsupportedExport: for windows that differ between layers, which no config.json can say.
        """
        from .config_json import config_to_json

        return config_to_json(self)
