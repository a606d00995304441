"""Training under a policy: trainable and frozen halves of a tree, and a guard for optimizers."""

from .policies.training.partition import combine, partition, refuse_narrow

__all__ = ["combine", "partition", "refuse_narrow"]
