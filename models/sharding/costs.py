"""The costs of one step of a sharded model on each device: bytes sent, bytes read from memory, and operations.

They follow from the shardings of the parameters, as `policies/matmul/sharded.py` carries products out:

- A mesh axis that divides a kernel and the batch is one of FSDP: an all-gather of the kernel's stored bytes and scales.
- A mesh axis that divides the columns of a kernel and not the batch: an all-reduce of float32 sums.
- A mesh axis that divides the experts and the batch: two all-to-alls, to the experts and back. One that divides the
  experts and not the batch: each device computes its experts for all its tokens, and an all-reduce adds the results up.
- A mesh axis that divides the vocabulary: an all-reduce of the embeddings. Logits stay divided.

A batch that does not divide evenly over the mesh axes of the batch is not divided.

Left out: activations, norms of divided activations, sampling, and what a token costs that is not a matrix product.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
from jax.sharding import NamedSharding

from ...policies.dtypes import is_narrow
from ...policies.resolved import Resolved, ResolvedParam
from ..config import DecoderConfig
from .arrays import shardings
from .model_sharding import ModelSharding, as_names

Kind = Literal["all-reduce", "all-gather", "all-to-all"]
Names = tuple[str, ...]

EMBEDDING = "embed_tokens/embedding"


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collective operations that all devices of a group carry out together.

    kind     which one
    devices  devices of a group
    bytes    all-reduce: of the array that is summed; all-gather: of the gathered array; all-to-all: of what one device
             holds before it
    """

    kind: Kind
    devices: int
    bytes: float

    @property
    def sent(self) -> float:
        """Bytes that each device sends, in a ring of n: bytes · (n-1)/n, and twice that in an all-reduce.

        An all-reduce is a reduce-scatter and an all-gather; in an all-to-all a device keeps one of its n parts.
        """
        return self.bytes * (self.devices - 1) / self.devices * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass(frozen=True)
class Costs:
    """The costs of one step on each device.

    collectives  in the order of the layers
    read         bytes of parameters and of the KV cache that are read
    wide, fp8    operations of matrix products with activations in 16 or 32 bits, and in 8
    gathered     bytes of the largest kernel that is gathered, with its scales
    """

    collectives: tuple[Collective, ...]
    read: float
    wide: float
    fp8: float
    gathered: float

    @property
    def sent(self) -> float:
        """Bytes that each device sends."""
        return sum(each.sent for each in self.collectives)

    def by_kind(self) -> dict[Kind, tuple[int, float]]:
        """{kind: (number of collectives, bytes that each device sends)}."""
        kinds = dict.fromkeys(each.kind for each in self.collectives)
        return {
            kind: (len(sent), sum(sent))
            for kind in kinds
            if (sent := [each.sent for each in self.collectives if each.kind == kind])
        }


def touched(experts: int, per_token: int, tokens: float) -> float:
    """The expected fraction of a layer's experts that `tokens` tokens choose, if all choices are equally likely.

    A token leaves an expert out with probability 1 - per_token/experts.
    """
    return 1 - (1 - per_token / experts) ** tokens


def step_costs(
    config: DecoderConfig, layout: ModelSharding, resolved: Resolved, *, rows: int, new: int, past: int = 0
) -> Costs:
    """The costs of one step of a model: each of `rows` rows gets `new` tokens after `past` cached ones.

    resolved  the policy, resolved on the model's parameters
    rows      of the whole batch

    Raises:
      InvalidSharding: see `shardings`.
    """
    step = _Step(config, layout, resolved, rows, new, past)
    for param in resolved.params.values():
        step.add(param)
    step.add_attention()
    return Costs(tuple(step.collectives), step.read, step.wide, step.fp8, step.gathered)


