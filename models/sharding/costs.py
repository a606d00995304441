"""The costs of one step of a sharded model on each device: bytes sent, bytes read from memory, and operations.

They follow from how products are carried out: `policies/matmul/sharded.py`, `experts.py` and `models/lookup.py`.

- A mesh axis that divides a kernel and the batch is one of FSDP: an all-gather of the kernel's stored bytes and scales.
- A mesh axis that divides the columns of a kernel and not the batch: an all-reduce of float32 sums. Before it, where a
  device has part of a block of narrow activations: an all-gather of these, which are then multiplied in float32.
- A mesh axis that divides the experts and the batch: two all-to-alls, to the experts and back. One that divides the
  experts and not the batch: each device computes its experts for all its tokens, and an all-reduce adds the results up.
- A mesh axis that divides the vocabulary: an all-reduce of the embeddings. Logits stay divided.

A batch that does not divide evenly over the mesh axes of the batch is not divided. Where `heads_split` finds no equal
groups of heads, XLA decides: counted is that all devices compute all heads, after an all-gather of the queries.

Left out: activations in memory, numbers of tokens and rows that devices exchange, sampling, and what is no product.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
from jax.sharding import NamedSharding

from ...policies.dtypes import is_narrow
from ...policies.matmul.sharded import Names, Part, ProductPlan, product_plan
from ...policies.resolved import Resolved, ResolvedParam
from ...policies.scaled_array import ScaledArray
from ...policies.scales import F32
from ..config import DecoderConfig
from .arrays import shardings, splits
from .experts import common_parts
from .heads import heads_split
from .model_sharding import ModelSharding, as_names

Kind = Literal["all-reduce", "all-gather", "all-to-all"]

_EMBEDDING = "embed_tokens/embedding"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a group of devices.

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

    collectives  in the order of the parameters
    read         bytes of parameters and of the KV cache that are read
    wide, fp8    operations of matrix products with activations in 16 or 32 bits, and in 8
    gathered     bytes of the largest kernel that is gathered, with its scales
    token        bytes of the KV cache for a token of a row
    """

    collectives: tuple[Collective, ...]
    read: float
    wide: float
    fp8: float
    gathered: float
    token: float

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
    return Costs(tuple(step.collectives), step.read, step.wide, step.fp8, step.gathered, step.token)


