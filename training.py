"""Training under a policy: gradients of stored parameters, optimizers with state by the map, and rounding."""

from .policies.training.gradients import grad, value_and_grad
from .policies.training.optimizer import with_policy
from .policies.training.partition import combine, partition, refuse_narrow
from .policies.training.proxies import Proxy, add_proxies, remove_proxies
from .policies.training.rounding import requantize, stochastic_cast
from .policies.trees import Narrow

__all__ = [
    "Narrow",
    "Proxy",
    "add_proxies",
    "combine",
    "grad",
    "partition",
    "refuse_narrow",
    "remove_proxies",
    "requantize",
    "stochastic_cast",
    "value_and_grad",
    "with_policy",
]
