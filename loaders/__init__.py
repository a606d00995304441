"""Hugging Face checkpoints: loading, saving, converting, tokenizers, generation of text, and the cost of policies."""

from .audit import Audit, AuditRow, audit
from .checkpoint import Checkpoint, CheckpointWarning, checkpoint_tree, open_checkpoint
from .compare import Comparison, compare
from .embed import embed
from .families import config_to_json, read_config
from .infer import infer_policy
from .load import load_model, load_params
from .rerank import rerank
from .save import convert_checkpoint, save_model
from .text import Completion, generate_text, sampling_defaults, stream_text
from .tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Audit",
    "AuditRow",
    "Checkpoint",
    "CheckpointWarning",
    "Comparison",
    "Completion",
    "Tokenizer",
    "audit",
    "checkpoint_tree",
    "compare",
    "config_to_json",
    "convert_checkpoint",
    "embed",
    "generate_text",
    "infer_policy",
    "load_model",
    "load_params",
    "load_tokenizer",
    "open_checkpoint",
    "read_config",
    "rerank",
    "sampling_defaults",
    "save_model",
    "stream_text",
]