class _Step:
    """Sums of the costs of one step."""

    def __init__(
        self, config: DecoderConfig, layout: ModelSharding, resolved: Resolved, rows: int, new: int, past: int
    ):
        self.config, self.layout, self.resolved = config, layout, resolved
        self.where = shardings(layout, config, resolved.stored)
        self.splits = splits(layout, config, resolved.stored)
        self.batch = self.splits[_EMBEDDING].batch_of(rows)
        self.rows, self.new, self.past = rows // layout.devices(self.batch), new, past
        self.tokens = self.rows * new
        self.activations = resolved.activations or F32
        self.width = self.activations.itemsize
        self.stream = layout.divided(config.axis_sizes).get("embed", ())
        # 1 where heads are not divided in equal groups.
        projections = [self.splits[f"layers/0/self_attn/{name}_proj/kernel"] for name in "qkv"]
        heads = heads_split(projections, rows, config.num_attention_heads, config.num_key_value_heads)
        self.head_parts = 1 if heads is None else layout.devices(heads.heads)
        self.token = resolved.kv_bytes / self.head_parts * (1 if heads is None else heads.sharing)
        self.collectives: list[Collective] = []
        self.read = self.wide = self.fp8 = self.gathered = 0.0

    def add(self, param: ResolvedParam) -> None:
        """Adds the costs of a parameter and its scales; all kernels of a layer's experts with the first of them."""
        config, is_kernel = self.config, param.path.endswith("/kernel")
        if param.path == _EMBEDDING:
            self._lookup(param)
            if config.head is None and config.task == "causal_lm":
                self._product(param, self.rows)
        elif is_kernel and len(param.shape) == 3:
            experts, projection = param.path.rsplit("/", 2)[:2]
            if projection == "gate_proj":
                names = "gate_proj", "up_proj", "down_proj"
                self._mixture(*(self.resolved.params[f"{experts}/{name}/kernel"] for name in names))
        elif is_kernel:
            is_head = param.path.startswith(("lm_head/", "score/")) and config.task != "token_classification"
            self._product(param, self.rows if is_head else self.tokens)
        else:
            self.read += self._gather(param, self.splits[param.path].parts(()))

    def add_attention(self) -> None:
        """Adds the two products of attention, and what is read of the KV cache."""
        config, parts = self.config, self.head_parts
        for i in range(config.num_hidden_layers):
            query = f"layers/{i}/self_attn/q_proj/kernel"
            kept = self.splits[query].parts(self.batch)[0].kept
            if parts == 1 and kept:  # all devices need the queries of all heads
                self._collect("all-gather", kept, self.tokens * self.resolved.params[query].shape[0] * self.width)
            seen = self.past + (self.new + 1) / 2  # of causal attention, on average
            seen = min(seen, config.window(i) or seen)
            self.wide += 4 * self.tokens * seen * config.num_attention_heads / parts * config.head_dim
        self.read += self.rows * (self.past + self.new) * self.token

    def _plan(self, param: ResolvedParam) -> ProductPlan:
        """How the products with a kernel are divided."""
        # Shapes in place of arrays: `product_plan` looks at nothing else.
        arrays: list[Any] = [jax.ShapeDtypeStruct(info.shape, info.dtype) for info in param.stored.values()]
        kernel = ScaledArray(arrays[0], arrays[1], param.format) if len(arrays) > 1 else arrays[0]
        return product_plan(self.activations, kernel, self.splits[param.path], self.batch, param.compute)

    def _gather(self, param: ResolvedParam, parts: tuple[Part, ...]) -> float:
        """Bytes of a parameter and its scales on a device that has these parts; adds the collectives for that.

        Where a device has part of a block of rows, it takes its scales before the gathering of columns: they are
        counted whole.
        """
        size, moved = 0.0, 0.0
        for path, info in param.stored.items():
            sharding = self.where[path]
            assert isinstance(sharding, NamedSharding)
            names = [as_names(name) for name in (*sharding.spec, *(None,) * (len(info.shape) - len(sharding.spec)))]
            pairs = list(zip(names, parts, strict=True))
            local = info.bytes / math.prod(self.layout.devices(each) for each, part in pairs if part.kept)
            absent = tuple(name for each, part in pairs if not part.kept for name in each)
            if absent:
                self._collect("all-gather", absent, local)
                moved += local
            size += local
        self.gathered = max(self.gathered, moved)
        return size

    def _collect(self, kind: Kind, names: Names, size: float) -> None:
        if (devices := self.layout.devices(names)) > 1:
            self.collectives.append(Collective(kind, devices, size))

    def _count(self, param: ResolvedParam, operations: float, *, rounded: bool) -> None:
        if not rounded and param.compute is not None and is_narrow(param.compute.values):
            self.fp8 += operations
        else:
            self.wide += operations

    def _product(self, param: ResolvedParam, tokens: int) -> None:
        """Adds a product with a kernel (out, in)."""
        plan = self._plan(param)
        parts = plan.parts
        self.read += self._gather(param, parts)
        out, features = (_share(size, part) for size, part in zip(param.shape, parts, strict=True))
        self._count(param, 2 * tokens * out * features, rounded=plan.rounding is not None)
        if plan.rounding is not None:
            self._collect("all-gather", parts[1].kept, tokens * param.shape[1] * self.width)
        self._collect("all-reduce", parts[1].kept, tokens * out * F32.itemsize)
        self._make_whole(param.shape[0], parts[0], tokens)

    def _make_whole(self, size: int, part: Part, tokens: float) -> None:
        """Adds the all-gather of the stream where a device has only some columns of it.

        The hidden size is divided over axes of the batch, and this batch is not: XLA makes the stream whole again.
        """
        if size == self.config.hidden_size and part.kept and part.kept == self.stream:
            self._collect("all-gather", part.kept, tokens * size * self.width)

    def _mixture(self, gate: ResolvedParam, up: ResolvedParam, down: ResolvedParam) -> None:
        """Adds the products with the kernels (experts, out, in) of all experts of a layer."""
        (experts, wide, hidden), per_token = gate.shape, self.config.experts_per_token
        plans = [self._plan(param) for param in (gate, up, down)]
        number, width, features = common_parts(*(plan.parts for plan in plans))
        exchanged = bool(number.gathered)
        here = Part(number.names, (), number.count)  # experts are not gathered: tokens travel
        # Tokens that may choose one of the device's experts.
        arriving = self.tokens * (number.count if exchanged else 1)
        wide_parts = here, width, features
        all_parts = wide_parts, wide_parts, (here, features, width)
        for param, plan, parts in zip((gate, up, down), plans, all_parts, strict=True):
            rounded = plan.rounding is not None and bool(parts[2].kept)
            if rounded:
                self._collect("all-gather", parts[2].kept, arriving * per_token * param.shape[2] * self.width)
            self.read += self._gather(param, parts) * touched(experts, per_token, arriving)
            sides = _share(param.shape[1], parts[1]) * _share(param.shape[2], parts[2])
            self._count(param, 2 * arriving * per_token / number.count * sides, rounded=rounded)
        rows = self.tokens * per_token
        for _ in (gate, up):
            self._collect("all-reduce", features.kept, rows * _share(wide, width) * F32.itemsize)
        if exchanged:
            for _ in ("there", "back"):
                self._collect("all-to-all", number.gathered, rows * _share(hidden, features) * self.width)
        sums = self.tokens * _share(hidden, features) * F32.itemsize
        self._collect("all-reduce", (*number.kept, *width.kept), sums)
        self._make_whole(hidden, features, self.tokens)

    def _lookup(self, param: ResolvedParam) -> None:
        """Adds the embeddings of the step's tokens: rows of a table (vocabulary, hidden), which is not gathered."""
        rows, columns = self.splits[param.path].parts(self.batch)
        width = F32.itemsize if param.format.narrow else param.format.values.itemsize
        self.read += self.tokens * param.shape[1] * param.format.values.itemsize
        size = self.tokens * param.shape[1] * width
        self._collect("all-reduce", rows.kept, size / (columns.count if columns.kept else 1))
        # A device has some columns for the tokens of all, and sends them where the tokens are.
        self._collect("all-to-all", columns.gathered, size)
        self._make_whole(param.shape[1], columns, self.tokens)


def _share(size: int, part: Part) -> float:
    """What a device has of a dimension of this size."""
    return size / part.count if part.kept else size
