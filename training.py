"""Training under a policy: optimizers with state by the map, trainable and frozen halves of a tree, and a guard."""

from .policies.training.optimizer import with_policy
from .policies.training.partition import combine, partition, refuse_narrow

__all__ = ["combine", "partition", "refuse_narrow", "with_policy"]
