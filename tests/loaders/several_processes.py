"""A program for several processes: a model that they share is loaded, run and saved. Run by test_several_processes.py.

Each process prints lines of JSON, `[name, value]`. The reference is the whole model, which each process loads as well.
"""

import errno
import io
import json
import os
import pathlib
import sys
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import perparam
from perparam.loaders import together
from perparam.loaders.safetensors import reader
from perparam.models import expert_parallel, fsdp, tensor_parallel
from perparam.policies.errors import PerparamError

IDS = np.arange(16).reshape(2, 8)
MASK = IDS != 0
F32 = {"compute": "f32"}


class Counted(io.FileIO):
    """A file that notes what is read from it."""

    ranges: list = []  # noqa: RUF012

    def readinto(self, buffer):
        start = self.tell()
        count = super().readinto(buffer)
        Counted.ranges.append((pathlib.Path(self.name).name, start, count))
        return count


def counting_open(path, mode="rb", buffering=-1):
    return Counted(path) if buffering == 0 else open(path, mode, buffering)


def bytes_read(folder, policy, sharding):
    """`(model, {tensor: [[start, stop], …]})`: the ranges of each tensor's data that loading reads, merged."""
    reader.open, Counted.ranges = counting_open, []
    model = perparam.load_model(folder, policy, sharding=sharding)
    del reader.open
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in reader.read_header(path).items():
            ranges = found[name] = []
            for file, start, count in sorted(Counted.ranges):
                start -= tensor.offset
                if file == path.name and 0 <= start < tensor.bytes:
                    assert not ranges or start >= ranges[-1][1], f"{name} is read twice"
                    if ranges and start == ranges[-1][1]:
                        ranges[-1][1] = start + count
                    else:
                        ranges.append([start, start + count])
    return model, found


def tell(name, value):
    print(json.dumps([name, value]), flush=True)


def compare(name, whole, model):
    """Tells how far the logits and tokens of a shared model are from those of the whole one."""
    graphdef, state = nnx.split(model)
    logits = jax.jit(lambda state: nnx.merge(graphdef, state)(IDS), out_shardings=NamedSharding(MESH, P()))(state)
    found, wanted = (np.asarray(x).astype(np.float64) for x in (logits, jax.jit(whole.__call__)(IDS)))
    tokens = [np.asarray(perparam.generate(each, IDS, MASK, 8, eos_token_id=())).tolist() for each in (whole, model)]
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    tell(f"{name}: error, tokens", [error, tokens[0] == tokens[1]])


def refused(name, call):
    """Tells the class and the text of the error that a call raises."""
    try:
        call()
        tell(name, None)
    except PerparamError as error:
        tell(name, [type(error).__name__, str(error)])


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save_both(work, name, whole, model, *arguments, **settings):
    """Saves the shared model, and in process 0 the whole one, for comparison."""
    perparam.save_model(model, work / f"saved {name}", *arguments, **settings)
    if FIRST:
        perparam.save_model(whole, work / f"alone {name}", *arguments, **settings)


def dense(work):
    model, ranges = bytes_read(work / "dense", F32, MESH)
    tell("dense: ranges", ranges)
    tell("dequantised: ranges", bytes_read(work / "dense", "bf16", MESH)[1])
    whole = perparam.load_model(work / "dense", F32)
    compare("dense", whole, model)
    save_both(work, "dense", whole, model)
    save_both(work, "bf16", whole, model, "bf16", max_shard_size="1MB")


def failures(work):
    """Before anything is compiled: what fails leaves the folder as it was."""
    target, pwrite = work / "saved tree", os.pwrite
    before = sorted((path.name, path.read_bytes()) for path in target.iterdir())
    rows = NamedSharding(MESH, P("model"))
    tree = {"rows": jax.make_array_from_callback((8, 8), rows, np.ones((8, 8), np.float32).__getitem__)}
    if LAST:
        os.pwrite = no_space
    refused("a full disk", lambda: perparam.save_params(tree, target))
    os.pwrite = pwrite
    together._VISIBLE_WITHIN = 0.3
    other = work / "elsewhere" / "saved" if LAST else target
    refused("another folder", lambda: perparam.save_params(tree, other))
    refused("foreign", lambda: perparam.save_params(tree, work))
    tell("unchanged", before == sorted((path.name, path.read_bytes()) for path in target.iterdir()))
    tell("left", sorted(path.name for path in work.iterdir() if path.name.startswith(".")))
    refused("convert", lambda: perparam.convert_checkpoint(work / "experts", work / "converted"))


def experts(work):
    model, ranges = bytes_read(work / "experts", F32, expert_parallel(MESH))
    tell("experts: ranges", ranges)
    save_both(work, "experts", perparam.load_model(work / "experts", F32), model)


def more(work):
    """What takes longer."""
    whole = perparam.load_model(work / "dense", F32)
    model = perparam.load_model(work / "dense", F32, sharding=fsdp(MESH))
    compare("fsdp", whole, model)
    tell("audit", [perparam.audit(each, "bf16", IDS).logit_error for each in (whole, model)])
    blocks = {"params": {"kernel": "f8_e4m3fn"}, "block": (64, 64)}
    save_both(work, "other blocks", whole, model, blocks, max_shard_size="1MB")
    whole = perparam.load_model(work / "experts", F32)
    for name, preset in {"experts": expert_parallel, "experts, cut": tensor_parallel}.items():
        model = perparam.load_model(work / "experts", F32, sharding=preset(MESH))
        compare(name, whole, model)
        save_both(work, name, whole, model)


def tree(work):
    """Arrays without a model: NaN, three axes, a cut along each; some of them on this process alone."""
    bits = np.arange(2**8, dtype=np.uint8).repeat(2).reshape(8, 8, 8)
    arrays = {
        "narrow/kernel": (bits.view(ml_dtypes.float8_e5m2)[0], P("model")),
        "narrow/scale_inv": (np.ones((1, 1), np.float32), P()),
        "rows": (np.arange(64, dtype=np.int32).reshape(8, 8), P("model")),
        "middle": (bits, P(None, "model")),
        "columns": (bits.view(np.uint16).view(ml_dtypes.bfloat16), P(None, None, "model")),
        "vector": (np.arange(8, dtype=np.float32), P("model")),
        "scalar": (np.float32(3), P()),
    }
    placed = {
        path: jax.make_array_from_callback(
            np.shape(array), NamedSharding(MESH, spec), lambda i, a=array: np.asarray(a)[i]
        )
        for path, (array, spec) in arrays.items()
    } | {"local": jnp.arange(5.0), "host": np.arange(3)}
    perparam.save_params(placed, work / "saved tree")
    if FIRST:
        whole = {path: array for path, (array, _) in arrays.items()} | {"local": jnp.arange(5.0), "host": np.arange(3)}
        perparam.save_params(whole, work / "alone tree")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "blocks of .* do not divide the sides")
    process, count = int(os.environ["PROCESS"]), int(os.environ["PROCESSES"])
    jax.distributed.initialize(os.environ["COORDINATOR"], count, process)
    FIRST, LAST = process == 0, process == count - 1
    MESH = jax.make_mesh((jax.device_count(),), ("model",))
    for part in sys.argv[2:]:
        globals()[part](pathlib.Path(sys.argv[1]))
