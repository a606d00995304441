"""Measures time and memory of loading and saving on a CPU, relative to reading and writing the same bytes.

    python benchmarks/load.py [--gigabytes 2] [--folder FOLDER] [--rounds 5] [--transformers PYTHON]
        [--only NAMES] [--out FOLDER]

The checkpoints are a Qwen3 with random weights of about `--gigabytes` in FP8, with blocks of 128 and shards of at most
1 GB, and one of the same shapes in bfloat16.  They are written to FOLDER, where later runs use them again, or to a
temporary folder.  Each contender runs once per round in its own process, in shuffled order, on files in the page cache.
The time does not include the start of Python, the imports and the start of JAX's backend.  Ratios are computed within a
round.  The script needs five times `--gigabytes` on the disk, and as much memory: otherwise it measures the disk.

    read         reads every file into new memory that stays allocated, like that of a model: the baseline of loading
    written      writes the bytes of the FP8 checkpoint from memory, then fsync: the baseline of `saved`
    touched      the time includes reading one byte of every page of every parameter, for perparam and transformers:
                 transformers maps files, which may postpone reading until the values are used
    beyond       peak of resident memory, minus that before the start, minus the arrays of the model.  It includes
                 mapped pages of files, although the system could free them
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

SLAB, SHARD, PAGE, MIB = 2**24, 10**9, 4096, 2**20
BLOCK, DEVICES = 128, 8
INDEX = "model.safetensors.index.json"
SIZES = ((1.0, 4096, 12288, 32, 32768), (0.0, 2048, 6144, 16, 8192))
"""Minimum of gigabytes, hidden size, intermediate size, number of heads, size of the vocabulary."""

CONTENDERS: dict[str, tuple[str, str | None]] = {
    "read fp8": ("fp8", None),
    "read bf16": ("bf16", None),
    "written": ("fp8", None),
    **dict.fromkeys(("kept", "kept, load_params", "dequantised", "requantised", "sharded"), ("fp8", "read fp8")),
    **dict.fromkeys(("quantised", "converted"), ("bf16", "read bf16")),
    "saved": ("fp8", "written"),
    "transformers kept, touched": ("bf16", None),
    "kept, touched": ("bf16", "transformers kept, touched"),
    "transformers dequantised, touched": ("fp8", None),
    "dequantised, touched": ("fp8", "transformers dequantised, touched"),
}
"""For each contender the checkpoint that it uses, and the contender by whose time its own is divided."""

REQUANTISED = {"params": {"lm_head/kernel?": None, "kernel": "f8_e4m3fn"}, "block": (64, 64)}
POLICIES = {"dequantised": "bf16", "quantised": "fp8_weight_only", "requantised": REQUANTISED}


def make(folder: pathlib.Path, gigabytes: float) -> dict[str, pathlib.Path]:
    """Returns the folders of the FP8 and the bfloat16 checkpoint, and writes the checkpoints if they do not exist."""
    _, hidden, wide, heads, words = next(size for size in SIZES if gigabytes >= size[0])
    layer = 2 * hidden * 128 * (heads + 8) + 3 * hidden * wide
    fields = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16", "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": wide, "num_attention_heads": heads, "num_key_value_heads": 8,
        "num_hidden_layers": max(1, round((gigabytes * 1e9 - 4 * hidden * words) / layer)), "head_dim": 128,
        "vocab_size": words, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": False, "attention_bias": False, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    blocks = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    folders = {kind: folder / f"{kind}-{gigabytes:g}GB" for kind in ("fp8", "bf16")}
    for kind, path in folders.items():
        if not (path / INDEX).is_file():  # the last file of a checkpoint that is written
            write_checkpoint(path, fields | ({"quantization_config": blocks} if kind == "fp8" else {}))
    return folders


def write_checkpoint(folder: pathlib.Path, fields: dict[str, Any]) -> None:
    """Writes a checkpoint with this config and random weights, in at least three shards, in chunks of SLAB bytes."""
    from perparam.loaders.families import family_of, read_config

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
    config = read_config(folder / "config.json")
    for name, (_, shape, _) in family_of(config).tensors(config).items():
        narrow = "quantization_config" in fields and name.endswith("_proj.weight")
        tensors[name] = ("F8_E4M3", shape, math.prod(shape)) if narrow else ("BF16", shape, 2 * math.prod(shape))
        if narrow:
            grid = tuple(math.ceil(side / BLOCK) for side in shape)
            tensors[f"{name}_scale_inv"] = ("BF16", grid, 2 * math.prod(grid))
    total, end = sum(size for *_, size in tensors.values()), 0
    shards: list[dict[str, dict[str, Any]]] = [{}]
    for name, (dtype, shape, size) in tensors.items():
        if end + size > min(SHARD, total / 2.5):
            shards.append({})
            end = 0
        shards[-1][name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end := end + size]}
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    rng = np.random.default_rng(0)
    for file, shard in zip(files, shards, strict=True):
        with open(folder / file, "wb") as stream:
            header = json.dumps({"__metadata__": {"format": "pt"}, **shard}).encode()
            stream.write(len(header).to_bytes(8, "little") + header)
            for name in shard:
                for start in range(0, tensors[name][2], SLAB):
                    stream.write(values(rng, name, tensors[name][0], min(SLAB, tensors[name][2] - start)))
            stream.flush()
            os.fsync(stream.fileno())
    places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))


def values(rng: np.random.Generator, name: str, dtype: str, count: int) -> bytes:
    """Returns `count` random bytes of finite numbers: any e4m3, bfloat16 around ±2**-6, scales around 2**-10."""
    if dtype == "F8_E4M3":
        codes = np.frombuffer(rng.bytes(count), np.uint8)
        return (codes - ((codes & 0x7F) == 0x7F)).tobytes()
    words = np.frombuffer(rng.bytes(count), np.uint16)
    return ((words & 0x00FF) | 0x3A00 if name.endswith("_scale_inv") else (words & 0x80FF) | 0x3C00).tobytes()


def largest(folder: pathlib.Path) -> int:
    """Returns the bytes of the largest parameter in bfloat16."""
    fields = json.loads((folder / "config.json").read_text())
    return 2 * fields["hidden_size"] * max(fields["vocab_size"], fields["intermediate_size"])


def work(name: str, folder: pathlib.Path, out: pathlib.Path) -> dict[str, Any]:
    """Runs a contender in this process.

    Returns seconds, bytes of the resulting model, peak bytes beyond the model, and bytes read from disk.
    """
    run = prepare(name, folder, out)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    # A host takes idle memory from a virtual machine, and the first allocation afterwards waits for seconds.
    np.empty(size * (2 if "dequantised" in name else 1), np.uint8)[::PAGE] = 1
    gc.collect()
    with contextlib.suppress(OSError):  # resets the peak of resident memory
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    resident, from_disk = status("VmRSS"), status("read_bytes", "io")
    start = time.perf_counter()
    arrays = run()
    if name.endswith("touched"):
        for array in arrays:
            array.reshape(-1)[::PAGE].sum()
    seconds = time.perf_counter() - start
    model = sum(array.nbytes for array in arrays)
    # Not ru_maxrss, which starts with the peak of the parent process.
    beyond = status("VmHWM") - resident - model
    return {"seconds": seconds, "model": model, "beyond": beyond, "from disk": status("read_bytes", "io") - from_disk}


def prepare(name: str, folder: pathlib.Path, out: pathlib.Path) -> Callable[[], list[np.ndarray]]:
    """Prepares a contender, and returns the function to be timed, which returns the arrays of the resulting model."""
    files = sorted(folder.glob("*.safetensors"))
    if name.startswith("read"):
        return lambda: [np.fromfile(file, np.uint8) for file in files]
    if name == "written":
        contents = {out / file.name: np.fromfile(file, np.uint8) for file in files}
        return lambda: write(contents)
    if name.startswith("transformers"):
        return with_transformers(name, folder)
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from perparam import loaders

    (jnp.zeros(8) + 1).block_until_ready()

    def views(arrays: Any) -> list[np.ndarray]:
        shards = [shard.data for array in jax.tree.leaves(arrays) for shard in array.addressable_shards]
        return [np.asarray(shard).view(np.uint8) for shard in shards if shard.ndim]  # without a copy

    if name == "converted":
        return lambda: loaders.convert_checkpoint(folder, out / name, POLICIES["quantised"]) and []
    if name == "saved":
        model = loaders.load_model(folder)
        return lambda: loaders.save_model(model, out / name) and []
    if name.endswith("load_params"):
        return lambda: views(loaders.load_params(folder))
    policy = POLICIES.get(name.removesuffix(", touched"))
    mesh = jax.make_mesh((DEVICES,), ("t",), axis_types=(jax.sharding.AxisType.Auto,)) if name == "sharded" else None
    return lambda: views(nnx.state(loaders.load_model(folder, policy, sharding=mesh)))


def with_transformers(name: str, folder: pathlib.Path) -> Callable[[], list[np.ndarray]]:
    """Returns the function to be timed for `AutoModelForCausalLM.from_pretrained`."""
    import torch
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    torch.set_num_threads(os.cpu_count() or 1)
    changes = {} if "kept" in name else {"quantization_config": FineGrainedFP8Config(dequantize=True)}

    def run() -> list[np.ndarray]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **changes)
        tensors = [*model.parameters(), *model.buffers()]
        assert all(tensor.dtype == torch.bfloat16 for tensor in model.parameters())
        return [tensor.detach().contiguous().view(-1).view(torch.uint8).numpy() for tensor in tensors]

    return run


def write(contents: dict[pathlib.Path, np.ndarray]) -> list[np.ndarray]:
    """Writes files and waits for the disk; returns no arrays, since it allocates none."""
    for path, content in contents.items():
        with open(path, "wb", buffering=0) as file:
            content.tofile(file)
            os.fsync(file.fileno())
    return []


def status(field: str, of: str = "status") -> int:
    """Returns a number of bytes from a file of Linux about this process, `/proc/self/status` by default."""
    text = pathlib.Path(f"/proc/self/{of}").read_text()
    number, *unit = text.partition(f"\n{field}:")[2].splitlines()[0].split()
    return int(number) * (1024 if unit else 1)


def measure(name: str, folder: pathlib.Path, python: str = sys.executable) -> dict[str, Any]:
    """Runs `work` in a new process and returns its result; a temporary folder next to `folder` takes what it writes."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    if name == "sharded":
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
        environment["XLA_FLAGS"] = flags.strip()
    for path in folder.glob("*.safetensors"):  # reads the files into the page cache
        for start in range(0, path.stat().st_size, SLAB):
            np.fromfile(path, np.uint8, SLAB, offset=start)
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        command = [python, os.path.abspath(__file__), "--worker", name, os.fspath(folder), out]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{name}: exit {run.returncode}\n{run.stderr[-3000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def main() -> int:
    """Writes the checkpoints, runs the rounds and reports the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--folder", type=pathlib.Path, help="folder for checkpoints, which later runs use again")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transformers", metavar="PYTHON", help="a Python with torch, transformers and accelerate")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parser.add_argument("--only", metavar="NAMES", help="only these contenders, separated by ';', and their baselines")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work(arguments.worker[0], *map(pathlib.Path, arguments.worker[1:]))))
        return 0
    names = [name for name in CONTENDERS if arguments.transformers or not name.endswith("touched")]
    if arguments.only:
        selected = set(arguments.only.split(";"))
        selected |= {CONTENDERS[name][1] for name in selected}
        names = [name for name in names if name in selected]
    rounds, rng = list[dict[str, dict[str, Any]]](), random.Random(0)
    with contextlib.nullcontext(arguments.folder) if arguments.folder else tempfile.TemporaryDirectory() as folder:
        folders = make(pathlib.Path(folder), arguments.gigabytes)
        for _ in range(arguments.rounds):
            samples = {}
            for name in rng.sample(names, len(names)):
                python = arguments.transformers if name.startswith("transformers") else sys.executable
                samples[name] = measure(name, folders[CONTENDERS[name][0]], python)
            rounds.append(samples)
            print({name: round(samples[name]["seconds"], 3) for name in names}, flush=True)
        sizes = {kind: sum(file.stat().st_size for file in path.glob("*.safe*s")) for kind, path in folders.items()}
        report(rounds, sizes, largest(folders["fp8"]), arguments.out)
    return 0


def report(rounds: list[dict[str, dict[str, Any]]], sizes: dict[str, int], largest: int, out: pathlib.Path) -> None:
    """Prints the results as a table and writes them as JSON.

    rounds   for each round the result of `work` by contender
    sizes    bytes of the checkpoints by kind
    largest  bytes of the largest parameter, from which the limit of memory beyond the model follows
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    import timing
    from report import between

    limit, results = 2 * largest + 200 * 10**6, {}
    print(f"\nLargest parameter {largest / MIB:.0f} MiB; limit of memory beyond the model {limit / MIB:.0f} MiB.\n")
    print(f"{'':35}{'seconds':>24}{'MB/s of input':>15}{'beyond, MiB':>13}{'from disk':>11}  divided by")
    for name in sorted(rounds[0], key=list(CONTENDERS).index):
        kind, base = CONTENDERS[name]
        samples = {what: np.array([one_round[name][what] for one_round in rounds]) for what in rounds[0][name]}
        seconds, beyond, disk = (samples[what] for what in ("seconds", "beyond", "from disk"))
        ratio = None if base is None else timing.spread(seconds / [one_round[base]["seconds"] for one_round in rounds])
        results[name] = {
            **{"checkpoint": kind, "seconds": timing.spread(seconds), "divided by": base, "ratio": ratio},
            "bytes of input per second": timing.spread(sizes[kind] / seconds),
            "samples": {what: values.tolist() for what, values in samples.items()},
        }
        print(
            f"{name:35}{between(timing.spread(seconds)):>24}{sizes[kind] / np.median(seconds) / 1e6:>15.0f}"
            f"{beyond.max() / MIB:>12.0f}{'!' if beyond.max() > limit else ' '}{disk.max() / sizes[kind]:>11.0%}"
            f"  {f'{base}: {between(ratio)}' if ratio else ''}".rstrip()
        )
    content = timing.machine() | {"rounds": len(rounds), "bytes of checkpoints": sizes}
    content |= {"largest parameter": largest, "promised beyond the model": limit, "results": results}
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"load-{sizes['fp8'] / 1e9:.0f}GB-{timing.slug(content['device'])}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    sys.exit(main())
