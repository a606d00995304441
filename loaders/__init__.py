"""Bytes on disk and parameters: safetensors, the name table, loading, inferring a policy, auditing one."""

from .audit import Audit, AuditRow, audit
from .checkpoint import Checkpoint, CheckpointWarning, checkpoint_tree, open_checkpoint
from .infer import infer_policy
from .load import load_model, load_params
from .save import convert_checkpoint, save_model

__all__ = [
    "Audit",
    "AuditRow",
    "Checkpoint",
    "CheckpointWarning",
    "audit",
    "checkpoint_tree",
    "convert_checkpoint",
    "infer_policy",
    "load_model",
    "load_params",
    "open_checkpoint",
    "save_model",
]
