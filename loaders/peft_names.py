"""Names of adapters in peft's files, and the layout of those of experts.

peft wraps transformers' model: `model.layers.0.self_attn.q_proj` has the tensors
`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` and `….lora_B.weight`.

The experts of a layer are two parameters in transformers 5, `experts.gate_up_proj` (experts, 2 width, hidden) and
`experts.down_proj`.  Their adapters (`target_parameters`, peft's `ParamWrapper`) have all experts in one tensor:

  lora_A  (experts * rank, in)   expert by expert
  lora_B  (out, rank * experts)  in each row rank by rank, and for each rank the experts

The one of `gate_up_proj` is called `experts.base_layer` where both have an adapter, else both are called `experts`.
Files from before have tensors for each expert, such as `experts.3.gate_proj.lora_A.weight`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

import numpy as np

from ..models.adapters import Adapter
from ..models.config import DecoderConfig
from ..policies.errors import UnsupportedExport
from .families import family_of
from .families.names import PREFIXES

PREFIX = "base_model.model."
_GATE, _UP, _DOWN = "gate_proj", "up_proj", "down_proj"


@dataclasses.dataclass(frozen=True)
class AdapterArrays:
    """An adapter with its arrays on the host: `lora_a` (…, rank, in) and `lora_b` (…, out, rank)."""

    adapter: Adapter
    lora_a: np.ndarray
    lora_b: np.ndarray


@dataclasses.dataclass(frozen=True)
class Module:
    """A linear layer of a checkpoint: the path of its layer in the model, and its number among stacked experts."""

    path: str
    expert: int | None


def modules(config: DecoderConfig, all_prefixes: bool = False) -> dict[str, Module]:
    """{name in the checkpoint: module} of all linear layers of a model.

    all_prefixes  whether names of files with other prefixes are included, such as those of a model without its head
    """
    family, found = family_of(config), dict[str, Module]()
    for prefixes in (None, *(PREFIXES if all_prefixes else ())):
        for name, (path, _, expert) in family.tensors(config, prefixes).items():
            if path.endswith("/kernel"):
                found.setdefault(name.removesuffix(".weight"), Module(path.removesuffix("/kernel"), expert))
    return found


@dataclasses.dataclass(frozen=True)
class Placed:
    """An adapter as peft has it.

    name       of its module or parameter in transformers' model, by which the settings name it
    tensors    beginning of the names of its tensors
    arrays     `lora_A` and `lora_B`, with two dimensions
    parameter  whether it is one of a parameter (`target_parameters`), and not of a linear layer
    """

    name: str
    tensors: str
    arrays: AdapterArrays
    parameter: bool


def placed(config: DecoderConfig, adapters: Mapping[str, AdapterArrays]) -> Iterator[Placed]:
    """The adapters of a model, given by the path of their layer, as peft has them.

    Raises:
      UnsupportedExport: adapters that peft cannot have; see below.
    """
    names: dict[str, str] = {}
    for name, module in modules(config).items():
        names.setdefault(module.path, name)
    has_experts = any(module.expert is not None for module in modules(config).values())
    for path, name in names.items():
        parent, _, leaf = name.rpartition(".")
        if "/experts/" in path:
            if leaf == _GATE:  # once for the three
                yield from _experts(path.rpartition("/")[0], parent.rpartition(".")[0], adapters)
        elif path not in adapters:
            continue
        elif has_experts and leaf in (_GATE, _UP, _DOWN):
            raise UnsupportedExport(
                f"{path}: peft takes an adapter of {leaf} in a {family_of(config).name} for one of its experts, so it "
                "cannot have one of a dense layer. Merge it with merge_lora, or add adapters to other layers."
            )
        elif path.endswith("/mlp/gate"):  # a router is no linear layer in transformers 5
            yield Placed(f"{name}.weight", name, adapters[path], parameter=True)
        else:
            yield Placed(name, name, adapters[path], parameter=False)


def _experts(path: str, name: str, adapters: Mapping[str, AdapterArrays]) -> Iterator[Placed]:
    """The adapters of the experts at `path`, which are the module `name` in transformers' model."""
    gate, up, down = (adapters.get(f"{path}/{leaf}") for leaf in (_GATE, _UP, _DOWN))
    inner = f"{name}.base_layer" if down is not None else name
    if gate is not None or up is not None:
        yield Placed(f"{name}.gate_up_proj", inner, _flat(_fused(path, gate, up)), parameter=True)
    if down is not None:
        yield Placed(f"{name}.down_proj", name, _flat(down), parameter=True)


