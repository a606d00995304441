"""Training under a policy: trainable and frozen halves of a tree, loss scales, and the parts of a training step."""

from .models.cross_entropy import chunked_cross_entropy
from .models.losses import label_count, next_token_loss
from .models.remat import remat
from .models.segments import PackedBatch, pack
from .policies.training.accumulation import accumulate
from .policies.training.finite import all_finite, select_tree
from .policies.training.loss_scale import DynamicLossScale, LossScale, NoOpLossScale, StaticLossScale
from .policies.training.partition import combine, partition, refuse_narrow
from .policies.training.skipping import LossScaleState, with_loss_scale

__all__ = [
    "DynamicLossScale",
    "LossScale",
    "LossScaleState",
    "NoOpLossScale",
    "PackedBatch",
    "StaticLossScale",
    "accumulate",
    "all_finite",
    "chunked_cross_entropy",
    "combine",
    "label_count",
    "next_token_loss",
    "pack",
    "partition",
    "refuse_narrow",
    "remat",
    "select_tree",
    "with_loss_scale",
]
