"""The memory of training: bytes of gradients, optimizer state and masters by parameter, before allocation."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import optax
from flax import nnx

from ..dtypes import dtype_name, is_floating
from ..errors import count
from ..labels import human_bytes
from ..resolved import Resolved, ResolvedParam
from ..rules import PolicyRules
from ..scales import F32
from ..trees import is_train_state, replace_parameters
from .fields import StateLeaf, state_leaves, stays_wide
from .partition import Trainable, choice
from .state_formats import StateArray, StateFormat
from .states import PolicyState
from .trained import TrainedParameters, keep, pure


@dataclasses.dataclass(frozen=True)
class ParamMemory:
    """What training adds to one parameter.

    gradient        dtype of the gradient that `value_and_grad` with this policy gives the optimizer, as text
    gradient_bytes  its bytes
    state           format of each field of the optimizer's state, as text
    state_bytes     bytes of each field, including scales
    wide            why a field stays in float32 under an 8-bit rule for the whole field
    rules           the rule that applies to "grads", to "master" and to each field, with its file and line
    master          dtype of the master as text; None without one
    master_bytes    its bytes; 0 without
    amax_bytes      bytes of the magnitudes for delayed scales; 0 without
    item_bytes      bytes for one value of the parameter in the arrays of the optimizer that have its shape: these are
                    divided over devices as it is; the others, such as the scales of 8-bit state, are on each device
    """

    gradient: str
    gradient_bytes: int
    state: Mapping[str, str]
    state_bytes: Mapping[str, int]
    wide: Mapping[str, str]
    rules: Mapping[str, str]
    master: str | None = None
    master_bytes: int = 0
    amax_bytes: int = 0
    item_bytes: int = 0

    @property
    def bytes(self) -> int:
        """All of these bytes."""
        return self.gradient_bytes + sum(self.state_bytes.values()) + self.master_bytes + self.amax_bytes

    def device_bytes(self, size: int, part: int) -> int:
        """Returns the bytes on a device that has `part` of the `size` values of the parameter, without the gradient."""
        whole = self.bytes - self.gradient_bytes - size * self.item_bytes
        return whole + part * self.item_bytes

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON has them."""
        return dataclasses.asdict(self) | {"bytes": self.bytes}

    def __str__(self) -> str:
        state = ", ".join(f"{field}:{format}" for field, format in self.state.items())
        return f"{self.gradient} | {state or '–'} | {self.master or '–'}"


@dataclasses.dataclass(frozen=True)
class TrainingMemory:
    """What training adds to a tree of parameters.

    params        by path, for each parameter that is trained
    other_bytes   bytes of the optimizer's state that belong to no parameter, such as step counts
    unused        what the policy sets without effect on this optimizer, as sentences
    device_bytes  in a plan with shardings: bytes that `init` allocates on each device; None without shardings
    """

    params: Mapping[str, ParamMemory]
    other_bytes: int
    unused: tuple[str, ...] = ()
    device_bytes: int | None = None

    def on_devices(self, sizes: Mapping[str, tuple[int, int]]) -> TrainingMemory:
        """Returns this with `device_bytes`.

        sizes  by path, the number of values of each parameter, and of the part that a device has
        """
        parts = sum(param.device_bytes(*sizes[path]) for path, param in self.params.items())
        return dataclasses.replace(self, device_bytes=parts + self.other_bytes)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of all gradients."""
        return sum(param.gradient_bytes for param in self.params.values())

    @property
    def state_bytes(self) -> dict[str, int]:
        """Bytes of the optimizer's state by field, including scales."""
        totals: collections.Counter[str] = collections.Counter()
        for param in self.params.values():
            totals.update(param.state_bytes)
        return dict(totals)

    @property
    def master_bytes(self) -> int:
        """Bytes of all masters."""
        return sum(param.master_bytes for param in self.params.values())

    @property
    def amax_bytes(self) -> int:
        """Bytes of all magnitudes for delayed scales."""
        return sum(param.amax_bytes for param in self.params.values())

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of all arrays that the optimizer's `init` returns: state, masters, magnitudes and counters."""
        return sum(self.state_bytes.values()) + self.master_bytes + self.amax_bytes + self.other_bytes

    def to_dict(self) -> dict[str, Any]:
        """Returns the totals as JSON has them."""
        return {
            "parameters": len(self.params),
            "gradient_bytes": self.gradient_bytes,
            "state_bytes": self.state_bytes,
            "master_bytes": self.master_bytes,
            "amax_bytes": self.amax_bytes,
            "other_bytes": self.other_bytes,
            "optimizer_bytes": self.optimizer_bytes,
            "device_bytes": self.device_bytes,
        }

    def __str__(self) -> str:
        dtypes = " and ".join(dict.fromkeys(param.gradient for param in self.params.values()))
        fields = ", ".join(f"{field} {human_bytes(size)}" for field, size in self.state_bytes.items())
        parts = [f"gradients {human_bytes(self.gradient_bytes)}{f' ({dtypes})' if dtypes else ''}"]
        parts += [f"state {human_bytes(sum(self.state_bytes.values()))} ({fields})"] if fields else []
        parts += [f"masters {human_bytes(self.master_bytes)}"] if self.master_bytes else []
        parts += [f"magnitudes for delayed scales {human_bytes(self.amax_bytes)}"] if self.amax_bytes else []
        parts += [f"{human_bytes(self.other_bytes)} of counters and constants"] if self.other_bytes else []
        return f"training {count(len(self.params), 'parameter')}: {', '.join(parts)}"

    def lines(self, stored: int) -> list[str]:
        """Returns the totals as lines of text.

        stored  bytes of the stored parameters
        """
        total = stored + self.gradient_bytes + self.optimizer_bytes
        lines = [str(self), f"parameters, gradients, state and masters: {human_bytes(total)}"]
        if self.device_bytes is not None:
            lines.append(f"state and masters on each device: {human_bytes(self.device_bytes)}")
        wide: dict[tuple[str, str], list[str]] = {}
        for path, param in self.params.items():
            for field, why in param.wide.items():
                wide.setdefault((field, why), []).append(path)
        for (field, why), paths in wide.items():
            more = f" and {len(paths) - 1} more" if paths[1:] else ""
            lines.append(f"{field} stays f32 for {paths[0]}{more}: {why}")
        return [*lines, *self.unused]


