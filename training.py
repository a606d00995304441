"""Training under a policy: trainable and frozen halves of a tree, loss scales, and the parts of a training step."""

from .policies.training.finite import all_finite, select_tree
from .policies.training.loss_scale import DynamicLossScale, LossScale, NoOpLossScale, StaticLossScale
from .policies.training.partition import combine, partition, refuse_narrow
from .policies.training.skipping import LossScaleState, with_loss_scale

__all__ = [
    "DynamicLossScale",
    "LossScale",
    "LossScaleState",
    "NoOpLossScale",
    "StaticLossScale",
    "all_finite",
    "combine",
    "partition",
    "refuse_narrow",
    "select_tree",
    "with_loss_scale",
]
