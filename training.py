"""Training under a policy: gradients, optimizers, loss scales, adapters, and the parts of a training step."""

from .loaders.peft import load_lora, save_lora
from .models.cross_entropy import chunked_cross_entropy
from .models.lora import add_lora
from .models.lora_merge import MergedLayer, MergeReport, merge_lora
from .models.losses import label_count, next_token_loss
from .models.remat import remat
from .models.segments import PackedBatch, pack
from .policies.training.accumulation import accumulate
from .policies.training.by_path import path_labels, path_mask, trainable
from .policies.training.finite import all_finite, select_tree
from .policies.training.gradients import grad, value_and_grad
from .policies.training.loss_scale import DynamicLossScale, LossScale, NoOpLossScale, StaticLossScale
from .policies.training.optimizer import with_policy
from .policies.training.partition import combine, partition, refuse_narrow
from .policies.training.proxies import Proxy, add_proxies, remove_proxies
from .policies.training.rounding import requantize, stochastic_cast
from .policies.training.skipping import LossScaleState, with_loss_scale
from .policies.trees import Narrow

__all__ = [
    "DynamicLossScale",
    "LossScale",
    "LossScaleState",
    "MergeReport",
    "MergedLayer",
    "Narrow",
    "NoOpLossScale",
    "PackedBatch",
    "Proxy",
    "StaticLossScale",
    "accumulate",
    "add_lora",
    "add_proxies",
    "all_finite",
    "chunked_cross_entropy",
    "combine",
    "grad",
    "label_count",
    "load_lora",
    "merge_lora",
    "next_token_loss",
    "pack",
    "partition",
    "path_labels",
    "path_mask",
    "refuse_narrow",
    "remat",
    "remove_proxies",
    "requantize",
    "save_lora",
    "select_tree",
    "stochastic_cast",
    "trainable",
    "value_and_grad",
    "with_loss_scale",
    "with_policy",
]
