"""`perparam plan`: what a policy does to each parameter, and what a model needs on a mesh; from headers or a config."""

from __future__ import annotations

import argparse
import functools
import re
import sys
from typing import Any

from jax.sharding import AbstractMesh

from ..loaders import BareCheckpoint, Checkpoint, ConfigOnly, open_config, open_parameters
from ..loaders.from_config import config_file
from ..models import ModelSharding, expert_parallel, fsdp, fsdp_tensor_parallel, shardings, tensor_parallel
from ..models.sharding.roofline import MeshPlan, mesh_plan
from ..policies import SLOTS, get_policy
from ..policies.plan import Plan, plan
from ..policies.resolved import Resolved, resolve
from ..policies.tables import json_lines
from .options import OptionError, add_checkpoint, add_policy, add_table, print_report

SUMMARY = "Print the storage and compute format of each parameter; reads no weights."

_LAYOUTS = {each.__name__: each for each in (tensor_parallel, fsdp, fsdp_tensor_parallel, expert_parallel)}

_CONTEXT = 4096


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_checkpoint(parser, "; or a config.json")
    add_policy(parser)
    add_table(parser)
    parser.add_argument(
        "--bare", action="store_true", default=None, help="use the names in the files, not those of perparam's model"
    )
    parser.add_argument(
        "--target", metavar="TARGET", help="add the matmul implementations on a device: here, cpu, cuda, cuda:9.0, …"
    )
    mesh = parser.add_argument_group("a mesh of devices: adds bytes on each, collectives and an estimate of speed")
    mesh.add_argument("--mesh", metavar="AXES", help="names and sizes of its axes, such as data=2,model=8")
    mesh.add_argument("--sharding", choices=_LAYOUTS, help="how the model is divided; default: tensor_parallel")
    mesh.add_argument("--batch", metavar="N", type=_positive, help="rows; default: one for each part of the batch")
    mesh.add_argument(
        "--context",
        metavar="N",
        type=_positive,
        help=f"tokens of each row; default: {_CONTEXT}, or the model's longest",
    )


def run(options: argparse.Namespace) -> None:
    """Prints the plan."""
    if options.mesh is None and (
        given := [name for name in ("sharding", "batch", "context") if options.__dict__[name]]
    ):
        raise OptionError(f"--{given[0]}: needs a mesh. Add --mesh, such as --mesh data=2,model=8.")
    layout = None if options.mesh is None else _LAYOUTS[options.sharding or "tensor_parallel"](_mesh(options.mesh))
    checkpoint = _open(options)
    if layout is not None and isinstance(checkpoint, BareCheckpoint):
        raise OptionError(f"--mesh: needs a model, and there is none, since {checkpoint.reason}.")
    resolved = resolve(get_policy(options.policy), checkpoint.tree, slots=SLOTS)
    if layout is None or isinstance(checkpoint, BareCheckpoint):
        _print(plan(resolved, options.target), None, options)
    else:
        _print(*_sharded(checkpoint, resolved, layout, options), options)
    _print_notes(checkpoint, options)


def _open(options: argparse.Namespace) -> Checkpoint | BareCheckpoint | ConfigOnly:
    file = None if options.bare else config_file(options.checkpoint)
    if file is None:
        return open_parameters(options.checkpoint, revision=options.revision, weights=False, bare=options.bare)
    if options.revision is not None:
        raise OptionError(f"--revision: {file} is on this machine, and has no revision. Omit it.")
    return open_config(file)


def _sharded(
    checkpoint: Checkpoint | ConfigOnly, resolved: Resolved, layout: ModelSharding, options: argparse.Namespace
) -> tuple[Plan, MeshPlan]:
    """The plan with bytes on each device, and what the model needs there."""
    config = checkpoint.config
    table = plan(resolved, options.target, functools.partial(shardings, layout, config))
    batch = options.batch or layout.devices(layout.batch)
    context = options.context or min(_CONTEXT, config.max_position_embeddings)
    return table, mesh_plan(resolved, table, config, layout, options.sharding or "tensor_parallel", batch, context)


def _mesh(text: str) -> Any:
    """The `AbstractMesh` of a text such as data=2,model=8; `ModelSharding` is annotated for meshes of devices."""
    axes = [re.fullmatch(r"\s*([A-Za-z_]\w*)\s*=\s*([1-9]\d{0,8})\s*", part, re.ASCII) for part in text.split(",")]
    sizes = {axis[1]: int(axis[2]) for axis in axes if axis is not None}
    if None in axes or len(sizes) < len(axes):
        raise OptionError(f"--mesh: expected different names with their sizes, such as data=2,model=8, found {text!r}.")
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


def _positive(text: str) -> int:
    """The type of `--batch` and `--context`."""
    if not re.fullmatch(r"[1-9]\d{0,8}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"expected a positive number, found {text!r}")
    return int(text)


def _print(table: Plan, mesh: MeshPlan | None, options: argparse.Namespace) -> None:
    if mesh is None:
        print_report(table, options)
    elif options.json:
        print(json_lines((row.to_dict() for row in table), {**table.totals, "mesh": mesh.to_dict()}), end="")
    else:
        print_report(table, options)
        print()
        print_report(mesh, options)


def _print_notes(checkpoint: Checkpoint | BareCheckpoint | ConfigOnly, options: argparse.Namespace) -> None:
    """Prints where paths and formats are from, and which tensors are not read; with `--json` on stderr, or not."""
    stream = sys.stderr if options.json else None
    if isinstance(checkpoint, BareCheckpoint):
        print(f"The paths are the names in the files, since {checkpoint.reason}.", file=stream)
    elif isinstance(checkpoint, ConfigOnly):
        print("Shapes and formats are those that config.json implies; no headers were read.", file=stream)
    elif not options.json:
        print_left_out(checkpoint)


def print_left_out(checkpoint: Checkpoint) -> None:
    """Prints which tensors of a checkpoint are not read, and why."""
    for reason in dict.fromkeys(checkpoint.left_out.values()):
        names = [name for name, each in checkpoint.left_out.items() if each == reason]
        print(f"left out: {', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}, since {reason}")