def _fused(path: str, gate: AdapterArrays | None, up: AdapterArrays | None) -> AdapterArrays:
    """The adapter of `gate_up_proj`, whose rank is that of both together unless they share `lora_a`."""
    if gate is None or up is None:
        one = gate or up
        assert one is not None
        zeros = np.zeros_like(one.lora_b)
        halves = (one.lora_b, zeros) if up is None else (zeros, one.lora_b)
        return dataclasses.replace(one, lora_b=np.concatenate(halves, axis=1))
    if gate.adapter.scaling != up.adapter.scaling:
        raise UnsupportedExport(
            f"{path}: peft has one adapter for gate_proj and up_proj, with one scaling, and theirs are "
            f"{gate.adapter.scaling:g} and {up.adapter.scaling:g}. Give both the same rank and alpha."
        )
    if np.array_equal(gate.lora_a, up.lora_a):
        return dataclasses.replace(gate, lora_b=np.concatenate((gate.lora_b, up.lora_b), axis=1))
    rank = gate.adapter.rank + up.adapter.rank
    root = math.sqrt(rank) if gate.adapter.rslora else rank
    (experts, rows, _), columns = gate.lora_b.shape, gate.adapter.rank
    lora_b = np.zeros((experts, rows + up.lora_b.shape[1], rank), gate.lora_b.dtype)
    lora_b[:, :rows, :columns], lora_b[:, rows:, columns:] = gate.lora_b, up.lora_b
    adapter = dataclasses.replace(gate.adapter, rank=rank, alpha=gate.adapter.scaling * root)
    return AdapterArrays(adapter, np.concatenate((gate.lora_a, up.lora_a), axis=1), lora_b)


def _flat(stacked: AdapterArrays) -> AdapterArrays:
    """The adapters of experts with all experts in one matrix each."""
    experts, rank, features = stacked.lora_a.shape
    lora_b = stacked.lora_b.transpose(1, 2, 0)  # (out, rank, experts)
    return AdapterArrays(
        stacked.adapter,
        np.ascontiguousarray(stacked.lora_a.reshape(experts * rank, features)),
        np.ascontiguousarray(lora_b.reshape(lora_b.shape[0], rank * experts)),
    )


def stacked(flat: AdapterArrays, experts: int) -> AdapterArrays:
    """The inverse of `_flat`: the adapters (experts, rank, in) and (experts, out, rank) of a parameter of experts."""
    lora_b = flat.lora_b.reshape(flat.lora_b.shape[0], -1, experts).transpose(2, 0, 1)
    return AdapterArrays(flat.adapter, flat.lora_a.reshape(experts, -1, flat.lora_a.shape[-1]), lora_b)


def gate_and_up(fused: AdapterArrays) -> tuple[AdapterArrays, AdapterArrays]:
    """The adapters of `gate_proj` and `up_proj` in the stacked one of `gate_up_proj`: the inverse of `_fused`.

    Both get the whole `lora_a`, unless either uses its own half, as in a file that was made from two adapters.
    """
    rows, half = fused.lora_b.shape[1] // 2, fused.adapter.rank // 2
    gate, up = fused.lora_b[:, :rows], fused.lora_b[:, rows:]
    is_apart = fused.adapter.rank % 2 == 0 and not gate[:, :, half:].any() and not up[:, :, :half].any()
    if not is_apart or not fused.lora_b.any():
        return (
            dataclasses.replace(fused, lora_b=gate),
            dataclasses.replace(fused, lora_b=up),
        )
    root = math.sqrt(half) if fused.adapter.rslora else half
    adapter = dataclasses.replace(fused.adapter, rank=half, alpha=fused.adapter.scaling * root)
    return (
        AdapterArrays(adapter, fused.lora_a[:, :half], gate[:, :, :half]),
        AdapterArrays(adapter, fused.lora_a[:, half:], up[:, :, half:]),
    )