class _Step:
    """Sums of the costs of one step."""

    def __init__(
        self, config: DecoderConfig, layout: ModelSharding, resolved: Resolved, rows: int, new: int, past: int
    ):
        self.config, self.layout, self.resolved = config, layout, resolved
        self.where = shardings(layout, config, resolved.stored)
        self.batch = layout.batch if rows % layout.devices(layout.batch) == 0 else ()
        self.rows, self.new, self.past = rows // layout.devices(self.batch), new, past
        self.tokens = self.rows * new
        self.width = (resolved.activations or np.dtype(np.float32)).itemsize
        self.collectives: list[Collective] = []
        self.read = self.wide = self.fp8 = self.gathered = 0.0

    def add(self, param: ResolvedParam) -> None:
        """Adds the costs of a parameter and its scales."""
        config, rank = self.config, len(param.shape)
        if param.path == EMBEDDING:
            self._lookup(param)
            if config.head is None and config.task == "causal_lm":
                self._product(param, self.rows)
        elif param.path.endswith("/kernel") and rank == 3:
            self._experts(param)
        elif param.path.endswith("/kernel") and rank == 2:
            is_head = param.path.startswith(("lm_head/", "score/")) and config.task != "token_classification"
            self._product(param, self.rows if is_head else self.tokens)
        else:
            self.read += sum(self._local(param).values())

    def add_attention(self) -> None:
        """Adds the two products of attention, and what is read of the KV cache."""
        config, heads = self.config, self._parts("heads")
        for i in range(config.num_hidden_layers):
            seen = self.past + (self.new + 1) / 2  # of causal attention, on average
            seen = min(seen, config.window(i) or seen)
            self.wide += 4 * self.tokens * seen * config.num_attention_heads / heads * config.head_dim
        self.read += self.rows * (self.past + self.new) * self.resolved.kv_bytes / self._parts("kv_heads")

    def _parts(self, axis: str) -> int:
        """The number of devices over which a logical axis of activations is divided."""
        names = self.layout.divided(self.config.axis_sizes).get(axis, ())
        return 1 if set(names) & set(self.batch) else self.layout.devices(names)

    def _names(self, path: str, rank: int) -> list[Names]:
        """The mesh axes over which each dimension of an array is divided."""
        sharding = self.where[path]
        assert isinstance(sharding, NamedSharding)
        return [as_names(name) for name in (*sharding.spec, *(None,) * (rank - len(sharding.spec)))]

    def _split(self, names: list[Names]) -> tuple[list[Names], list[Names]]:
        """`(kept, gathered)`: the mesh axes of each dimension over which it stays divided, and those of FSDP."""
        is_gathered = [bool(set(each) & set(self.batch)) for each in names]
        kept = [() if gathers else each for each, gathers in zip(names, is_gathered, strict=True)]
        return kept, [each if gathers else () for each, gathers in zip(names, is_gathered, strict=True)]

    def _local(self, param: ResolvedParam, exchanged: bool = False) -> Mapping[str, float]:
        """{path: bytes} of a parameter and its scales on a device after gathering; adds the collectives for that.

        exchanged  the first dimension is not gathered, but stays divided
        """
        sizes, moved = dict[str, float](), 0.0
        for path, info in param.stored.items():
            names = self._names(path, len(info.shape))
            kept, gathered = self._split(names)
            if exchanged:
                kept[0], gathered[0] = names[0], ()
            sizes[path] = info.bytes / math.prod(map(self.layout.devices, kept))
            group = math.prod(map(self.layout.devices, gathered))
            if group > 1:
                self.collectives.append(Collective("all-gather", group, sizes[path]))
                moved += sizes[path]
        self.gathered = max(self.gathered, moved)
        return sizes

    def _count(self, param: ResolvedParam, operations: float) -> None:
        if param.compute is not None and is_narrow(param.compute.values):
            self.fp8 += operations
        else:
            self.wide += operations

    def _reduce(self, names: Names, size: float) -> None:
        if (devices := self.layout.devices(names)) > 1:
            self.collectives.append(Collective("all-reduce", devices, size))

    def _product(self, param: ResolvedParam, tokens: int) -> None:
        """Adds a product with a kernel (out, in)."""
        self.read += sum(self._local(param).values())
        kept, _ = self._split(self._names(param.path, 2))
        out, features = (size / self.layout.devices(each) for size, each in zip(param.shape, kept, strict=True))
        self._count(param, 2 * tokens * out * features)
        self._reduce(kept[1], tokens * out * 4)
        if kept[0] and param.shape[0] == self.config.hidden_size and kept[0] == self._embed():
            # The batch is not divided, but the stream is: it is made whole for the next product.
            self.collectives.append(
                Collective("all-gather", self.layout.devices(kept[0]), tokens * param.shape[0] * self.width)
            )

    def _embed(self) -> Names:
        """The mesh axes over which the hidden size is divided."""
        return self.layout.divided(self.config.axis_sizes).get("embed", ())

    def _experts(self, param: ResolvedParam) -> None:
        """Adds the products with a kernel (experts, out, in) of all experts of a layer."""
        names, config = self._names(param.path, 3), self.config
        experts, out, features = param.shape
        exchanged = bool(set(names[0]) & set(self.batch))
        kept, _ = self._split(names)
        group = self.layout.devices(names[0])
        arriving = self.tokens * (group if exchanged else 1)  # tokens that may choose one of the device's experts
        per_token = config.experts_per_token
        self.read += sum(self._local(param, exchanged).values()) * touched(experts, per_token, arriving)
        sides = out / self.layout.devices(kept[1]) * features / self.layout.devices(kept[2])
        self._count(param, 2 * arriving * per_token / group * sides)
        if out != config.hidden_size or not param.path.endswith("/down_proj/kernel"):
            return
        if exchanged:
            there = Collective("all-to-all", group, self.tokens * per_token * out * self.width)
            self.collectives += [there, there]
        self._reduce((*(() if exchanged else kept[0]), *kept[2]), self.tokens * out * 4)

    def _lookup(self, param: ResolvedParam) -> None:
        """Adds the embeddings of the step's tokens: rows of a table (vocabulary, hidden)."""
        (vocabulary, hidden), size = self._names(param.path, 2), self.tokens * param.shape[1] * self.width
        self.read += self.tokens * param.shape[1] * param.format.values.itemsize
        self._reduce(tuple(name for name in vocabulary if name not in self.batch), size)
        if hidden:
            # With FSDP a device has some columns for the tokens of all, and sends them where the tokens are.
            kind: Kind = "all-to-all" if set(hidden) & set(self.batch) else "all-gather"
            self.collectives.append(Collective(kind, self.layout.devices(hidden), size))
