"""Training state under a policy, saved with Orbax and restored: the same dtypes, the same bits, on the same devices.

    python -m perparam.examples.orbax_checkpoint

Orbax is for going on with a training: it keeps whatever dtypes and shardings arrays have, optimizer state included.
For handing a model to others there is `perparam.save_model`.
"""

from __future__ import annotations

import os
import pathlib
import tempfile

import jax
import numpy as np
import optax
import orbax.checkpoint
from flax import nnx
from jax.sharding import AxisType

import perparam
from perparam.examples.make_checkpoint import make_checkpoint

POLICY = perparam.Policy(params={"kernel": None, "default": "f32"}, compute={"kernel": None, "default": "bf16"})


def training_state(folder: str | os.PathLike[str], devices: int = 1) -> tuple[perparam.models.Decoder, dict]:
    """A model over `devices` devices, kernels in FP8 and the rest float32; its arrays and Adam's as a plain tree."""
    mesh = jax.make_mesh((devices,), ("tensor",), axis_types=(AxisType.Auto,))
    model = perparam.load_model(folder, POLICY, sharding=mesh)
    moments = optax.adam(1e-3).init(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return model, {"model": nnx.to_pure_dict(nnx.state(model)), "optimizer": moments}


def save(state: dict, folder: str | os.PathLike[str]) -> None:
    """Writes a tree of arrays into a new folder."""
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(pathlib.Path(folder).absolute(), state)


def restore(like: dict, folder: str | os.PathLike[str]) -> dict:
    """The tree that `save` wrote, each array with the dtype and on the devices that the one in `like` has."""
    abstract = jax.tree.map(orbax.checkpoint.utils.to_shape_dtype_struct, like)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(pathlib.Path(folder).absolute(), abstract)


def with_state(model: perparam.models.Decoder, state: dict) -> perparam.models.Decoder:
    """`model` with the arrays of a restored state."""
    graphdef, variables = nnx.split(model)
    nnx.replace_by_pure_dict(variables, state["model"])
    return nnx.merge(graphdef, variables)


def main() -> None:
    """Saves and restores a state, and prints what came back."""
    with tempfile.TemporaryDirectory() as work:
        model, state = training_state(make_checkpoint(pathlib.Path(work) / "checkpoint"), jax.device_count())
        save(state, pathlib.Path(work) / "step-0")
        restored = restore(state, pathlib.Path(work) / "step-0")
        pairs = list(zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True))
        same = all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
        placed = all(a.dtype == b.dtype and a.sharding == b.sharding for a, b in pairs)
        tokens = np.arange(1, 9)[None]
        logits, again = model(tokens), with_state(model, restored)(tokens)
        dtypes = sorted({str(a.dtype) for a, _ in pairs})
        print(f"{len(pairs)} arrays ({', '.join(dtypes)}) on {jax.device_count()} devices")
        print(
            f"bits equal: {same}; dtypes and shardings equal: {placed}; logits equal: {bool((logits == again).all())}"
        )


if __name__ == "__main__":
    main()
