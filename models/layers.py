"""Layers in Flax NNX whose dtypes come from a policy: `Linear`, `Embedding` and `RMSNorm`.

Kernels have the shape **(out, in)**, as in checkpoints: loading does not transpose, saving gives the same bytes, and
both operands of a matmul are contiguous along the summed axis, as FP8 tensor cores require.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers

from ..policies.dtypes import saturating_cast
from ..policies.formats import Format, stored_format
from ..policies.matmul import scaled_matmul, scaled_matmuls
from ..policies.matmul.sharded import Split, sharded_matmuls
from ..policies.paths import proxy_path, scale_path
from ..policies.presets import PolicyLike, get_policy
from ..policies.resolved import too_flat
from ..policies.scaled_array import ScaledArray, quantize
from ..policies.scales import F32
from ..policies.scope import Scope
from ..policies.trees import Narrow
from .adapters import Adapter
from .lookup import lookup, sharded_lookup
from .plain import is_rematerialised, plain_class


def scope_of(policy: PolicyLike | Scope) -> Scope:
    """The scope of a module, from its argument `policy`."""
    return policy if isinstance(policy, Scope) else get_policy(policy).at()


def new_parameter(
    shape: tuple[int, ...], draw: Initializer, rngs: nnx.Rngs | None, scope: Scope, name: str
) -> tuple[nnx.Variable, Narrow | None]:
    """`(parameter, scales)`: variables of a new parameter, stored as the policy says; scales only if it is narrow.

    draw   initializer, in float32
    rngs   None: the variables hold shapes and dtypes, to be filled later
    scope  the scope of the module that owns the parameter
    name   of the parameter in its module

    Raises:
      InvalidPolicy: a narrow dtype for a parameter of fewer than two dimensions.
    """
    format = scope.spec(name).storage or Format(F32)
    if format.narrow and len(shape) < 2:
        path = scope.path(name)
        rule = scope.policy.params.rule(path)
        assert rule is not None
        raise too_flat(rule, path, shape)
    parts: list[Any]
    if rngs is None:
        parts = [jax.ShapeDtypeStruct(part, dtype) for part, dtype in format.parts(shape)]
    elif format.narrow:
        parts = list(quantize(draw(rngs, shape), format))
    else:
        parts = [saturating_cast(draw(rngs, shape), format.values)]
    if not format.narrow:
        return nnx.Param(parts[0]), None
    kernel, scale_inv = (Narrow(part, block=format.block) for part in parts)
    return kernel, scale_inv


Initializer = Callable[[nnx.Rngs, tuple[int, ...]], jax.Array]
"""A function of random keys and a shape that returns a float32 array."""


def _random(initializer: Callable[..., jax.Array]) -> Initializer:
    return lambda rngs, shape: initializer(rngs.params(), shape, jnp.float32)


def _constant(value: float) -> Initializer:
    return lambda rngs, shape: jnp.full(shape, value, jnp.float32)


class Linear(nnx.Module):
    """A linear layer, y = x @ (kernel * scale_inv).T + bias, in the activations' dtype.

    kernel     (out, in)                     the policy's storage dtype
    scale_inv  (ceil(out/bo), ceil(in/bi))   multiplier of each block of (bo, bi); None for a kernel that is not narrow
    bias       (out,)                        None without `use_bias`

    >>> layer = Linear(4, 3, policy={"params": {"kernel": "f8_e4m3fn"}, "compute": "bf16"}, rngs=nnx.Rngs(0))
    >>> layer.kernel.dtype.name, layer.kernel.shape, layer(jnp.ones((2, 4))).dtype.name
    ('float8_e4m3fn', (3, 4), 'bfloat16')
    """

    adapter: Adapter | None = None
    """The settings of a low-rank adapter; then the layer has `lora_a` (rank, in) and `lora_b` (out, rank) as well."""
    lora_a: nnx.LoRAParam
    lora_b: nnx.LoRAParam

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = False,
        policy: PolicyLike | Scope = None,
        rngs: nnx.Rngs | None,
    ):
        scope = scope_of(policy)
        self.activations = scope.activations
        self.compute, self.backward = scope.spec("kernel").compute, scope.spec("kernel").backward
        self.split = scope.split("kernel")
        draw = _random(initializers.lecun_normal(in_axis=-1, out_axis=-2))
        self.kernel, scale_inv = new_parameter((out_features, in_features), draw, rngs, scope, "kernel")
        self.scale_inv = nnx.data(scale_inv)
        bias = new_parameter((out_features,), _constant(0), rngs, scope, "bias")[0] if use_bias else None
        self.bias = nnx.data(bias)
        self.bias_compute = scope.spec("bias").compute_dtype if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """y (..., out) of x (..., in), in the activations' dtype: the policy's, or else that of x."""
        x = x.astype(self.activations or x.dtype)
        result = None if self.bias is None else F32
        y = block_matmul(x, weights(self, "kernel"), self.compute, result, self.split, self.backward)
        return self._finished(y, x)

    def _finished(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """The product y of x, in x's dtype, with any bias and adapter added.

        y is float32 with a bias, so that only the sum is rounded.
        """
        if self.bias is not None:
            y = y + saturating_cast(self.bias[...], self.bias_compute or x.dtype).astype(y.dtype)
        y = y.astype(x.dtype)
        return y if self.adapter is None else self.adapter.added(y, x, self.lora_a[...], self.lora_b[...])

    def launch_key(self) -> tuple[Any, ...] | None:
        """Equal for projections of the same x that one kernel launch can compute; None for a layer that cannot join."""
        if plain_class(self) is not Linear or self.scale_inv is None:
            return None
        return self.activations, self.compute, self.backward, pair(self.kernel, self.scale_inv).format


def project(x: jax.Array, *layers: nnx.Module) -> tuple[jax.Array, ...]:
    """`layer(x)` of each layer; narrow `Linear`s that differ only in width share one `scaled_matmuls`."""
    linears = [layer for layer in layers if isinstance(layer, Linear)]
    keys = {layer.launch_key() for layer in linears}
    if len(linears) < len(layers) or len(keys) > 1 or None in keys:
        return tuple(layer(x) for layer in layers)
    if any(map(is_rematerialised, linears)):  # by a call that is not made here
        together: tuple[jax.Array, ...] = jax.checkpoint(functools.partial(_joint, linears))(x)
        return together
    return _joint(linears, x)


def _joint(linears: Sequence[Linear], x: jax.Array) -> tuple[jax.Array, ...]:
    """`layer(x)` of layers with the same launch key, in one launch."""
    first = linears[0]
    kernels = [weights(layer, "kernel") for layer in linears]
    x = x.astype(first.activations or x.dtype)
    result = None if all(layer.bias is None for layer in linears) else F32
    splits = [layer.split for layer in linears if layer.split is not None]
    if splits:
        products = sharded_matmuls(x, kernels, splits, compute=first.compute, result=result, backward=first.backward)
    else:
        products = scaled_matmuls(x, kernels, compute=first.compute, result=result, backward=first.backward)
    return tuple(layer._finished(y, x) for layer, y in zip(linears, products, strict=True))


def pair(kernel: nnx.Variable, scale_inv: nnx.Variable, proxy: nnx.Variable | None = None) -> ScaledArray:
    """The ScaledArray of a narrow kernel's variables; a kernel that is trained may have a proxy."""
    format = stored_format(np.dtype(kernel.dtype), kernel.block, np.dtype(scale_inv.dtype))
    scaled = ScaledArray(kernel[...], scale_inv[...], format)
    return scaled if proxy is None else dataclasses.replace(scaled, proxy=proxy[...])


