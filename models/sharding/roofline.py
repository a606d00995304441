"""`MeshPlan`: memory, collectives and a roofline estimate of a sharded model on every device of `DEVICES`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Iterator
from typing import Any

from ...policies.errors import count
from ...policies.labels import human_bytes
from ...policies.plan import Plan
from ...policies.resolved import Resolved
from ...policies.tables import Column, Report, Table
from ..config import DecoderConfig
from .costs import Costs, step_costs
from .devices import DEVICES, Device
from .model_sharding import ModelSharding

_ASSUMPTIONS = (
    "An estimate from peak figures, not a measurement: the longer of reading memory and multiplying, then sending. "
    "Activations, latencies and sampling are left out: a step needs more memory and time, and much more time where it "
    "sends little in many collectives."
)
_ROUTING = "Experts that are read: all choices of the router are taken as equally likely."
_SHARED_HEADS = "Each of {} key-value heads is in the cache of {} devices, which share it."
_HEADS = (
    "{} key-value heads cannot be divided among {} devices: each has them all. XLA then decides how attention is "
    "divided; counted is that each device computes all heads."
)
_FLOAT32 = "Products of float32 activations are counted at the rate of bf16, which no device reaches."


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The time of one step on one kind of device, in seconds, by what takes it.

    memory   reading parameters and the KV cache
    compute  products of matrices
    links    sending to other devices
    """

    memory: float
    compute: float
    links: float

    @staticmethod
    def of(costs: Costs, device: Device) -> Estimate:
        """The estimate for these costs."""
        compute = costs.wide / device.bf16 + costs.fp8 / device.fp8
        return Estimate(costs.read / device.bandwidth, compute, costs.sent / device.links)

    @property
    def seconds(self) -> float:
        """The whole time: memory is read during products, and sending waits for them."""
        return max(self.memory, self.compute) + self.links

    @property
    def bound(self) -> str:
        """What takes longest: "memory", "compute" or "links"."""
        return max(("memory", "compute", "links"), key=lambda name: getattr(self, name))


@dataclasses.dataclass(frozen=True)
class MeshPlan(Report):
    """What a model needs on each device of a mesh, and how long its steps take at least.

    mesh        {axis: size}
    sharding    name of the preset
    batch       rows
    context     tokens of a row: of its prompt in a prefill, and in the cache before a decoding step
    parameters  bytes on each device
    token       bytes of the KV cache for a token of a row, on each device that has the row
    cache       bytes of the KV cache on each device
    steps       {"decode", "prefill": costs}; without decode for a model that does not generate
    notes       assumptions that concern this model
    """

    mesh: dict[str, int]
    sharding: str
    batch: int
    context: int
    parameters: int
    token: float
    cache: float
    steps: dict[str, Costs]
    notes: tuple[str, ...] = ()

    @property
    def devices(self) -> int:
        """The number of devices of the mesh."""
        return math.prod(self.mesh.values())

    @property
    def needed(self) -> float:
        """Bytes that a device needs: parameters, the KV cache, and the largest kernel that is gathered."""
        return self.parameters + self.cache + max(costs.gathered for costs in self.steps.values())

    def fits(self, device: Device) -> bool:
        """Whether a device's memory is large enough for `needed`."""
        return self.needed <= device.memory

    def to_dict(self) -> dict[str, Any]:
        """The fields, and the estimates for every device, as JSON has them; times are in seconds."""
        steps = {
            name: {
                "sent": round(costs.sent),
                "read": round(costs.read),
                "operations": round(costs.wide + costs.fp8),
                "collectives": {kind: {"count": n, "sent": round(sent)} for kind, (n, sent) in costs.by_kind().items()},
            }
            for name, costs in self.steps.items()
        }
        return {
            "mesh": self.mesh,
            "sharding": self.sharding,
            "batch": self.batch,
            "context": self.context,
            "parameters": self.parameters,
            "token": round(self.token),
            "cache": round(self.cache),
            "needed": round(self.needed),
            "steps": steps,
            "notes": self.notes,
            "estimates": [self._estimates(device) for device in DEVICES],
        }

    def _estimates(self, device: Device) -> dict[str, Any]:
        estimates = {name: Estimate.of(costs, device) for name, costs in self.steps.items()}
        return {
            "device": device.name,
            "fits": self.fits(device),
            "source": device.source,
            **{
                name: {**dataclasses.asdict(each), "seconds": each.seconds, "bound": each.bound}
                for name, each in estimates.items()
            },
        }

    def to_json(self) -> str:
        """Returns `to_dict` as JSON."""
        return json.dumps(self.to_dict()) + "\n"

    def _table(self) -> Table:
        columns = [Column("device"), Column("memory", right=True)]
        for name in self.steps:
            columns += [Column(name, right=True), Column("tokens/s", right=True), Column("bound")]
        return Table(tuple(columns), [self._line(device) for device in DEVICES])

    def _line(self, device: Device) -> list[str]:
        cells = [device.name, f"{self.needed / device.memory:.0%} of {device.memory / 1e9:.0f} GB"]
        for name, costs in self.steps.items():
            if not self.fits(device):
                cells += ["–", "–", ""]
                continue
            estimate = Estimate.of(costs, device)
            tokens = self.batch * (1 if name == "decode" else self.context)
            cells += [human_seconds(estimate.seconds), f"{tokens / estimate.seconds:,.0f}", estimate.bound]
        return cells

    def _legend(self, columns: Collection[str]) -> list[str]:
        too_small = any(not self.fits(device) for device in DEVICES)
        bounds = "bound: what takes longest, reading memory, computing, or sending over links"
        return [f"{bounds}{'; –: it does not fit' if too_small else ''}"]

    def _notes(self) -> list[str]:
        axes = ", ".join(f"{name}={size}" for name, size in self.mesh.items())
        lines = [
            f"mesh {axes}: {count(self.devices, 'device')}, {self.sharding}; "
            f"{count(self.batch, 'row')} of {self.context} tokens",
            f"each device needs {_bytes(self.needed)}: parameters {_bytes(self.parameters)}"
            + (f", KV cache {_bytes(self.cache)} ({_bytes(self.token)} a token of a row)" if self.cache else "")
            + self._gathered(),
        ]
        for name, costs in self.steps.items():
            kinds = [
                f"{number} {kind}{'' if number == 1 else 's'} {_bytes(sent)}"
                for kind, (number, sent) in costs.by_kind().items()
            ]
            sends = f"sends {_bytes(costs.sent)}" + (f" ({', '.join(kinds)})" if kinds else "")
            operations = human_operations(costs.wide + costs.fp8)
            lines.append(f"{name}: each device {sends}, reads {_bytes(costs.read)}, multiplies {operations}")
        far = [device for device in DEVICES if device.together < self.devices and self.fits(device)]
        if far:
            places = ", ".join(f"{device.name} {device.together}" for device in far)
            lines.append(
                f"{self.devices} devices are more than NVLink or ICI connect ({places}): the network between them is "
                "slower than the estimate has it."
            )
        return [*lines, _ASSUMPTIONS, *self.notes]

    def _gathered(self) -> str:
        gathered = max(costs.gathered for costs in self.steps.values())
        return f", a gathered kernel {_bytes(gathered)}" if gathered else ""


