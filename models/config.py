"""The shape of a decoder-only language model, without the config.json it may come from."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import ClassVar, Literal

import numpy as np

from ..policies.blocks import Block
from ..policies.dtypes import as_dtype, is_narrow
from ..policies.errors import UnsupportedConfig, shown
from .heads import CLASSIFICATION, TASKS, Task
from .rope import RopeScaling
from .sharding.axes import DENSE, LogicalAxes

Method = Literal["fp8", "compressed-tensors"]


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The contents of a checkpoint's `quantization_config`; formats are taken from the tensors, and checked with it.

    block          (rows, columns) of a kernel that share one scale; -1 for a whole axis
    not_converted  names of modules that are not quantised, as the checkpoint spells them
    method         layout of the checkpoint: Qwen's and DeepSeek's, or that of vLLM's tools
    """

    block: Block = (128, 128)
    not_converted: tuple[str, ...] = ()
    method: Method = "fp8"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder; the config of each model family is a subclass that adds the family's own fields.

    head_dim      width of an attention head
    rope_theta    base of the rotary embeddings
    rope_scaling  rule that stretches them to longer contexts; None: unscaled
    windows       sliding window of each layer in tokens, the query itself included; None attends to all tokens
    dtype         dtype of activations; None if the config has none, or a narrow one
    quantization  None for an unquantised checkpoint
    eos_token_id  ids that end a generation
    pad_token_id  id that fills a row after its end
    task          what the model computes from its last hidden states
    id2label      names of the classes by id, for classification
    source        the config.json it was read from; ignored when configs are compared
    """

    logical_axes: ClassVar[LogicalAxes] = DENSE

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
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    windows: tuple[int | None, ...] = ()
    dtype: np.dtype | None = None
    quantization: Quantization | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    task: Task = "causal_lm"
    id2label: tuple[str, ...] = ()
    source: pathlib.Path | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Normalises `dtype`, `eos_token_id`, `windows` and `id2label`, and checks fields against each other.

        Raises:
          UnsupportedConfig: sizes that do not fit together, or a task and labels that do not.
        """
        object.__setattr__(self, "dtype", None if self.dtype is None else as_dtype(self.dtype))
        object.__setattr__(self, "eos_token_id", tuple(map(int, np.atleast_1d(self.eos_token_id))))
        object.__setattr__(self, "id2label", tuple(self.id2label))
        if all(window is None for window in self.windows):
            object.__setattr__(self, "windows", ())
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"):
            if getattr(self, name) < 1:
                raise UnsupportedConfig(f"{type(self).__name__}: {name} must be positive, found {getattr(self, name)}.")
        if min(heads, kv_heads) < 1:
            raise UnsupportedConfig(
                f"{type(self).__name__}: found num_attention_heads {heads} and num_key_value_heads {kv_heads}."
            )
        if heads % kv_heads:
            raise UnsupportedConfig(
                f"{type(self).__name__}: {heads} attention heads do not divide among {kv_heads} key-value heads."
            )
        if self.head_dim % 2:
            raise UnsupportedConfig(f"{type(self).__name__}: head_dim {self.head_dim} is odd, and RoPE rotates pairs.")
        if self.windows and len(self.windows) != self.num_hidden_layers:
            raise UnsupportedConfig(
                f"{type(self).__name__}: windows has length {len(self.windows)}, expected num_hidden_layers, "
                f"{self.num_hidden_layers}."
            )
        if self.task not in TASKS:
            raise UnsupportedConfig(
                f"{type(self).__name__}: task must be one of {', '.join(TASKS)}, found {shown(self.task)}."
            )
        if bool(self.id2label) != (self.task in CLASSIFICATION):
            raise UnsupportedConfig(
                f"{type(self).__name__}: id2label has {len(self.id2label)} labels for the task {self.task}. Labels are "
                "for classification, which needs one at least."
            )

    @property
    def head(self) -> Literal["lm_head", "score"] | None:
        """The module of the head; None for a head that is tied to the embedding, and for a model without one."""
        if self.task in CLASSIFICATION:
            return "score"
        return "lm_head" if self.task == "causal_lm" and not self.tie_word_embeddings else None

    def use_bias(self, projection: str) -> bool:
        """Whether a projection, such as "q_proj" or "down_proj", has a bias."""
        return False

    def experts(self, layer: int) -> int:
        """The number of experts of a layer; 0 for a dense layer."""
        return 0

    @property
    def expert_size(self) -> int:
        """Columns of the hidden layer of an expert; 0 without experts."""
        return 0

    @property
    def experts_per_token(self) -> int:
        """The number of experts that process each token in a sparse layer; 0 without experts."""
        return 0

    @property
    def axis_sizes(self) -> dict[str, int]:
        """{logical axis: its size}: the number that devices share evenly, such as of heads instead of their columns."""
        return {
            "vocab": self.vocab_size,
            "embed": self.hidden_size,
            "heads": self.num_attention_heads,
            "kv_heads": self.num_key_value_heads,
            "mlp": self.intermediate_size,
        }

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer; None attends to all tokens."""
        return self.windows[layer] if self.windows else None

    def kv_bytes(self, dtype: np.dtype) -> int:
        """Bytes of cached keys and values for each token in `dtype`, with each head's scales; 0 unless `causal_lm`."""
        if self.task != "causal_lm":
            return 0
        scales = 4 if is_narrow(dtype) else 0
        return 2 * self.num_hidden_layers * self.num_key_value_heads * (self.head_dim * dtype.itemsize + scales)
