"""Hugging Face checkpoints: loading, saving, converting, tokenizers, generation of text, and the cost of policies."""

from .audit import Audit, AuditRow, audit
from .bare import BareCheckpoint, checkpoint_tree, open_parameters
from .checkpoint import Checkpoint, CheckpointWarning, open_checkpoint
from .compare import Comparison, compare
from .embed import embed
from .families import config_to_json, read_config
from .from_config import ConfigOnly, open_config
from .infer import infer_policy
from .libraries import ExportWarning
from .load import load_model, load_params
from .rerank import rerank
from .save import convert_checkpoint, save_model
from .save_params import save_params
from .text import Completion, generate_text, sampling_defaults, stream_text
from .tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Audit",
    "AuditRow",
    "BareCheckpoint",
    "Checkpoint",
    "CheckpointWarning",
    "Comparison",
    "Completion",
    "ConfigOnly",
    "ExportWarning",
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
    "open_config",
    "open_parameters",
    "read_config",
    "rerank",
    "sampling_defaults",
    "save_model",
    "save_params",
    "stream_text",
]
