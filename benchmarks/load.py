"""Loading and saving on a CPU beside reading and writing the same bytes: time, and memory beyond the model.

    python benchmarks/load.py [--gigabytes 2] [--folder FOLDER] [--rounds 5] [--transformers PYTHON]
        [--only NAMES] [--out FOLDER]

A Qwen3 of about so many gigabytes in FP8, blocks of 128 and shards of at most 1 GB, and the same shapes in bfloat16,
with random weights; made once in FOLDER and used again, or in a temporary folder.  Each contender runs in a process of
its own, in every round once, in shuffled order, over files that were read just before.  Timed is the work alone: Python
has started, its imports are done, and JAX's backend has computed something.  Ratios are taken within a round.  It takes
five times as much room on the disk as `--gigabytes`, and in memory, where it is to be measured and not the disk.

    read         every file into fresh memory that stays allocated, as a model's does: what the others are held against
    written      the bytes of the FP8 checkpoint, from memory, then fsync: what `saved` is held against
    touched      one byte of every page of every parameter is read within the time, since transformers maps files and
                 may leave the reading to whoever needs the values; for both, so that they can be compared
    beyond       the most that was resident meanwhile, without what was before, and without the model's own arrays.
                 Mapped pages of files count while they are mapped, though the system could take them back
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
"""From how many gigabytes on; hidden and intermediate size, heads and words of the vocabulary."""

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
"""The checkpoint that each starts from, and the contender that its time is divided by."""

REQUANTISED = {"params": {"lm_head/kernel?": None, "kernel": "f8_e4m3fn"}, "block": (64, 64)}
POLICIES = {"dequantised": "bf16", "quantised": "fp8_weight_only", "requantised": REQUANTISED}


def make(folder: pathlib.Path, gigabytes: float) -> dict[str, pathlib.Path]:
    """The folders of the FP8 and the bfloat16 checkpoint of that size, made where they are not there yet."""
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
        if not (path / INDEX).is_file():  # written last
            write_checkpoint(path, fields | ({"quantization_config": blocks} if kind == "fp8" else {}))
    return folders


def write_checkpoint(folder: pathlib.Path, fields: dict[str, Any]) -> None:
    """A checkpoint with that config.json and random weights, in three shards or more, a slab of bytes at a time."""
    from perparam.loaders.families import family_of, read_config

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
    config = read_config(folder / "config.json")
    for name, (_, shape) in family_of(config).tensors(config).items():
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
    """`count` random bytes of finite numbers: any e4m3, bfloat16 about ±2**-6, scales about 2**-10."""
    if dtype == "F8_E4M3":
        codes = np.frombuffer(rng.bytes(count), np.uint8)
        return (codes - ((codes & 0x7F) == 0x7F)).tobytes()
    words = np.frombuffer(rng.bytes(count), np.uint16)
    return ((words & 0x00FF) | 0x3A00 if name.endswith("_scale_inv") else (words & 0x80FF) | 0x3C00).tobytes()


def largest(folder: pathlib.Path) -> int:
    """Bytes of the largest parameter in bfloat16."""
    fields = json.loads((folder / "config.json").read_text())
    return 2 * fields["hidden_size"] * max(fields["vocab_size"], fields["intermediate_size"])


def work(name: str, folder: pathlib.Path, out: pathlib.Path) -> dict[str, Any]:
    """What a contender took: seconds, bytes of the model that it leaves and the most that was resident beyond it."""
    run = prepare(name, folder, out)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    # What a host has taken from an idle virtual machine takes seconds to come back, from whoever asks first.
    np.empty(size * (2 if "dequantised" in name else 1), np.uint8)[::PAGE] = 1
    gc.collect()
    with contextlib.suppress(OSError):  # so that the peak is that of the work, not of what came before
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    before, fetched = status("VmRSS"), status("read_bytes", "io")
    start = time.perf_counter()
    held = run()
    if name.endswith("touched"):
        for array in held:
            array.reshape(-1)[::PAGE].sum()
    seconds = time.perf_counter() - start
    model = sum(array.nbytes for array in held)
    # Not ru_maxrss, which begins with the peak of the process that started this one.
    beyond = status("VmHWM") - before - model
    return {"seconds": seconds, "model": model, "beyond": beyond, "from disk": status("read_bytes", "io") - fetched}


def prepare(name: str, folder: pathlib.Path, out: pathlib.Path) -> Callable[[], list[np.ndarray]]:
    """The work of a contender, which returns the memory of what it leaves; all that comes before it is done."""
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

    def held(arrays: Any) -> list[np.ndarray]:
        shards = [shard.data for array in jax.tree.leaves(arrays) for shard in array.addressable_shards]
        return [np.asarray(shard).view(np.uint8) for shard in shards if shard.ndim]  # the arrays' own memory

    if name == "converted":
        return lambda: loaders.convert_checkpoint(folder, out / name, POLICIES["quantised"]) and []
    if name == "saved":
        model = loaders.load_model(folder)
        return lambda: loaders.save_model(model, out / name) and []
    if name.endswith("load_params"):
        return lambda: held(loaders.load_params(folder))
    policy = POLICIES.get(name.removesuffix(", touched"))
    mesh = jax.make_mesh((DEVICES,), ("t",), axis_types=(jax.sharding.AxisType.Auto,)) if name == "sharded" else None
    return lambda: held(nnx.state(loaders.load_model(folder, policy, sharding=mesh)))


def with_transformers(name: str, folder: pathlib.Path) -> Callable[[], list[np.ndarray]]:
    """The same for `AutoModelForCausalLM.from_pretrained`."""
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
    """Writes the files and waits for the disk; what is left in memory was there before."""
    for path, content in contents.items():
        with open(path, "wb", buffering=0) as file:
            content.tofile(file)
            os.fsync(file.fileno())
    return []


def status(field: str, of: str = "status") -> int:
    """A number that Linux has for this process: bytes."""
    text = pathlib.Path(f"/proc/self/{of}").read_text()
    number, *unit = text.partition(f"\n{field}:")[2].splitlines()[0].split()
    return int(number) * (1024 if unit else 1)


def measured(name: str, folder: pathlib.Path, python: str = sys.executable) -> dict[str, Any]:
    """What `work` returns in a process of its own, which may write beside `folder`; what it writes is removed."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    if name == "sharded":
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
        environment["XLA_FLAGS"] = flags.strip()
    for path in folder.glob("*.safetensors"):  # from now on in the page cache
        for start in range(0, path.stat().st_size, SLAB):
            np.fromfile(path, np.uint8, SLAB, offset=start)
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        command = [python, os.path.abspath(__file__), "--worker", name, os.fspath(folder), out]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{name}: exit {run.returncode}\n{run.stderr[-3000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def main() -> int:
    """Makes the checkpoints, runs the rounds and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--folder", type=pathlib.Path, help="where checkpoints are kept for the next time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transformers", metavar="PYTHON", help="a Python with torch, transformers and accelerate")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parser.add_argument("--only", metavar="NAMES", help="these contenders alone, separated by ';'")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work(arguments.worker[0], *map(pathlib.Path, arguments.worker[1:]))))
        return 0
    names = [name for name in CONTENDERS if arguments.transformers or not name.endswith("touched")]
    if arguments.only:
        asked = set(arguments.only.split(";"))
        asked |= {CONTENDERS[name][1] for name in asked}
        names = [name for name in names if name in asked]
    rounds, rng = list[dict[str, dict[str, Any]]](), random.Random(0)
    with contextlib.nullcontext(arguments.folder) if arguments.folder else tempfile.TemporaryDirectory() as folder:
        folders = make(pathlib.Path(folder), arguments.gigabytes)
        for _ in range(arguments.rounds):
            found = {}
            for name in rng.sample(names, len(names)):
                python = arguments.transformers if name.startswith("transformers") else sys.executable
                found[name] = measured(name, folders[CONTENDERS[name][0]], python)
            rounds.append(found)
            print({name: round(found[name]["seconds"], 3) for name in names}, flush=True)
        sizes = {kind: sum(file.stat().st_size for file in path.glob("*.safe*s")) for kind, path in folders.items()}
        report(rounds, sizes, largest(folders["fp8"]), arguments.out)
    return 0


def report(rounds: list[dict[str, dict[str, Any]]], sizes: dict[str, int], most: int, out: pathlib.Path) -> None:
    """Prints a table and writes all of it as JSON."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import timing
    from report import between

    promise, results = 2 * most + 200 * 10**6, {}
    print(f"\nLargest parameter {most / MIB:.0f} MiB; beyond the model at most {promise / MIB:.0f} MiB are promised.\n")
    print(f"{'':35}{'seconds':>24}{'MB/s of input':>15}{'beyond, MiB':>13}{'from disk':>11}  divided by")
    for name in sorted(rounds[0], key=list(CONTENDERS).index):
        kind, base = CONTENDERS[name]
        samples = {what: np.array([found[name][what] for found in rounds]) for what in rounds[0][name]}
        seconds, beyond, disk = (samples[what] for what in ("seconds", "beyond", "from disk"))
        ratio = None if base is None else timing.spread(seconds / [found[base]["seconds"] for found in rounds])
        results[name] = {
            **{"checkpoint": kind, "seconds": timing.spread(seconds), "divided by": base, "ratio": ratio},
            "bytes of input per second": timing.spread(sizes[kind] / seconds),
            "samples": {what: each.tolist() for what, each in samples.items()},
        }
        print(
            f"{name:35}{between(timing.spread(seconds)):>24}{sizes[kind] / np.median(seconds) / 1e6:>15.0f}"
            f"{beyond.max() / MIB:>12.0f}{'!' if beyond.max() > promise else ' '}{disk.max() / sizes[kind]:>11.0%}"
            f"  {f'{base}: {between(ratio)}' if ratio else ''}".rstrip()
        )
    content = timing.machine() | {"rounds": len(rounds), "bytes of checkpoints": sizes}
    content |= {"largest parameter": most, "promised beyond the model": promise, "results": results}
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"load-{sizes['fp8'] / 1e9:.0f}GB-{timing.slug(content['device'])}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    sys.exit(main())
