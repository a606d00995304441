"""Training under a policy: gradients, optimizers, loss scales, adapters, and the parts of a training step."""

from .loaders.peft import load_lora, save_lora
from .models.lora import add_lora
from .models.lora_merge import MergedLayer, MergeReport, merge_lora
from .policies.training.optimizer import with_policy
from .policies.training.partition import combine, partition, refuse_narrow

__all__ = [
    "MergeReport",
    "MergedLayer",
    "add_lora",
    "combine",
    "load_lora",
    "merge_lora",
    "partition",
    "refuse_narrow",
    "save_lora",
    "with_policy",
]
