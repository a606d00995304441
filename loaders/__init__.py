"""Bytes on disk and parameters: safetensors, the name table, loading, inferring a policy, auditing one."""

from .audit import Audit, AuditRow, audit
from .checkpoint import Checkpoint, CheckpointWarning, checkpoint_tree, open_checkpoint
from .infer import infer_policy
from .load import load_model

__all__ = [
    "Audit",
    "AuditRow",
    "Checkpoint",
    "CheckpointWarning",
    "audit",
    "checkpoint_tree",
    "infer_policy",
    "load_model",
    "open_checkpoint",
]
