"""Layers that read the policy: they hold arrays and resolved specs, and take no `dtype=`.

Kernels stand **(out, in)**, as in the checkpoints: nothing is transposed on load, export gives the same bytes, and both
operands of a matmul are contiguous along the axis that is summed, which FP8 tensor cores require.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers

from ..policies.dtypes import saturating_cast
from ..policies.formats import Format, ScaledArray, quantize, stored_format
from ..policies.matmul import scaled_matmul, scaled_matmuls
from ..policies.policy import Policy
from ..policies.presets import get_policy
from ..policies.resolved import too_flat
from ..policies.scales import F32, decode_scales
from ..policies.scope import Scope
from ..policies.trees import Narrow


def scope_of(policy: Policy | Scope | Any) -> Scope:
    """The scope a module works in, from whatever was given as its `policy=`."""
    return policy if isinstance(policy, Scope) else get_policy(policy).at()


def stored(
    shape: tuple[int, ...], draw: Initializer, rngs: nnx.Rngs | None, scope: Scope, name: str
) -> tuple[nnx.Variable, Narrow | None]:
    """The variables of a parameter of the module in `scope`, drawn in float32: itself and its scales.

    Without `rngs` they hold shapes and dtypes alone, to be filled.

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


def _random(initializer: Callable[..., jax.Array]) -> Initializer:
    return lambda rngs, shape: initializer(rngs.params(), shape, jnp.float32)


def _constant(value: float) -> Initializer:
    return lambda rngs, shape: jnp.full(shape, value, jnp.float32)


class Linear(nnx.Module):
    """y = x @ (kernel * scale_inv).T + bias, scaled block by block, in the activations' dtype.

    kernel     (out, in)                     the policy's storage dtype
    scale_inv  (ceil(out/bo), ceil(in/bi))   what each block is multiplied by; None where the kernel is not narrow
    bias       (out,)                        None without `use_bias`

    >>> layer = Linear(4, 3, policy={"params": {"kernel": "f8_e4m3fn"}, "compute": "bf16"}, rngs=nnx.Rngs(0))
    >>> layer.kernel.dtype.name, layer.kernel.shape, layer(jnp.ones((2, 4))).dtype.name
    ('float8_e4m3fn', (3, 4), 'bfloat16')
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = False,
        policy: Policy | Scope | Any = None,
        rngs: nnx.Rngs | None,
    ):
        scope = scope_of(policy)
        self.activations = scope.activations
        self.compute = scope.spec("kernel").compute
        draw = _random(initializers.lecun_normal(in_axis=-1, out_axis=-2))
        self.kernel, scale_inv = stored((out_features, in_features), draw, rngs, scope, "kernel")
        self.scale_inv = nnx.data(scale_inv)
        bias = stored((out_features,), _constant(0), rngs, scope, "bias")[0] if use_bias else None
        self.bias = nnx.data(bias)
        self.bias_compute = scope.spec("bias").compute_dtype if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., in) to (..., out), in the activations' dtype: the policy's, or that of x."""
        x = x.astype(self.activations or x.dtype)
        return self._biased(block_matmul(x, self.kernel, self.scale_inv, self.compute))

    def _biased(self, y: jax.Array) -> jax.Array:
        if self.bias is None:
            return y
        bias = saturating_cast(self.bias[...], self.bias_compute or y.dtype)
        return (y.astype(bias.dtype) + bias).astype(y.dtype)

    def _shares_launch(self) -> tuple[Any, ...] | None:
        """What projections of the same x have in common where their products can be launched as one."""
        if type(self) is not Linear or self.scale_inv is None:
            return None
        return self.activations, self.compute, pair(self.kernel, self.scale_inv).format


def project(x: jax.Array, *layers: nnx.Module) -> tuple[jax.Array, ...]:
    """`layer(x)` of each; of narrow `Linear`s that agree in all but their width, as one `scaled_matmuls`."""
    linears = [layer for layer in layers if isinstance(layer, Linear)]
    shared = {layer._shares_launch() for layer in linears}
    if len(linears) < len(layers) or len(shared) > 1 or None in shared:
        return tuple(layer(x) for layer in layers)
    first = linears[0]
    kernels = [pair(layer.kernel, layer.scale_inv) for layer in linears if layer.scale_inv is not None]
    x = x.astype(first.activations or x.dtype)
    results = scaled_matmuls(x, kernels, compute=first.compute)
    return tuple(layer._biased(y) for layer, y in zip(linears, results, strict=True))


