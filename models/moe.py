"""A mixture of experts in place of an MLP: a router chooses the experts of each token, and their results are summed.

Numerics follow transformers' `modeling_qwen3_moe`, rounding points included. The sum over a token's experts is
rounded once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from ..policies.formats import ScaledArray
from ..policies.matmul import grouped_matmuls
from ..policies.scope import Scope
from .layers import Linear, new_parameter, pair


class ExpertLinear(nnx.Module):
    """The linear layers of all experts that have the same place: y = x @ kernel[expert].T, without biases.

    kernel     (experts, out, in)                     the policy's storage dtype
    scale_inv  (experts, ceil(out/bo), ceil(in/bi))   multiplier of each block; None for a kernel that is not narrow
    """

    def __init__(self, experts: int, in_features: int, out_features: int, *, policy: Scope, rngs: nnx.Rngs | None):
        self.activations = policy.activations
        self.compute = policy.spec("kernel").compute
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
        return self.kernel[...] if self.scale_inv is None else pair(self.kernel, self.scale_inv)


def project_groups(x: jax.Array, group_sizes: jax.Array, *layers: ExpertLinear) -> tuple[jax.Array, ...]:
    """The results (rows, out) of each layer for x (rows, in), whose rows are sorted by expert, in x's dtype.

    group_sizes  (experts,) int32, rows of each expert
    """
    x = x.astype(layers[0].activations or x.dtype)
    if len({layer.compute for layer in layers}) > 1:
        return tuple(project_groups(x, group_sizes, layer)[0] for layer in layers)
    kernels = [layer.weights() for layer in layers]
    return grouped_matmuls(x, kernels, group_sizes, compute=layers[0].compute)


class Experts(nnx.Module):
    """The MLPs of all experts, down(silu(gate(x)) * up(x)), with their kernels stacked along a first axis."""

    def __init__(self, experts: int, hidden: int, width: int, *, policy: Scope, rngs: nnx.Rngs | None):
        self.gate_proj = ExpertLinear(experts, hidden, width, policy=policy.at("gate_proj"), rngs=rngs)
        self.up_proj = ExpertLinear(experts, hidden, width, policy=policy.at("up_proj"), rngs=rngs)
        self.down_proj = ExpertLinear(experts, width, hidden, policy=policy.at("down_proj"), rngs=rngs)

    def __call__(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """The results (rows, hidden) of x (rows, hidden), whose rows are sorted by expert."""
        gate, up = project_groups(x, group_sizes, self.gate_proj, self.up_proj)
        x = jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up
        return project_groups(x, group_sizes, self.down_proj)[0]


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
        """`(weights, experts)`, both (tokens, per_token): those of each token of x (tokens, hidden), the best first.

        Weights are rounded to the dtype of the router's logits, as in transformers.
        """
        logits = self.gate(x)
        weights, experts = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), self.per_token)
        if self.norm_topk_prob:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return weights.astype(logits.dtype), experts

    def __call__(self, x: jax.Array) -> jax.Array:
        """The mixture for x (b, t, hidden), of x's shape."""
        tokens = x.reshape(-1, x.shape[-1])
        weights, experts = self.route(tokens)
        flat = experts.reshape(-1)
        order = jnp.argsort(flat, stable=True)  # rows sorted by expert; row i is of token order[i] // per_token
        group_sizes = jnp.zeros(self.experts.gate_proj.kernel.shape[0], jnp.int32).at[flat].add(1)
        results = self.experts(tokens[order // self.per_token], group_sizes)
        results = results[jnp.argsort(order)].reshape(*experts.shape, x.shape[-1])
        weighted = results * weights[..., None].astype(results.dtype)
        return weighted.astype(jnp.float32).sum(axis=1).astype(x.dtype).reshape(x.shape)
