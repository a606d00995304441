"""Persistent proxies: variables of zeros beside narrow kernels, with which `nnx.grad` differentiates stored weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from .. import dtypes
from ..errors import InvalidPolicy
from ..paths import is_scale, proxy_path, scale_path
from ..trees import Narrow
from .partition import Trainable, choice


class Proxy(nnx.Param[Any]):
    """A wide array of zeros beside a narrow kernel `X`, at `X_proxy`, which receives the kernel's gradient.

    It is an `nnx.Param`, so that `nnx.grad` differentiates with respect to it.  Nothing reads its value.
    """


def add_proxies(model: nnx.Module, trainable: Trainable = "**", dtype: DTypeLike = jnp.float32) -> None:
    """Adds a `Proxy` beside each narrow kernel of `model` at the paths of `trainable`, in place.

    trainable  patterns of paths, or a function of the path
    dtype      f32, bf16 or f16, which the gradients will have

    Then `nnx.grad` and `nnx.value_and_grad` over `nnx.Param` give the gradient of a kernel `kernel` at `kernel_proxy`,
    and `with_policy` in `nnx.Optimizer(model, tx, wrt=nnx.Any(nnx.Param, perparam.training.Narrow))` updates the kernel
    with it.  Proxies are arrays of the model: they take memory, four bytes for each value in float32, and are rows of
    its plan.  `perparam.training.value_and_grad` needs none.  `remove_proxies` removes them, as before saving.

    >>> from perparam.models import Linear
    >>> layer = Linear(4, 3, policy={"params": {"kernel": "int8"}}, rngs=nnx.Rngs(0))
    >>> add_proxies(layer)
    >>> gradient = nnx.grad(lambda layer: layer(jnp.ones((1, 4))).sum())(layer)
    >>> gradient["kernel_proxy"][...].tolist()
    [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]

    Raises:
      UnmatchedRule: for a pattern that matches no narrow kernel, and does not end with '?'.
      InvalidPolicy: for another dtype.
    """
    if not dtypes.is_activation(dtypes.as_dtype(dtype)):
        raise InvalidPolicy(f"proxies are f32, bf16 or f16, found {dtypes.dtype_name(dtypes.as_dtype(dtype))}.")
    places = kernel_places(model)
    chosen = choice(trainable, list(dict.fromkeys(place.path for place in places)))
    attach(places, lambda path: dtypes.as_dtype(dtype) if chosen(path) else None)


def remove_proxies(model: nnx.Module) -> None:
    """Removes the proxies of `model` that `add_proxies` added, in place."""
    detach([place for place in kernel_places(model) if place.proxy is not None])


@dataclasses.dataclass(frozen=True)
class KernelPlace:
    """The place of a narrow kernel in a module.

    path    the kernel's path in the state of the whole model: of a kernel that modules share, the first one alone
    module  the module that has it
    name    its name there
    """

    path: str
    module: Any
    name: str

    @property
    def kernel(self) -> Narrow:
        """The kernel's variable."""
        kernel: Narrow = vars(self.module)[self.name]
        return kernel

    @property
    def proxy(self) -> Any:
        """The variable beside the kernel that receives its gradient, or None."""
        return vars(self.module).get(proxy_path(self.name))


def kernel_places(model: nnx.Module) -> list[KernelPlace]:
    """Returns the places of the narrow kernels of a model; one that modules share has several."""
    found = [
        ("/".join(map(str, (*keys, name))), module, name, id(value))
        for keys, module in nnx.iter_modules(model)
        for name, value in vars(module).items()
        if isinstance(value, Narrow) and not is_scale(name) and vars(module).get(scale_path(name)) is not None
    ]
    listed = {"/".join(map(str, keys)) for keys, _ in nnx.to_flat_state(nnx.state(model, Narrow))}
    paths = {kernel: path for path, _, _, kernel in found if path in listed}
    return [KernelPlace(paths[kernel], module, name) for _, module, name, kernel in found]


def attach(places: list[KernelPlace], dtype_of: Callable[[str], np.dtype | None]) -> list[KernelPlace]:
    """Adds proxies of zeros, of the dtype for each path, where it is not None, and returns the places that got one.

    A place that has a proxy keeps it.  Modules that share a kernel share its proxy.
    """
    added, proxies = [], {id(place.kernel): place.proxy for place in places if place.proxy is not None}
    for place in places:
        dtype = dtype_of(place.path)
        if place.proxy is None and dtype is not None:
            kernel = place.kernel
            if id(kernel) not in proxies:
                proxies[id(kernel)] = Proxy(zeros(kernel.get_raw_value(), dtype))
            setattr(place.module, proxy_path(place.name), proxies[id(kernel)])
            added.append(place)
    return added


def detach(places: list[KernelPlace]) -> None:
    """Removes the proxies at these places."""
    for place in places:
        delattr(place.module, proxy_path(place.name))


def zeros(values: Any, dtype: np.dtype) -> Any:
    """Returns zeros of the shape of narrow values, and with their sharding; a shape if the values are one."""
    if isinstance(values, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(values.shape, dtype)
    return jnp.zeros_like(values, dtype=dtype)