def pair(kernel: nnx.Variable, scale_inv: nnx.Variable) -> ScaledArray:
    """The ScaledArray of a parameter's variables; a narrow kernel knows its block."""
    format = stored_format(np.dtype(kernel.dtype), kernel.block, np.dtype(scale_inv.dtype))
    return ScaledArray(kernel[...], scale_inv[...], format)


def block_matmul(x: jax.Array, kernel: nnx.Variable, scale_inv: Narrow | None, compute: Format | None) -> jax.Array:
    """`scaled_matmul` of the arrays in a parameter's variables."""
    return scaled_matmul(x, kernel[...] if scale_inv is None else pair(kernel, scale_inv), compute=compute)


class Embedding(nnx.Module):
    """Rows of a table, cast after the gather; `attend` is the tied head.

    embedding            (vocabulary, features)
    embedding_scale_inv  (ceil(vocabulary/bo), ceil(features/bi)), None where the table is not narrow
    """

    def __init__(self, vocabulary: int, features: int, *, policy: Policy | Scope | Any = None, rngs: nnx.Rngs | None):
        scope = scope_of(policy)
        self.activations = scope.activations
        self.compute = scope.spec("embedding").compute
        draw = _random(initializers.normal(0.02))
        self.embedding, scale_inv = stored((vocabulary, features), draw, rngs, scope, "embedding")
        self.embedding_scale_inv = nnx.data(scale_inv)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Ids (...) to (..., features) in the activations' dtype; an id outside the table gives NaN."""
        inside = (ids >= 0) & (ids < self.embedding.shape[0])
        rows = _rows(self.embedding[...], ids)
        wide = self.activations or (jnp.float32 if self.embedding_scale_inv is not None else rows.dtype)
        if self.embedding_scale_inv is not None:
            table = pair(self.embedding, self.embedding_scale_inv)
            height, width = table.block[0], min(table.block[1], table.shape[1])
            scales = jnp.take(decode_scales(table.scale_inv), ids // height, axis=0, mode="clip")
            rows = rows.astype(jnp.float32) * jnp.repeat(scales, width, axis=-1)[..., : rows.shape[-1]]
        compute = wide if self.compute is None or self.compute.narrow else self.compute.values
        return jnp.where(inside[..., None], saturating_cast(rows, compute).astype(wide), jnp.nan)

    def attend(self, x: jax.Array) -> jax.Array:
        """(..., features) to logits (..., vocabulary), under the rule of `embedding`."""
        return block_matmul(x, self.embedding, self.embedding_scale_inv, self.compute)


@jax.custom_jvp
def _rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of a table, gathered as bits and tied to the ids: XLA's CPU backend widens a whole narrow table to gather of
    it, and that before the decoding loop."""
    table, ids = jax.lax.optimization_barrier((table, ids))
    bits = jax.lax.bitcast_convert_type(table, jnp.dtype(f"uint{8 * table.dtype.itemsize}"))
    return jax.lax.bitcast_convert_type(jnp.take(bits, ids, axis=0, mode="clip"), table.dtype)


@_rows.defjvp
def _rows_jvp(primals, tangents):
    (table, ids), (tangent, _) = primals, tangents
    return _rows(table, ids), jnp.take(tangent, ids, axis=0, mode="clip")


class RMSNorm(nnx.Module):
    """x / rms(x) in float32, cast, then times `scale`, (features,), in the compute dtype of `scale`.

    Rounding follows transformers' Qwen3RMSNorm: where the compute dtype is the activations' one, the normalised x is
    rounded to it before the product.
    """

    def __init__(self, features: int, *, eps: float, policy: Policy | Scope | Any = None, rngs: nnx.Rngs | None):
        scope = scope_of(policy)
        self.activations, self.eps = scope.activations, eps
        self.compute = scope.spec("scale").compute_dtype
        self.scale, _ = stored((features,), _constant(1), rngs, scope, "scale")

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., features) to the same, in the activations' dtype."""
        result = self.activations or x.dtype
        compute = self.compute or result
        wide = x.astype(jnp.float32)
        normalised = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + jnp.float32(self.eps))
        return (normalised.astype(compute) * saturating_cast(self.scale[...], compute)).astype(result)
