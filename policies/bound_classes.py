"""Classes of bound modules, which read their parameters in compute dtypes, and cast inputs and results.

A bound module has the attributes of any other, with stored arrays.  Its class is a subclass of the original one that
differs in what reading an attribute gives, so that a bound module differs in nothing that Flax flattens, merges or
saves.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from . import dtypes
from .cast import cast_floats
from .compute import as_computed
from .errors import UnsupportedCast
from .formats import Format, stored_format
from .modules import activations_of
from .paths import proxy_path, scale_path
from .policy import Policy
from .products import NarrowKernel
from .scaled_array import ScaledArray
from .scales import F32
from .trees import Narrow


def is_bound(module: nnx.Module) -> bool:
    """Returns whether `module` is bound, or part of a bound module that reads parameters in compute dtypes."""
    return hasattr(type(module), _BOUND)


@dataclasses.dataclass(frozen=True)
class Read:
    """How a module reads one of its parameters.

    compute      the format in the compute slot
    activations  the policy's dtype of activations, or None
    backward     the format in the backward slot
    """

    compute: Format | None
    activations: np.dtype | None
    backward: Format | None


@dataclasses.dataclass(frozen=True)
class Call:
    """How the methods of a bound module are called.

    policy   the policy
    methods  the names of the methods that cast inputs and results
    waits    whether the dtype of an input decides the dtype of a parameter
    """

    policy: Policy
    methods: tuple[str, ...]
    waits: bool


_BOUND = "perparam_bound"
"""An attribute of the classes of bound modules, and of modules within them that read parameters."""

# The bound module that is called, as a token of its policy, and the dtype of its activations if that decides a dtype.
# A user context is part of JAX's cache keys: what was traced outside of a call, or for another dtype, is traced again.
_call = jax.make_user_context((None, None))


@functools.cache
def _token(policy: Policy) -> object:
    """Returns an object that stands for a policy and equal ones, and is hashed at once."""
    return object()


class Reads(dict[str, Read]):
    """How a module reads its parameters, by attribute; a dict that can be the key of a cache."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


@functools.cache
def bound_class(kind: type, reads: Reads, call: Call | None) -> type:
    """Returns the subclass of `kind` that reads its parameters so; the same class for the same arguments.

    Graph definitions compare classes: equal modules that are bound to equal policies have equal ones.
    """

    attribute: Any = kind.__getattribute__

    def read(self: nnx.Pytree, name: str) -> Any:
        value = attribute(self, name)
        how = reads.get(name)
        if how is None or not isinstance(value, nnx.Variable):
            return value
        scales, proxy = vars(self).get(scale_path(name)), vars(self).get(proxy_path(name))
        return _view(value, scales if isinstance(scales, Narrow) else None, proxy, how)

    # Without another base class: Python only changes the class of an object to one whose first base is its own.
    fields: dict[str, Any] = {
        "__getattribute__": read,
        _BOUND: True,
        "__annotations__": {},
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    if call is not None:
        fields |= {name: _casting(kind, name, call) for name in call.methods}
    return type(kind)(kind.__name__, (kind,), fields, pytree=kind._pytree__is_pytree)  # type: ignore[attr-defined]


def _casting(kind: type, name: str, call: Call) -> Callable[..., Any]:
    """Returns the method `name` of `kind` with inputs and results cast, unless a method of the module calls it."""
    function = getattr(kind, name)

    @functools.wraps(function)
    def run(self: Any, *inputs: Any, **kwargs: Any) -> Any:
        method = functools.partial(function, self)
        if _call.value[0] is _token(call.policy):
            return method(*inputs, **kwargs)
        if call.policy.activations is not None:
            inputs, kwargs = cast_floats((inputs, kwargs), call.policy.activations)
        activations = activations_of(call.policy, (inputs, kwargs)) if call.waits else None
        with _call((_token(call.policy), activations)):
            return call.policy.cast_output(method(*inputs, **kwargs))

    return run


class _View:
    """The part of the type of a parameter as its module reads it: an array in the compute dtype.

    source  the variable of the module, to which a new value is written
    """

    __slots__ = ()

    def set_value(self, value: Any, **index: Any) -> None:
        """Stores a new value, cast to the stored dtype.

        Raises:
          UnsupportedCast: for a narrow kernel, of which the scales would have to change as well.
        """
        source = self.source  # type: ignore[attr-defined]
        if isinstance(source, Narrow) or isinstance(self.get_raw_value(), NarrowKernel):  # type: ignore[attr-defined]
            raise UnsupportedCast(
                f"a narrow {tuple(source.get_raw_value().shape)} parameter of a bound module is read-only. Update the "
                "module with nnx.update(module, policy.store(state)), or store the parameter in f32 or bf16."
            )
        dtype = source.get_raw_value().dtype
        source.set_value(dtypes.saturating_cast(jax.numpy.asarray(value), dtype), **index)
        super().set_value(value, **index)  # type: ignore[misc]

    def update_from_state(self, state: nnx.Variable[Any]) -> None:
        """Updates the stored variable, as Flax does when it merges a state into a module."""
        self.source.update_from_state(state)  # type: ignore[attr-defined]


@functools.cache
def _view_class(kind: type[nnx.Variable[Any]]) -> type[nnx.Variable[Any]]:
    """Returns the subclass of a type of variables for `_view`."""
    metaclass: Any = type(kind)
    view: type[nnx.Variable[Any]] = metaclass(kind.__name__, (_View, kind), {"__slots__": ("source",)})
    return view


def _view(variable: nnx.Variable[Any], scales: Narrow | None, proxy: Any, read: Read) -> nnx.Variable[Any]:
    """Returns a parameter as its module reads it; of a scaled pair an `nnx.Param` with the weight."""
    value = variable.get_raw_value()
    if scales is not None and dtypes.is_narrow(value.dtype):
        scale_inv = scales.get_raw_value()
        format = stored_format(np.dtype(value.dtype), variable.block, np.dtype(scale_inv.dtype))
        # While a narrow kernel is trained, a variable beside it receives its gradient: see `training.value_and_grad`.
        value = ScaledArray(value, scale_inv, format, None if proxy is None else proxy.get_raw_value())
    computed = as_computed(value, read.compute, read.activations or _call.value[1] or F32, backward=read.backward)
    kind = nnx.Param if isinstance(variable, Narrow) else type(variable)
    metadata = {key: item for key, item in variable.get_metadata().items() if key != "block"}
    view = _view_class(kind).from_metadata(computed, metadata)  # unlike the constructor, it does not shard again
    object.__setattr__(view, "source", variable)
    return view
