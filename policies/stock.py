"""Flax's own linear layers under a policy that computes their kernels in a narrow format.

`nnx.Linear`, `nnx.LinearGeneral`, `nn.Dense` and `nn.DenseGeneral` multiply by the function in their field
`dot_general`, after `promote_dtype`.  Here both are replaced, so that bias, axes and the rest remain Flax's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from .errors import UnsupportedCast
from .formats import Format
from .products import NarrowKernel, PromoteOthers, scaled_dot_general
from .trees import unbox

LINEAR = (nnx.Linear, nnx.LinearGeneral, nn.Dense, nn.DenseGeneral)
"""The layers that can multiply in a narrow format: their subclasses too, such as `nnx.LoRALinear`."""


def product_fields(layer: Any, name: str, path: str, format: Format) -> dict[str, Any]:
    """Returns the fields with which a layer multiplies its parameter `name` in a narrow format.

    path    of the parameter, for errors
    format  in which the policy computes it

    Raises:
      UnsupportedCast: if the layer is no linear layer of Flax, or has a product of its own.
    """
    kind = "a list or mapping" if layer is None else type(layer).__name__
    if not isinstance(layer, LINEAR) or name != "kernel":
        raise UnsupportedCast(
            f"{path}: computing in {format} needs a layer that quantises its activations, and {kind} multiplies wide "
            "arrays. nnx.Linear, nnx.LinearGeneral, nn.Dense and nn.DenseGeneral do so by policy. Write bf16 or null "
            "in compute, or use perparam.models.Linear or perparam.scaled_matmul."
        )
    own = [layer.dot_general, getattr(layer, "dot_general_cls", None)]
    if any(each is not None and each not in (jax.lax.dot_general, scaled_dot_general) for each in own):
        raise UnsupportedCast(
            f"{path}: computing in {format} replaces the product of {kind}, which has a dot_general of its own. Remove "
            "it, or write bf16 or null in compute."
        )
    promote = layer.promote_dtype
    return {
        "dot_general": scaled_dot_general,
        "promote_dtype": promote if isinstance(promote, PromoteOthers) else PromoteOthers(promote),
    }


def prepare(model: nnx.Module) -> None:
    """Gives every layer of an NNX module that has a `NarrowKernel` the product for it.

    Raises:
      UnsupportedCast: for a layer that cannot multiply in a narrow format; see `product_fields`.
    """
    kernels: dict[int, NarrowKernel] = {}
    multiplied = set()
    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable) and isinstance(node.get_raw_value(), NarrowKernel):
            kernels[id(node)] = node.get_raw_value()
        elif isinstance(node, nnx.Pytree):
            for name, variable in list(vars(node).items()):
                if id(variable) in kernels:
                    kernel = kernels[id(variable)]
                    for field, value in product_fields(node, name, kernel.path, kernel.compute).items():
                        setattr(node, field, value)
                    multiplied.add(id(variable))
    for variable, kernel in kernels.items():
        if variable not in multiplied:  # it is in a list or mapping
            product_fields(None, "", kernel.path, kernel.compute)


def intercept(next_function: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Runs a method of a Linen module, for `nn.intercept_methods`; layers with a `NarrowKernel` multiply with it.

    Raises:
      UnsupportedCast: for a module that cannot multiply in a narrow format; see `product_fields`.
    """
    module = context.module
    if module.scope is None:
        return next_function(*args, **kwargs)
    own = {name: unbox(leaf) for name, leaf in module.variables.get("params", {}).items()}
    kernels = {name: kernel for name, kernel in own.items() if isinstance(kernel, NarrowKernel)}
    fields: dict[str, Any] = {}
    for name, kernel in kernels.items():
        fields = product_fields(module, name, kernel.path, kernel.compute)
    before = {field: getattr(module, field) for field in fields}
    try:
        for field, value in fields.items():
            object.__setattr__(module, field, value)  # of a clone that belongs to this call of apply
        return next_function(*args, **kwargs)
    finally:
        for field, value in before.items():
            object.__setattr__(module, field, value)


def linen_products() -> Any:
    """Returns a context in which Linen's linear layers multiply with `NarrowKernel`s."""
    return nn.intercept_methods(intercept)
