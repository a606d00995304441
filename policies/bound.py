"""`bind`: an NNX module object with its parameters stored as a policy says, which is called like any other.

The variables of a bound module are those of `policy.store`: a narrow kernel and its `scale_inv` side by side.  What the
module's own code reads is something else: reading an attribute gives the parameter in its compute dtype, dequantised in
the program where it is read.  Flax's transformations, optimizers and states do not read attributes, and see what is
stored; hooks of the variables (`on_get_value`) would give optimizers their moments in compute dtypes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from flax import nnx

from .bound_classes import Call, Read, Reads, bound_class, is_bound
from .errors import UnsupportedCast
from .modules import refuse_kv_cache, takes_policy
from .paths import scale_path
from .presets import PolicyLike, get_policy
from .resolved import ResolvedParam, resolve
from .stock import product_fields
from .store import stored_arrays
from .trees import Narrow, arrays, describe, with_type

AnyModule = TypeVar("AnyModule", bound=nnx.Module)


def bind(module: AnyModule, policy: PolicyLike, *, methods: Iterable[str] = ("__call__",)) -> AnyModule:
    """Returns a copy of an NNX module, stored as the policy says, whose results are those of `perparam.apply`.

    module   a module object of any layers that know nothing of perparam; it does not change
    policy   any value that `get_policy` accepts
    methods  the methods that cast floating-point inputs to the policy's activations, and their results to its output
             dtype, when they are called from outside of the module

    The copy has the paths of `module`, and a `scale_inv` beside each narrow kernel.  Call it, also under `nnx.jit`,
    `nnx.grad`, `nnx.vmap`, `nnx.scan` and `nnx.remat`: an attribute of the module that is a parameter reads as an array
    in its compute dtype.  `nnx.state`, `nnx.split`, `nnx.update` and `nnx.Optimizer` use the stored arrays.  Narrow
    kernels are of the type `Narrow`, which `nnx.grad` and `nnx.Optimizer` over `nnx.Param` ignore; gradients of others
    have their stored dtype.

    The class of the copy is made here, so that it can be copied by `copy.deepcopy`, but not pickled.  Of two bound
    modules with equal policies, one that is called within the other counts as a part of it: its inputs and results are
    not cast.

    A narrow kernel without a compute dtype is dequantised to the dtype of the first floating-point input of the method
    that was called, and to float32 outside of `methods`.

    >>> import numpy as np
    >>> layer = bind(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), {"params": {"kernel": "f8_e4m3fn"}, "compute": "bf16"})
    >>> {name: x.dtype.name for name, x in nnx.state(layer).items()}
    {'bias': 'float32', 'kernel': 'float8_e4m3fn', 'scale_inv': 'float32'}
    >>> layer.kernel[...].dtype.name, layer(np.ones((1, 2), "f4")).dtype.name
    ('bfloat16', 'bfloat16')

    Raises:
      UnsupportedCast: for what is no NNX module object, a module that was bound or built with a policy, a method that
        it does not have, and a narrow compute dtype of a kernel that is not a linear layer's.
      UnmatchedRule, ShadowedRule, InvalidScale: see `Policy.explain`.
    """
    policy, methods = get_policy(policy), tuple(methods)
    _check(module, methods)
    refuse_kv_cache(policy, module)
    bound = nnx.clone(module)
    state = nnx.state(bound)
    resolved = resolve(policy, state)
    stored = stored_arrays(resolved, arrays(state))
    paths, owners = dict[int, str](), list[tuple[nnx.Pytree, list[tuple[str, str, nnx.Variable[Any]]]]]()
    for keys, node in nnx.iter_graph(bound):  # variables come before the modules that have them
        if isinstance(node, nnx.Variable):
            paths[id(node)] = "/".join(map(str, keys))
        elif isinstance(node, nnx.Pytree):
            own = [(name, paths[id(each)], each) for name, each in vars(node).items() if isinstance(each, nnx.Variable)]
            owners.append((node, [(name, path, each) for name, path, each in own if path in resolved.params]))
    _check_owned(resolved.params, {path for _, own in owners for _, path, _ in own})
    variables = dict[str, nnx.Variable[Any]]()
    for node, own in owners:
        reads = Reads()
        for name, path, variable in own:
            param = resolved.params[path]
            _store(node, name, variable, param, stored, variables)
            if _is_computed(param):
                reads[name] = Read(param.compute, policy.activations, param.backward)
            if param.compute is not None and param.compute.narrow:
                for field, value in product_fields(node, name, path, param.compute).items():
                    setattr(node, field, value)
        call = Call(policy, methods, any(_waits(param) for param in resolved.params.values()))
        if reads or node is bound:
            object.__setattr__(node, "__class__", bound_class(type(node), reads, call if node is bound else None))
    if away := sorted(resolved.stored.keys() - describe(bound).keys()):
        raise UnsupportedCast(
            f"{away[0]}: modules share this narrow parameter so that Flax lists its scales in another module than its "
            "kernel. Store it in f32 or bf16, or use perparam.apply."
        )
    return bound


def _is_computed(param: ResolvedParam) -> bool:
    """Returns whether a parameter is read in another format than it is stored in."""
    return param.format.narrow or (param.compute is not None and param.compute != param.format)


def _waits(param: ResolvedParam) -> bool:
    """Returns whether nothing but the dtype of an input decides the dtype in which a parameter is read."""
    return param.format.narrow and param.compute is None


def _store(
    node: nnx.Pytree,
    name: str,
    variable: nnx.Variable[Any],
    param: ResolvedParam,
    stored: Mapping[str, Any],
    variables: dict[str, nnx.Variable[Any]],
) -> None:
    """Sets the attribute `name` of a module, and that of its scales, to variables with stored arrays.

    variables  those of parameters that were stored before, which several modules may share, by path
    """
    is_pair, beside = param.scale_path in stored, scale_path(name)
    if is_pair and beside in vars(node):
        raise UnsupportedCast(
            f"{param.path}: {type(node).__name__} has an attribute {beside!r}, which the scales would replace. Rename "
            "it, or store the parameter in f32 or bf16."
        )
    if param.path not in variables:
        kind = Narrow if is_pair else type(variable)
        block: dict[str, Any] = {"block": param.format.block} if is_pair else {}
        variables[param.path] = with_type(variable, kind, stored[param.path], **block)
        if is_pair:
            variables[param.scale_path] = Narrow(stored[param.scale_path], **block)
    setattr(node, name, variables[param.path])
    if is_pair:
        setattr(node, beside, variables[param.scale_path])


def _check(module: Any, methods: tuple[str, ...]) -> None:
    """Raises UnsupportedCast for what cannot be bound."""
    if not isinstance(module, nnx.Module):
        name = module.__name__ if isinstance(module, type) else type(module).__name__
        raise UnsupportedCast(
            f"bind expects an NNX module object, found {name}. Pass the object, such as Net(rngs=nnx.Rngs(0)); Linen "
            "modules and callables run with perparam.init and perparam.apply."
        )
    for keys, part in [((), module), *nnx.iter_modules(module)]:
        where = f"{'/'.join(map(str, keys))}: " if keys else ""
        if is_bound(part) or takes_policy(type(part)):
            raise UnsupportedCast(
                f"{where}this {type(part).__name__} already has a policy, which cannot be replaced. Bind the module "
                "that was made without one."
            )
        if isinstance(part, (nnx.WeightNorm, nnx.SpectralNorm)):
            raise UnsupportedCast(
                f"{where}{type(part).__name__} changes the variables of another layer, and would see stored arrays. "
                "Use perparam.init and perparam.apply."
            )
    for name in methods:
        if not callable(getattr(type(module), name, None)):
            raise UnsupportedCast(
                f"methods: {type(module).__name__} has no method {name!r}. Name methods of its class."
            )


def _check_owned(params: Mapping[str, ResolvedParam], owned: set[str]) -> None:
    """Raises UnsupportedCast for a parameter to convert that is in a list or mapping, where reads cannot be seen."""
    for path, param in params.items():
        if path not in owned and (_is_computed(param) or param.change != "kept"):
            raise UnsupportedCast(
                f"{path}: {param.format}, computed in {param.compute or param.format}, cannot be bound in a Python "
                "list or mapping. Use nnx.List or nnx.Dict, or an attribute of the module."
            )
