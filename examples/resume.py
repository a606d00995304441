"""Trains FP8 kernels under a policy and saves the whole training state with Orbax; a killed run continues where it was.

    python -m perparam.examples.resume --folder FOLDER [--steps 40] [--every 5] [--devices 1]

The state has FP8 kernels with their scales, bfloat16 and float32 parameters, float32 masters, 8-bit moments, a loss
scale and the position in the data. If the process is killed, run the command again: it continues from the last complete
checkpoint in FOLDER, and on a CPU each later loss has the same bits as without the interruption.

Use Orbax to resume a run, and `perparam.save_model` to publish its model.
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
from flax import nnx
from jax.sharding import AxisType

import perparam
from perparam.examples.finetune import cross_entropy
from perparam.examples.make_checkpoint import make_checkpoint
from perparam.training import DynamicLossScale, value_and_grad, with_loss_scale, with_policy

POLICY = perparam.Policy(
    params={"kernel": "f8_e4m3fn", "**/*norm/scale": "f32", "default": "bf16"},
    compute={"kernel": None, "default": "bf16"},
    output="f32",
    master="f32",
    # Moments of kernels in 8 bits; those of other parameters in float32, as Adam has them.
    opt_state={"{mu,nu}/**/kernel": "dynamic8", "mu/**/embedding": "bf16", "default": "f32"},
)
OPTIMIZER = with_loss_scale(
    with_policy(optax.adamw(optax.warmup_cosine_decay_schedule(0, 1e-2, 10, 1000)), POLICY, rounding="stochastic"),
    DynamicLossScale(2.0**15, period=6),  # changes every few steps here, and so has to be in the checkpoint
)
"""The transformation whose state is saved; random numbers of stochastic rounding follow from its step count."""

State = dict[str, Any]
"""`{"parameters", "optimizer", "position"}`: every array of a run; the position is that of the next batch."""


def begin(devices: int = 1) -> tuple[nnx.GraphDef, State]:
    """`(graphdef, state)` of a small FP8 checkpoint, over a mesh of `devices` devices, before the first step."""
    mesh = jax.make_mesh((devices,), ("tensor",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    with tempfile.TemporaryDirectory() as work:
        checkpoint = make_checkpoint(pathlib.Path(work) / "checkpoint", "tiny")
        model = perparam.load_model(checkpoint, POLICY, sharding=mesh, progress=False)
    graphdef, variables = nnx.split(model)
    parameters = nnx.to_pure_dict(variables)
    return graphdef, {"parameters": parameters, "optimizer": OPTIMIZER.init(parameters), "position": jnp.int32(0)}


def batch(position: int, vocabulary: int = 1024, rows: int = 4, length: int = 16) -> np.ndarray:
    """Token ids (rows, length) of one step: a function of the position alone, so that a resumed run sees the same."""
    first = np.random.default_rng((0, position)).integers(0, vocabulary, (rows, 1))
    return (first + 7 * np.arange(length)) % vocabulary


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def step(graphdef: nnx.GraphDef, state: State, tokens: jax.Array) -> tuple[State, jax.Array, jax.Array]:
    """`(state, loss, loss scale)` after one step."""
    loss_scale = state["optimizer"].loss_scale

    def scaled_loss(parameters: Any) -> tuple[jax.Array, jax.Array]:
        loss = cross_entropy(nnx.merge(graphdef, nnx.State(parameters))(tokens), tokens)
        return loss_scale.scale(loss), loss

    (_, loss), gradients = value_and_grad(scaled_loss, has_aux=True)(state["parameters"])
    updates, optimizer = OPTIMIZER.update(gradients, state["optimizer"], state["parameters"])
    parameters = optax.apply_updates(state["parameters"], updates)
    return (
        {"parameters": parameters, "optimizer": optimizer, "position": state["position"] + 1},
        loss,
        loss_scale.loss_scale,
    )


def checkpoints(folder: str | os.PathLike[str]) -> orbax.checkpoint.CheckpointManager:
    """The last two checkpoints in a folder, of which Orbax lists only complete ones."""
    options = orbax.checkpoint.CheckpointManagerOptions(
        max_to_keep=2,
        # A save ends before the next step, which overwrites the arrays in place: on a CPU Orbax would write from them.
        enable_async_checkpointing=False,
        cleanup_tmp_directories=True,  # those of saves that were killed
    )
    return orbax.checkpoint.CheckpointManager(pathlib.Path(folder).absolute(), options=options)


def save(manager: orbax.checkpoint.CheckpointManager, state: State) -> None:
    """Writes the state as the checkpoint of its position."""
    manager.save(int(state["position"]), args=orbax.checkpoint.args.StandardSave(state))


def restore(manager: orbax.checkpoint.CheckpointManager, like: State) -> State:
    """The state of the last complete checkpoint, with the dtypes and shardings of `like`; `like` if there is none."""
    position = manager.latest_step()
    if position is None:
        return like
    abstract = jax.tree.map(orbax.checkpoint.utils.to_shape_dtype_struct, like)
    return manager.restore(position, args=orbax.checkpoint.args.StandardRestore(abstract))


def train(folder: str | os.PathLike[str], steps: int, every: int, devices: int = 1) -> None:
    """Trains up to `steps` batches, saves after each `every` of them, and prints each loss with its exact value."""
    graphdef, state = begin(devices)
    with checkpoints(folder) as manager:
        state = restore(manager, state)
        print(f"starts at batch {int(state['position'])}", flush=True)
        for position in range(int(state["position"]), steps):
            state, loss, scale = step(graphdef, state, batch(position))
            print(f"batch {position}: loss {loss:.6f} = {float(loss).hex()}, loss scale {scale:g}", flush=True)
            if (position + 1) % every == 0:
                save(manager, state)
        print(f"ends at batch {steps}", flush=True)


def main() -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="folder of the checkpoints")
    parser.add_argument("--steps", type=int, default=40, help="number of batches in all")
    parser.add_argument("--every", type=int, default=5, help="batches between two checkpoints")
    parser.add_argument("--devices", type=int, default=1, help="devices that share the model")
    arguments = parser.parse_args()
    train(arguments.folder, arguments.steps, arguments.every, arguments.devices)


if __name__ == "__main__":
    main()