def mesh_plan(
    resolved: Resolved, plan: Plan, config: DecoderConfig, layout: ModelSharding, name: str, batch: int, context: int
) -> MeshPlan:
    """The MeshPlan of a model.

    resolved       the policy, resolved on the model's parameters
    plan           its plan with the layout's shardings
    name           of the layout
    batch          rows
    context        see `MeshPlan`

    Raises:
      InvalidSharding: see `shardings`.
    """
    assert plan.device_bytes is not None
    steps = {"prefill": step_costs(config, layout, resolved, rows=batch, new=context)}
    if config.task == "causal_lm":
        steps = {"decode": step_costs(config, layout, resolved, rows=batch, new=1, past=context), **steps}
    parts = layout.devices(layout.batch)
    rows = batch // parts if batch % parts == 0 else batch
    token = steps["prefill"].token
    return MeshPlan(
        dict(layout.mesh.shape), name, batch, context, plan.device_bytes, token, token * rows * (context + 1), steps,
        tuple(_notes_on(config, layout, resolved, batch)),
    )  # fmt: skip


def _notes_on(config: DecoderConfig, layout: ModelSharding, resolved: Resolved, batch: int) -> Iterator[str]:
    """The assumptions that concern a model and its layout."""
    divided, parts = layout.divided(config.axis_sizes), layout.devices(layout.batch)
    if batch % parts:
        yield f"{count(batch, 'row')} cannot be divided evenly among {parts} devices: each has all."
    if "heads" in divided and "kv_heads" in layout.axes.keys() - divided.keys():
        heads, devices = config.num_key_value_heads, layout.devices(divided["heads"])
        yield _SHARED_HEADS.format(heads, devices // heads) if devices % heads == 0 else _HEADS.format(heads, devices)
    if config.experts_per_token:
        yield _ROUTING
    if resolved.activations is None or resolved.activations.itemsize == 4:
        yield _FLOAT32


def human_seconds(seconds: float) -> str:
    """A time with three digits and a unit, such as 1.23 ms.

    >>> human_seconds(0.00123), human_seconds(12.3)
    ('1.23 ms', '12.3 s')
    """
    factor, unit = next(
        ((factor, unit) for factor, unit in ((1, "s"), (1e3, "ms")) if seconds * factor >= 1), (1e6, "µs")
    )
    value = seconds * factor
    return f"{value:.{max(0, 2 - max(0, math.floor(math.log10(value)) if value else 0))}f} {unit}"


def human_operations(number: float) -> str:
    """A number of operations with three digits and a unit, such as 1.23 TFLOP.

    >>> human_operations(1.234e12), human_operations(7e9)
    ('1.23 TFLOP', '7 GFLOP')
    """
    factor, unit = next(((f, unit) for f, unit in ((1e15, "P"), (1e12, "T")) if number >= f), (1e9, "G"))
    return f"{number / factor:.3g} {unit}FLOP"


def _bytes(size: float) -> str:
    return human_bytes(round(size))
