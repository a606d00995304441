"""`value_and_grad` and `grad` of functions of stored parameters, those in narrow formats included.

The gradient of a scaled pair is one wide array, that of the weight `kernel * scale_inv` (see `policies/trainable.py`).
The proxies that receive it are zeros made where the gradient is computed: inside a compiled program they cost nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from .. import dtypes
from ..errors import InvalidGradients, count
from ..paths import is_scale, proxy_path, scale_path
from ..presets import PolicyLike, get_policy
from ..rules import SlotRules
from ..scaled_array import ScaledArray
from ..scales import F32
from ..trainable import TrainableValues
from ..trees import Narrow, is_leaf, map_parameters, parameters, rebox, unbox
from .partition import Trainable, choice
from .proxies import Proxy, attach, detach, kernel_places, zeros


def value_and_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    trainable: Trainable = "**",
    policy: PolicyLike = None,
) -> Callable[..., Any]:
    """Returns a function that returns `(value, gradient)`, as `jax.value_and_grad` does, for stored parameters.

    fun        returns a scalar, or with `has_aux` a pair of a scalar and anything else
    argnums    which arguments have parameters: trees, such as the variables of `perparam.init`, an `nnx.State` or
               containers of ScaledArrays; or NNX modules, whose other state changes as under `nnx.value_and_grad`
    trainable  which parameters are trained: patterns of paths, or a function of the path; others are frozen, and cost
               no gradient
    policy     its slot `grads` gives the dtypes of gradients; None, and without a rule: float32 for narrow parameters,
               and their own dtype for others

    A gradient has the structure of the parameters, with one array for each that is trained, and None in place of scales
    and of all other leaves.  That of an NNX module or state is an `nnx.State` of what is trained, without scales.

    `fun` uses narrow parameters in `perparam.apply`, `Policy.to_compute`, `scaled_matmul`, `grouped_matmul` or
    `dequantize`.  In trees of pairs it gets `TrainableValues` in place of narrow kernels, which other functions refuse;
    of the modules, perparam's own layers have gradients of narrow kernels.  The derivative of rounding is replaced by
    1.

    >>> import jax.numpy as jnp, perparam
    >>> params = {"kernel": jnp.array([[2, 3]], "int8"), "scale_inv": jnp.array([[0.5]])}
    >>> def loss(params, x):
    ...     return perparam.scaled_matmul(x, params["kernel"], params["scale_inv"]).sum()
    >>> value, gradient = value_and_grad(loss)(params, jnp.array([[1000.0, 2000.0]]))
    >>> float(value), gradient["kernel"].tolist(), gradient["scale_inv"]
    (4000.0, [[1000.0, 2000.0]], None)

    Raises:
      UnmatchedRule: from the call, for a pattern that matches no parameter, and does not end with '?'.
      InvalidGradients: from the call, if nothing is trained, or for both modules and trees in `argnums`.
    """
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    rules = get_policy(policy).slot("grads")

    @functools.wraps(fun)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        chosen = [args[number] for number in numbers]
        modules = [isinstance(argument, nnx.Module) for argument in chosen]
        if any(modules) and not all(modules):
            raise InvalidGradients(
                f"argnums={argnums}: NNX modules and trees cannot be differentiated together. Pass the states of the "
                "modules: nnx.state(module)."
            )
        of = _of_modules if all(modules) else _of_trees
        value, gradients = of(fun, numbers, has_aux, trainable, rules, args, kwargs)
        return value, gradients[0] if isinstance(argnums, int) else tuple(gradients)

    return wrapped


def grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    trainable: Trainable = "**",
    policy: PolicyLike = None,
) -> Callable[..., Any]:
    """Returns a function that returns the gradient, with `has_aux` `(gradient, aux)`; see `value_and_grad`.

    >>> import jax.numpy as jnp, perparam
    >>> grad(lambda scaled: 3 * scaled.dequantize().sum())(perparam.quantize(jnp.ones((1, 2)), "f8_e4m3fn")).tolist()
    [[3.0, 3.0]]
    """
    function = value_and_grad(fun, argnums, has_aux, trainable=trainable, policy=policy)

    @functools.wraps(fun)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        value, gradient = function(*args, **kwargs)
        return (gradient, value[1]) if has_aux else gradient

    return wrapped


def _of_trees(
    fun: Callable[..., Any],
    numbers: tuple[int, ...],
    has_aux: bool,
    trainable: Trainable,
    rules: SlotRules,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, list[Any]]:
    """Returns the value of `fun`, and the gradient of each chosen argument, which are trees."""
    found = [_Argument.of(args[number]) for number in numbers]
    selected = _selected([argument.paths for argument in found], trainable)
    inputs = [argument.inputs(paths, rules) for argument, paths in zip(found, selected, strict=True)]

    def of_inputs(inputs: list[dict[str, jax.Array]]) -> Any:
        changed = list(args)
        for number, argument, arrays in zip(numbers, found, inputs, strict=True):
            changed[number] = argument.with_inputs(arrays)
        return fun(*changed, **kwargs)

    value, gradients = jax.value_and_grad(of_inputs, has_aux=has_aux)(inputs)
    return value, [
        argument.gradient({path: _cast(x, rules, path) for path, x in arrays.items()})
        for argument, arrays in zip(found, gradients, strict=True)
    ]


def _selected(paths: list[list[str]], trainable: Trainable) -> list[list[str]]:
    """Returns the paths that are trained, of each argument."""
    chosen = choice(trainable, [path for each in paths for path in each])
    selected = [list(filter(chosen, each)) for each in paths]
    if not any(selected):
        raise InvalidGradients(
            f"{trainable!r} (trainable) selects none of {count(sum(map(len, paths)), 'parameter')}, so there is no "
            "gradient. Pass patterns of paths of floating-point parameters or scaled pairs."
        )
    return selected


def _cast(gradient: jax.Array, rules: SlotRules, path: str) -> jax.Array:
    """Returns a gradient in the dtype of the slot `grads`, without saturation."""
    format = rules.format(path)
    return gradient if format is None else gradient.astype(format.values)


@dataclasses.dataclass(frozen=True)
class _Argument:
    """A tree of parameters, of which some are trained.

    tree   the tree
    flat   its parameters by path, without scales
    pairs  the paths of scaled pairs
    """

    tree: Any
    flat: dict[str, Any]
    pairs: frozenset[str]

    @classmethod
    def of(cls, tree: Any) -> _Argument:
        """Returns the parameters of a tree."""
        flat = parameters(tree)
        pairs = frozenset(path for path in flat if not is_scale(path) and scale_path(path) in flat)
        scales = set(map(scale_path, pairs))
        return cls(tree, {path: value for path, value in flat.items() if path not in scales}, pairs)

    @property
    def paths(self) -> list[str]:
        """The paths of the parameters that can be trained: scaled pairs, and wide floating-point ones."""
        return [path for path, value in self.flat.items() if path in self.pairs or _is_wide(value.dtype)]

    def inputs(self, paths: list[str], rules: SlotRules) -> dict[str, jax.Array]:
        """Returns the arrays that are differentiated, by path: proxies of pairs, and other parameters themselves."""
        found = {}
        for path in paths:
            format = rules.format(path)
            dtype = F32 if format is None else format.values
            found[path] = zeros(self.flat[path], dtype) if path in self.pairs else jax.numpy.asarray(self.flat[path])
        return found

    def with_inputs(self, arrays: dict[str, jax.Array]) -> Any:
        """Returns the tree as the function gets it."""

        def replace(path: str, leaf: Any) -> Any:
            if path not in arrays:
                return leaf
            value, array = unbox(leaf), arrays[path]
            if isinstance(value, ScaledArray):
                return rebox(leaf, dataclasses.replace(value, proxy=array))
            return rebox(leaf, TrainableValues(value, array) if path in self.pairs else array)

        return map_parameters(replace, self.tree)

    def gradient(self, arrays: dict[str, jax.Array]) -> Any:
        """Returns a tree with these gradients; it has None in place of other leaves, and a state omits them."""
        if isinstance(self.tree, nnx.State):
            flat = [("/".join(map(str, keys)), keys, leaf) for keys, leaf in nnx.to_flat_state(self.tree)]
            return nnx.from_flat_state([(keys, rebox(leaf, arrays[p])) for p, keys, leaf in flat if p in arrays])
        marked = map_parameters(
            lambda path, leaf: rebox(leaf, _Gradient(arrays[path])) if path in arrays else leaf, self.tree
        )

        def visit(leaf: Any) -> Any:
            value = unbox(leaf)
            return rebox(leaf, value.array) if isinstance(value, _Gradient) else None

        return jax.tree.map(visit, marked, is_leaf=is_leaf)


@dataclasses.dataclass(frozen=True)
class _Gradient:
    """A gradient in place of its parameter, which is one leaf for JAX."""

    array: jax.Array


def _is_wide(dtype: Any) -> bool:
    return dtypes.is_floating(dtype) and not dtypes.is_narrow(dtype)


def _of_modules(
    fun: Callable[..., Any],
    numbers: tuple[int, ...],
    has_aux: bool,
    trainable: Trainable,
    rules: SlotRules,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, list[Any]]:
    """Returns the value of `fun`, and the gradient of each chosen argument, which are NNX modules.

    The modules have proxies while `fun` runs.
    """
    places = [kernel_places(args[number]) for number in numbers]
    states = [nnx.to_flat_state(nnx.state(args[number], nnx.Param)) for number in numbers]
    wide = [
        ["/".join(map(str, keys)) for keys, leaf in state if not isinstance(leaf, Proxy) and _is_wide(leaf.dtype)]
        for state in states
    ]
    paths = [[*paths, *dict.fromkeys(place.path for place in each)] for paths, each in zip(wide, places, strict=True)]
    selected = list(map(frozenset, _selected(paths, trainable)))

    def dtype_of(chosen: frozenset[str], path: str) -> np.dtype | None:
        format = rules.format(path)
        return None if path not in chosen else F32 if format is None else format.values

    added = []
    try:
        for each, chosen in zip(places, selected, strict=True):
            added += attach(each, functools.partial(dtype_of, chosen))
        states_of = tuple(
            nnx.DiffState(number, functools.partial(_is_trained, chosen))
            for number, chosen in zip(numbers, selected, strict=True)
        )
        value, gradients = nnx.value_and_grad(fun, argnums=states_of, has_aux=has_aux)(*args, **kwargs)
    finally:
        detach(added)
    return value, [_without_proxies(gradient, rules) for gradient in gradients]


def _is_trained(chosen: frozenset[str], keys: tuple[Any, ...], value: Any) -> bool:
    """Returns whether an NNX variable is differentiated: a chosen parameter, or the proxy of a chosen kernel."""
    path = "/".join(map(str, keys))
    if isinstance(value, nnx.Variable) and isinstance(value, Proxy):
        return path in set(map(proxy_path, chosen))
    return isinstance(value, nnx.Param) and path in chosen


def _without_proxies(gradient: nnx.State[Any, Any], rules: SlotRules) -> nnx.State[Any, Any]:
    """Returns the gradients of a module with those of proxies at the paths of their kernels."""
    leaves = []
    for keys, leaf in nnx.to_flat_state(gradient):
        name = str(keys[-1])
        if isinstance(leaf, Proxy):
            keys = (*keys[:-1], name.removesuffix(proxy_path("")))
            leaf = Narrow(leaf.get_value())
        path = "/".join(map(str, keys))
        leaves.append((keys, rebox(leaf, _cast(leaf.get_value(), rules, path))))
    return nnx.from_flat_state(leaves)
