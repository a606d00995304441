"""Training under a policy: optimizers with state by the map, choices by path, and a guard for optimizers."""

from .policies.training.by_path import path_labels, path_mask, trainable
from .policies.training.optimizer import with_policy
from .policies.training.partition import combine, partition, refuse_narrow

__all__ = ["combine", "partition", "path_labels", "path_mask", "refuse_narrow", "trainable", "with_policy"]