def training_memory(
    resolved: Resolved, tree: Any, optimizer: optax.GradientTransformation, trainable: Trainable = "**"
) -> TrainingMemory:
    """Returns the memory that training adds to a tree, of which `resolved` is the resolution.

    optimizer  `with_policy(tx, policy)`, or any optax transformation
    trainable  patterns of paths, or a function of the path

    Raises:
      UnmatchedRule: for a pattern that matches none of the parameters; from the optimizer, for its policy's rules.
    """
    params = {path: param for path, param in resolved.params.items() if _can_train(param)}
    paths = set(filter(choice(trainable, list(params)), params))
    arrays = {path: jax.ShapeDtypeStruct(info.shape, info.dtype) for path, info in resolved.stored.items()}
    while is_train_state(tree):
        tree = tree.params
    stored = nnx.state(tree) if isinstance(tree, nnx.Module) else tree
    stored = keep(
        replace_parameters(stored, arrays, resolved.formats), paths | {params[path].scale_path for path in paths}
    )
    TrainedParameters(stored, resolved.policy)  # raises an error for a block that an optimizer would not know
    view = TrainedParameters(pure(stored), resolved.policy)
    state = jax.eval_shape(optimizer.init, pure(stored))
    leaves, _ = state_leaves(state, view.keys())
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, PolicyState))
    policy = resolved.policy if any(isinstance(node, PolicyState) for node in nodes) else PolicyRules({})
    by_path: dict[str | None, list[StateLeaf]] = {}
    for leaf in leaves:
        by_path.setdefault(leaf.path if leaf.field else None, []).append(leaf)
    memory = {path: _param_memory(params[path], by_path.get(path, []), policy) for path in view.trained}
    other = sum(_bytes(leaf.value) for leaf in by_path.get(None, []))
    unused = [name for name in ("grads", "opt_state", "master") if resolved.policy.slot(name) != policy.slot(name)]
    remedy = "without effect on this optimizer. Pass perparam.training.with_policy(optimizer, policy)."
    return TrainingMemory(memory, other, (f"{', '.join(unused)}: {remedy}",) if unused else ())


def _can_train(param: ResolvedParam) -> bool:
    return param.format.scale is not None or is_floating(param.format.values)


def _param_memory(param: ResolvedParam, leaves: list[StateLeaf], policy: PolicyRules) -> ParamMemory:
    gradient = policy.grads.dtype(param.path) or (F32 if param.format.scale is not None else param.format.values)
    formats: dict[str, str] = {}
    sizes: collections.Counter[str] = collections.Counter()
    wide: dict[str, str] = {}
    rules = {name: policy.slot(name).rule(param.path) for name in ("grads", "master")}
    for leaf in leaves:
        assert leaf.field is not None
        sizes[leaf.field] += _bytes(leaf.value)
        formats[leaf.field] = _format(leaf.value)
        if leaf.field in ("master", "amax"):
            continue
        rules[leaf.field] = rule = policy.opt_state.rule(leaf.name)
        if rule is not None and isinstance(rule.format, StateFormat) and not isinstance(leaf.value, StateArray):
            wide |= {leaf.field: why} if (why := stays_wide(rule, leaf)) else {}
    master, amax = formats.pop("master", None), formats.pop("amax", None)
    return ParamMemory(
        gradient=dtype_name(gradient),
        gradient_bytes=math.prod(param.shape) * gradient.itemsize,
        state=formats,
        state_bytes={field: size for field, size in sizes.items() if field in formats},
        wide=wide,
        rules={name: f"{rule.where}{rule.key!r}" for name, rule in rules.items() if rule is not None},
        master=master,
        master_bytes=sizes["master"] if master else 0,
        amax_bytes=sizes["amax"] if amax else 0,
        item_bytes=sum(
            x.dtype.itemsize for leaf in leaves for x in jax.tree.leaves(leaf.value) if x.shape == param.shape
        ),
    )


def _format(value: Any) -> str:
    return str(value.format) if isinstance(value, StateArray) else dtype_name(value.dtype)


def _bytes(value: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(value))
