"""A mixture of experts in place of an MLP: a router chooses the experts of each token, and their results are summed.

Numerics follow transformers' `modeling_qwen3_moe`, rounding points included. The sum over a token's experts is
rounded once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from ..policies.matmul.sharded import Split
from ..policies.scaled_array import ScaledArray
from ..policies.scope import Scope
from .adapters import Adapter, ExpertAdapters
from .experts import ExpertKernels, mixture
from .layers import Linear, new_parameter, weights
from .sharding.experts import sharded_mixture


class ExpertLinear(nnx.Module):
    """The linear layers of all experts that have the same place: y = x @ kernel[expert].T, without biases.

    kernel     (experts, out, in)                     the policy's storage dtype
    scale_inv  (experts, ceil(out/bo), ceil(in/bi))   multiplier of each block; None for a kernel that is not narrow
    """

    adapter: Adapter | None = None
    """The settings of low-rank adapters; then the layer has `lora_a` (experts, rank, in) and `lora_b` (experts, out,
    rank) as well."""
    lora_a: nnx.LoRAParam
    lora_b: nnx.LoRAParam

    def __init__(self, experts: int, in_features: int, out_features: int, *, policy: Scope, rngs: nnx.Rngs | None):
        self.activations = policy.activations
        self.compute, self.backward = policy.spec("kernel").compute, policy.spec("kernel").backward
        self.split = policy.split("kernel")
        lecun = initializers.lecun_normal(in_axis=-1, out_axis=-2, batch_axis=0)
        self.kernel, scale_inv = new_parameter(
            (experts, out_features, in_features),
            lambda rngs, shape: lecun(rngs.params(), shape, jnp.float32),
            rngs,
            policy,
            "kernel",
        )
        self.scale_inv = nnx.data(scale_inv)

    def weights(self) -> jax.Array | ScaledArray:
        """The kernels, with any scales."""
        return weights(self, "kernel")

    def adapters(self) -> ExpertAdapters | None:
        """The adapters of the kernels, if there are any."""
        if self.adapter is None:
            return None
        lora_a, lora_b = self.adapter.placed(self.lora_a[...], self.lora_b[...])
        return ExpertAdapters(lora_a, lora_b, self.adapter)


class Experts(nnx.Module):
    """The MLPs of all experts, down(silu(gate(x)) * up(x)), with their kernels stacked along a first axis."""

    def __init__(self, experts: int, hidden: int, width: int, *, policy: Scope, rngs: nnx.Rngs | None):
        self.gate_proj = ExpertLinear(experts, hidden, width, policy=policy.at("gate_proj"), rngs=rngs)
        self.up_proj = ExpertLinear(experts, hidden, width, policy=policy.at("up_proj"), rngs=rngs)
        self.down_proj = ExpertLinear(experts, width, hidden, policy=policy.at("down_proj"), rngs=rngs)

    def kernels(self) -> ExpertKernels:
        """The kernels of all experts, and how they are computed."""
        layers = self.gate_proj, self.up_proj, self.down_proj
        return ExpertKernels(
            self.gate_proj.weights(),
            self.up_proj.weights(),
            self.down_proj.weights(),
            computes=tuple(layer.compute for layer in layers),
            backwards=tuple(layer.backward for layer in layers),
            activations=self.gate_proj.activations,
            adapters=tuple(layer.adapters() for layer in layers),
        )

    def splits(self) -> list[Split | None]:
        """How the kernels are divided over a mesh."""
        return [layer.split for layer in (self.gate_proj, self.up_proj, self.down_proj)]


class SparseMLP(nnx.Module):
    """A mixture of experts: the sum of the results of each token's best experts, weighted by their probabilities.

    experts         number of experts
    per_token       number of experts of each token
    hidden, width   columns of x, and of the hidden layer of an expert
    norm_topk_prob  whether the probabilities of a token's experts are divided by their sum

    Its router, the linear layer `gate`, has a logit for each expert.
    """

    def __init__(
        self,
        *,
        experts: int,
        per_token: int,
        hidden: int,
        width: int,
        norm_topk_prob: bool,
        policy: Scope,
        rngs: nnx.Rngs | None,
    ):
        self.per_token, self.norm_topk_prob = per_token, norm_topk_prob
        self.gate = Linear(hidden, experts, policy=policy.at("gate"), rngs=rngs)
        self.experts = Experts(experts, hidden, width, policy=policy.at("experts"), rngs=rngs)

    def route(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`(weights, experts)`, both (..., per_token): those of each token of x (..., hidden), the best first.

        Weights are rounded to the dtype of the router's logits, as in transformers.
        """
        return self._best_experts(self.gate(x))

    def _best_experts(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights, experts = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), self.per_token)
        if self.norm_topk_prob:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return weights.astype(logits.dtype), experts

    def __call__(self, x: jax.Array) -> jax.Array:
        """The mixture for x (b, t, hidden), of x's shape."""
        kernels, splits = self.experts.kernels(), self.experts.splits()
        if None not in splits:
            return sharded_mixture(kernels, splits, x, self.gate(x), self._best_experts)
        return mixture(kernels, x, *self.route(x))
