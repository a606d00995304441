"""`merge_lora`: adds low-rank adapters to the kernels of a model, and reports what storage rounds away."""

from __future__ import annotations

import dataclasses
import math
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..policies.dtypes import saturating_cast
from ..policies.errors import InvalidAdapter, count
from ..policies.formats import Format
from ..policies.policy import Policy
from ..policies.rules import Rule, SlotRules
from ..policies.scaled_array import ScaledArray, quantize
from ..policies.tables import Column, Report, Table, json_lines
from .layers import Linear, pair
from .lora_layers import linear_layers, remove_adapter
from .moe import ExpertLinear

M = TypeVar("M", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class MergedLayer:
    """The merge of one adapter, W + D, where W is the kernel and D = scaling * lora_b @ lora_a; norms are Frobenius's.

    path    of the layer
    format  of its kernel, before and after
    delta   |D| / |W|
    error   |stored - (W + D)| / |W + D|: what rounding to the format changes
    noise   |stored - (W + D)| / |D|: the same beside the adapter, which is far smaller than the kernel
    kept    the part of D that the stored kernel has: <stored - W, D> / |D|², 1 without rounding; 1 where D is zero, for
            then the kernel keeps its bits
    """

    path: str
    format: Format
    delta: float
    error: float
    noise: float
    kept: float


@dataclasses.dataclass(frozen=True)
class MergeReport(Report):
    """The errors of a merge, one row for each layer; `str(report)` is a table.

    rows  in the model's order
    """

    rows: tuple[MergedLayer, ...]

    def to_json(self) -> str:
        """Returns rows and totals as JSON that suits a diff: one line for each row, and one for the totals."""
        rows = [{**dataclasses.asdict(row), "format": str(row.format)} for row in self.rows]
        worst = {"max_error": max(row.error for row in self.rows), "min_kept": min(row.kept for row in self.rows)}
        return json_lines(rows, worst)

    def _table(self) -> Table:
        columns = (
            Column("layer"),
            Column("format", colour=True, leave=1),
            Column("delta", right=True),
            Column("error", right=True),
            Column("noise", right=True),
            Column("kept", right=True),
        )
        lines = [
            (row.path, str(row.format), *(f"{part:.2%}" for part in (row.delta, row.error, row.noise, row.kept)))
            for row in self.rows
        ]
        return Table(columns, lines)

    def _notes(self) -> list[str]:
        worst = max(self.rows, key=lambda row: row.error)
        return [
            f"{count(len(self.rows), 'layer')} merged; the largest error is {worst.error:.2%}, in {worst.path}.",
            "delta: the adapter's norm relative to the kernel's. error: what rounding to the format changes, relative "
            "to the merged kernel; noise: relative to the adapter. kept: the part of the adapter that the stored "
            "kernel has.",
        ]


def merge_lora(model: M) -> tuple[M, MergeReport]:
    """Returns the model with its adapters merged into the kernels, and without them, and the errors of each layer.

    A kernel becomes `kernel + scaling * lora_b @ lora_a` in float32, and is stored in the format that it had: quantised
    anew, with the same block and dtype of scales. `model` is not changed, and other arrays are shared. The result's
    policy is without the rules that are for adapters only, such as `lora_a: f32`.

    The values of a narrow kernel are far apart (e4m3 has 4 significant bits), so a small adapter can be lost in part;
    see `MergedLayer.kept`. Such a model is better served with its adapters, or merged into bf16 kernels:
    `merge_lora(model.with_policy("bf16"))`.

    >>> from perparam.models import Linear
    >>> from perparam.training import add_lora
    >>> layer = add_lora(Linear(4, 3, policy="fp8_weight_only", rngs=nnx.Rngs(0)), 2, 4, "**", rngs=nnx.Rngs(1))
    >>> layer.lora_b[...] = jnp.ones((3, 2))
    >>> merged, report = merge_lora(layer)
    >>> merged.kernel.dtype.name, merged.adapter, report.rows[0].error < 2**-4
    ('float8_e4m3fn', None, True)

    Raises:
      InvalidAdapter: a model without adapters, or adapters that are not finite.
    """
    merged, rows = nnx.clone(model), []
    for path, layer in linear_layers(merged).items():
        if layer.adapter is not None:
            rows.append(_merge(path, layer))
            remove_adapter(layer)
    if not rows:
        raise InvalidAdapter(f"{type(model).__name__}: has no adapters to merge. Add them with add_lora or load_lora.")
    if isinstance(policy := getattr(merged, "policy", None), Policy):
        merged.policy = _without_adapters(policy)  # type: ignore[attr-defined]
    return merged, MergeReport(tuple(rows))


def _without_adapters(policy: Policy) -> Policy:
    """The policy without the rules whose patterns end with the names of adapters, which would match nothing."""

    def kept(rule: Rule) -> bool:
        return not all(name.startswith("lora_") for name in rule.compiled.names)

    return policy.replace(
        **{name: SlotRules(tuple(filter(kept, slot.rules)), slot.default) for name, slot in policy.slots}
    )


def _merge(path: str, layer: Linear | ExpertLinear) -> MergedLayer:
    """The row of a layer, whose kernel is replaced by the merged one."""
    assert layer.adapter is not None
    array = layer.kernel[...] if layer.scale_inv is None else pair(layer.kernel, layer.scale_inv)
    format = array.format if isinstance(array, ScaledArray) else Format(np.dtype(array.dtype))
    stored, squares = _merged(array, layer.lora_a[...], layer.lora_b[...], jnp.float32(layer.adapter.scaling))
    weight, delta, exact, error, along = (float(value) for value in squares)
    if not math.isfinite(delta):
        raise InvalidAdapter(f"{path}: its lora_a or lora_b holds NaN or infinity. The training diverged: start again.")
    if delta == 0:  # of a kernel that was not quantised here, quantising again need not give the same bits
        return MergedLayer(path, format, 0.0, 0.0, 0.0, 1.0)
    variables = [layer.kernel] if layer.scale_inv is None else [layer.kernel, layer.scale_inv]
    values = stored if isinstance(stored, ScaledArray) else (stored,)
    for variable, value in zip(variables, values, strict=True):
        variable.set_value(jax.device_put(value, variable.get_value().sharding))
    return MergedLayer(path, format, _root(delta, weight), _root(error, exact), _root(error, delta), along / delta)


def _root(numerator: float, denominator: float) -> float:
    return math.sqrt(numerator / denominator) if denominator else math.inf


@jax.jit
def _merged(
    array: jax.Array | ScaledArray, lora_a: jax.Array, lora_b: jax.Array, scaling: jax.Array
) -> tuple[jax.Array | ScaledArray, tuple[jax.Array, ...]]:
    """The merged kernel in the format of `array`, and |W|², |D|², |W + D|², |stored - (W + D)|², <stored - W, D>."""
    weight = array.dequantize() if isinstance(array, ScaledArray) else array.astype(jnp.float32)
    product = jnp.matmul(
        lora_b.astype(jnp.float32), lora_a.astype(jnp.float32), precision="highest", preferred_element_type=jnp.float32
    )
    delta = scaling * product
    exact = weight + delta
    stored: jax.Array | ScaledArray
    if isinstance(array, ScaledArray):
        stored = quantize(exact, array.format)
        again = stored.dequantize()
    else:
        stored = saturating_cast(exact, array.dtype)
        again = stored.astype(jnp.float32)
    pairs = (weight, weight), (delta, delta), (exact, exact), (again - exact, again - exact), (again - weight, delta)
    return stored, tuple(jnp.sum(left * right) for left, right in pairs)
