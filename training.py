"""Training under a policy: gradients of stored parameters, optimizers with state by the map, choices by path."""

from .policies.training.by_path import path_labels, path_mask, trainable
from .policies.training.gradients import grad, value_and_grad
from .policies.training.optimizer import with_policy
from .policies.training.partition import combine, partition, refuse_narrow
from .policies.training.proxies import Proxy, add_proxies, remove_proxies
from .policies.training.rounding import requantize, stochastic_cast

__all__ = [
    "Proxy",
    "add_proxies",
    "combine",
    "grad",
    "partition",
    "path_labels",
    "path_mask",
    "refuse_narrow",
    "remove_proxies",
    "requantize",
    "stochastic_cast",
    "trainable",
    "value_and_grad",
    "with_policy",
]