def weights(module: nnx.Module, name: str) -> jax.Array | ScaledArray:
    """The module's parameter `name`, with its scales if it is narrow, and the proxy of one that is trained."""
    kernel, scale_inv = getattr(module, name), getattr(module, scale_path(name))
    if scale_inv is None:
        return kernel[...]
    return pair(kernel, scale_inv, getattr(module, proxy_path(name), None))


def block_matmul(
    x: jax.Array,
    kernel: jax.Array | ScaledArray,
    compute: Format | None,
    result: np.dtype | None = None,
    split: Split | None = None,
    backward: Format | None = None,
) -> jax.Array:
    """`scaled_matmul` of x and a kernel, which may be divided over a mesh."""
    if split is not None:
        return sharded_matmuls(x, [kernel], [split], compute=compute, result=result, backward=backward)[0]
    return scaled_matmul(x, kernel, compute=compute, result=result, backward=backward)


class Embedding(nnx.Module):
    """A table of token embeddings; `attend` uses it as a tied head.

    embedding            (vocabulary, features), the policy's storage dtype
    embedding_scale_inv  (ceil(vocabulary/bo), ceil(features/bi)), multiplier of each block; None if it is not narrow

    Only the rows of a lookup are cast, not the table.
    """

    def __init__(self, vocabulary: int, features: int, *, policy: PolicyLike | Scope = None, rngs: nnx.Rngs | None):
        scope = scope_of(policy)
        self.activations = scope.activations
        self.compute, self.backward = scope.spec("embedding").compute, scope.spec("embedding").backward
        self.split = scope.split("embedding")
        draw = _random(initializers.normal(0.02))
        self.embedding, scale_inv = new_parameter((vocabulary, features), draw, rngs, scope, "embedding")
        self.embedding_scale_inv = nnx.data(scale_inv)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Embeddings (..., features) of ids (...), in the activations' dtype; NaN for an id outside the table."""
        table = weights(self, "embedding")
        wide = self.activations or (jnp.float32 if isinstance(table, ScaledArray) else table.dtype)
        compute = wide if self.compute is None or self.compute.narrow else self.compute.values
        rows = lookup(table, ids) if self.split is None else sharded_lookup(table, ids, self.split)
        inside = (ids >= 0) & (ids < self.embedding.shape[0])
        return jnp.where(inside[..., None], saturating_cast(rows, compute).astype(wide), jnp.nan)

    def attend(self, x: jax.Array) -> jax.Array:
        """Logits (..., vocabulary) of x (..., features), computed under the policy's rule for `embedding`."""
        table = weights(self, "embedding")
        return block_matmul(x, table, self.compute, split=self.split, backward=self.backward)


class RMSNorm(nnx.Module):
    """An RMS norm: x / rms(x) in float32, cast to the compute dtype of `scale`, then multiplied by `scale`.

    scale  (features,), the policy's storage dtype

    As in transformers' Qwen3RMSNorm, the normalised x is rounded before the product.
    """

    def __init__(self, features: int, *, eps: float, policy: PolicyLike | Scope = None, rngs: nnx.Rngs | None):
        scope = scope_of(policy)
        self.activations, self.eps = scope.activations, eps
        self.compute = scope.spec("scale").compute_dtype
        self.scale, _ = new_parameter((features,), _constant(1), rngs, scope, "scale")

    def __call__(self, x: jax.Array) -> jax.Array:
        """The norm of x (..., features), of the same shape, in the activations' dtype."""
        result = self.activations or x.dtype
        compute = self.compute or result
        wide = x.astype(jnp.float32)
        normalised = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + jnp.float32(self.eps))
        return (normalised.astype(compute) * saturating_cast(self.scale[...], compute)).astype(result)
