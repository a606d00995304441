"""Saves and restores training state under a policy with Orbax: the dtypes, bits and shardings stay the same.

    python -m perparam.examples.orbax_checkpoint

Use Orbax to resume a training run: it keeps all dtypes and shardings, those of optimizer state included.
Use `perparam.save_model` to publish a model.
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
    """`(model, state)`: FP8 kernels, everything else float32, on `devices` devices; the arrays of model and Adam."""
    mesh = jax.make_mesh((devices,), ("tensor",), axis_types=(AxisType.Auto,))
    model = perparam.load_model(folder, POLICY, sharding=mesh)
    moments = optax.adam(1e-3).init(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return model, {"model": nnx.to_pure_dict(nnx.state(model)), "optimizer": moments}


def save(state: dict, folder: str | os.PathLike[str]) -> None:
    """Writes a tree of arrays into a new folder."""
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(pathlib.Path(folder).absolute(), state)


def restore(like: dict, folder: str | os.PathLike[str]) -> dict:
    """The tree that `save` wrote; each array has the dtype and the sharding of the one in `like`."""
    abstract = jax.tree.map(orbax.checkpoint.utils.to_shape_dtype_struct, like)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(pathlib.Path(folder).absolute(), abstract)


def with_state(model: perparam.models.Decoder, state: dict) -> perparam.models.Decoder:
    """A copy of `model` with the arrays of a restored state."""
    graphdef, variables = nnx.split(model)
    nnx.replace_by_pure_dict(variables, state["model"])
    return nnx.merge(graphdef, variables)


def main() -> None:
    """Saves and restores a state, and prints whether the two are equal."""
    with tempfile.TemporaryDirectory() as work:
        model, state = training_state(make_checkpoint(pathlib.Path(work) / "checkpoint"), jax.device_count())
        save(state, pathlib.Path(work) / "step-0")
        restored = restore(state, pathlib.Path(work) / "step-0")
        pairs = list(zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True))
        same = all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
        placed = all(a.dtype == b.dtype and a.sharding == b.sharding for a, b in pairs)
        tokens = np.arange(1, 9)[None]
        logits, restored_logits = model(tokens), with_state(model, restored)(tokens)
        dtypes = sorted({str(a.dtype) for a, _ in pairs})
        print(f"{len(pairs)} arrays ({', '.join(dtypes)}) on {jax.device_count()} devices")
        print(
            f"bits equal: {same}; dtypes and shardings equal: {placed}; "
            f"logits equal: {bool((logits == restored_logits).all())}"
        )


if __name__ == "__main__":
    main()
