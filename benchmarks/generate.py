"""Measures the speed of prefill and decoding of whole models, and their memory.

    python benchmarks/generate.py beside [MODEL] [--transformers PYTHON] [--llama PYTHON] [--batches 1,8] [--rounds 5]
    python benchmarks/generate.py device [MODEL ...] [--batches 1,8,64] [--rounds 5]

`beside` compares perparam with transformers and llama.cpp on a CPU, with a model of Qwen3-0.6B's shape, or without
llama.cpp with a mixture of experts ("30B-A3B scaled down", see `random_checkpoints.py`).  perparam and
transformers load the same FP8 checkpoint with random weights from a temporary folder.  perparam stores the weights in
FP8; one contender has no policy and exact products, the other rounds weights to bfloat16 in products.  transformers has
no FP8 matmul for CPUs and dequantises the weights to bfloat16.  llama.cpp has a model of its own in Q8_0.  Each
contender runs in its own process, with as many threads as there are cores; others run in the Pythons of
`--transformers` and `--llama`.  In each round every contender runs once, so that changes in the speed of the machine
affect all of them.  Ratios are computed within a round; their median and quartiles are reported.

    prefill   seconds until the first new token of every row; prompts have 512 tokens in total, but at least 16 each
    decode    seconds per step, which generates one token of every row, after prompts of 16 tokens
    streamed  seconds per step when tokens are returned in parts of 8 (perparam; 64 steps), and the same at once
    resident  resident bytes of the process after loading, before the first token
    peak      the most that were resident until then

One row is measured with prompts of 2048 tokens too ("long"): prefill, and the steps after it, for which perparam
returns tokens in parts of 8.

`device` measures models with random weights, FP8 with bfloat16 heads, on JAX's default device: prefill and decode as
above, and the bandwidth of reading every weight once per step, relative to copying a large array in the same rounds.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import generators
import numpy as np
import random_checkpoints
from generators import LONG, PART, length, measure, shown, spread

Report = dict[str, Any]

CONTENDERS = ("perparam", "perparam compute=bf16", "transformers bfloat16", "llama.cpp Q8_0")
OF_A_MIXTURE = ("perparam", "transformers bfloat16", "transformers bfloat16 eager")
"""Of a mixture of experts: transformers' default product of experts, `torch._grouped_mm`, and its loop over experts.
Its third, `batched_mm`, copies the kernels of each token, 10 GB for a prompt of 512."""


def resident() -> dict[str, int]:
    """Returns the resident bytes of this process, and the most that there were ("peak")."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Vm")}
    return {"resident": sizes["VmRSS:"], "peak": sizes["VmHWM:"]}


def work(contender: str, folder: str) -> None:
    """Runs one contender of `beside` as a worker process.

    Loads the model and prints the resident bytes; then reads a case from each line of stdin, a batch size or "long",
    and prints seconds.
    """
    name, *argument = contender.split()
    part, vocabulary = 1, json.loads(pathlib.Path(folder, "config.json").read_text())["vocab_size"]
    if name == "perparam":
        import perparam

        model, part = perparam.load_model(folder, *argument), PART
        generate, in_parts = generators.perparam_generator(model), generators.perparam_generator(model, PART)
    elif name == "transformers":
        generate = in_parts = generators.transformers_generator(folder, *argument)
    else:
        import generate_llama

        generate = in_parts = generate_llama.generator(folder)
    print(json.dumps(resident()), flush=True)
    for line in sys.stdin:
        if line.strip() == "long":
            times = generators.measure_long(generate, in_parts, part, vocabulary)
        else:
            times = measure(generate, int(line), vocabulary)
            if name == "perparam" and int(line) == 1:
                times |= generators.streaming(generate, in_parts, vocabulary)
        print(json.dumps(times), flush=True)


def beside(arguments: argparse.Namespace) -> tuple[str, Report]:
    """Measures perparam and others on a CPU, and returns the name of the results and the results."""
    pythons = {"perparam": sys.executable, "transformers": arguments.transformers, "llama.cpp": arguments.llama}
    dense = arguments.model == "0.6B"
    named = CONTENDERS if dense else OF_A_MIXTURE
    contenders = tuple(name for name in named if pythons[name.split()[0]])
    workers, memory = {}, {}
    cases = [*map(str, arguments.batches), *(["long"] if dense else [])]
    rounds: dict[str, list[dict[str, dict[str, float]]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        random_checkpoints.write(pathlib.Path(folder), arguments.model)
        for name in contenders:
            command = [pythons[name.split()[0]], os.path.abspath(__file__), "work", name, folder]
            workers[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            memory[name] = json.loads(workers[name].stdout.readline())
        for number in range(arguments.rounds + 1):
            for case in cases:
                times = {}
                for name, worker in workers.items():
                    worker.stdin.write(f"{case}\n")
                    worker.stdin.flush()
                    times[name] = json.loads(worker.stdout.readline())
                if number:  # the first round compiles
                    rounds[case].append(times)
                    print(case, {n: {k: round(v, 4) for k, v in t.items()} for n, t in times.items()}, flush=True)
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    return "generate-beside" + "-mixture" * (not dense), {
        "model": random_checkpoints.MODELS[arguments.model],
        "memory": memory,
        "cases": {case: ratios(contenders, times) for case, times in rounds.items()},
    }


def ratios(contenders: tuple[str, ...], rounds: list[dict[str, dict[str, float]]]) -> Report:
    """Returns, for each contender, the seconds, and the speed of perparam relative to each of the others per round."""
    result: Report = {}
    for name in contenders:
        seconds = {what: np.array([times[name][what] for times in rounds]) for what in rounds[0][name]}
        result[name] = {"seconds": {what: spread(values) for what, values in seconds.items()}}
        if "streamed" in seconds:
            result[name]["streamed, of the speed at once"] = spread(seconds["at once"] / seconds["streamed"])
        if name.startswith("perparam"):
            for other in (other for other in contenders if not other.startswith("perparam")):
                result[name][f"times as fast as {other}"] = {
                    what: spread(np.array([times[other][what] for times in rounds]) / seconds[what])
                    for what in ("prefill", "decode")
                }
    return result


def beside_table(results: Report) -> str:
    """Returns the results of `beside` as text, with a line for each case and contender."""
    lines = []
    for case, contenders in results["cases"].items():
        rows, tokens = (1, LONG) if case == "long" else (int(case), length(int(case)) * int(case))
        for contender, result in contenders.items():
            medians = {what: result["seconds"][what]["median"] for what in ("prefill", "decode")}
            line = f"{case:>4}  {contender:22}  prefill {tokens / medians['prefill']:5.0f} tokens/s"
            line += f"  decode {rows / medians['decode']:6.1f} tokens/s"
            for name, values in result.items():
                if name.startswith("times"):
                    line += f"  | {name}: {', '.join(f'{what} {shown(value)}' for what, value in values.items())}"
                if name.startswith("streamed"):
                    line += f"  | {name} {shown(values)}"
            lines.append(line)
    for name, sizes in results["memory"].items():
        lines.append(f"{name}: " + ", ".join(f"{what} {size / 2**20:.0f} MiB" for what, size in sizes.items()))
    return "\n".join(lines)


def random_model(size: str) -> Any:
    """Returns a Qwen3 with the dtypes of the published FP8 checkpoints, and random weights generated on the device."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from shapes import abstract_model

    graph, state = nnx.split(abstract_model(size))

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def values(key, shape, dtype):
        if dtype == jnp.float8_e4m3fn:  # less than 2, no NaN
            return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8) & 0xBF, dtype)
        return (jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(0.02)).astype(dtype)

    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    weights = [values(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, weights))


def device(arguments: argparse.Namespace) -> tuple[str, Report]:
    """Measures models on JAX's default device, and returns the name of the results and the results."""
    import jax
    import timing
    from flax import nnx

    copy = timing.yardsticks()["copy"]
    results: Report = {}
    for size in arguments.models:
        model = random_model(size)
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
        generate = generators.perparam_generator(model)
        results[size] = {"weight bytes": weights, "batches": {}}
        for batch in arguments.batches:
            vocabulary = model.config.vocab_size
            measure(generate, batch, vocabulary)  # compiles
            rounds = []
            for _ in range(arguments.rounds):
                rounds.append(measure(generate, batch, vocabulary) | {"copy": copy.moved / copy.sample()})
            column = {what: np.array([times[what] for times in rounds]) for what in rounds[0]}
            results[size]["batches"][str(batch)] = {
                "prefill, tokens per second": spread(length(batch) * batch / column["prefill"]),
                "decode, tokens per second": spread(batch / column["decode"]),
                "copy, bytes per second": spread(column["copy"]),
                "weights read once, of copy": spread(weights / column["decode"] / column["copy"]),
            }
    return "generate-device", {"models": results}


def device_table(results: Report) -> str:
    """Returns the results of `device` as text, with a line for each model and batch size."""
    return "\n".join(
        f"{size:>5}  batch {batch:>2}  " + "  ".join(f"{name} {shown(values)}" for name, values in result.items())
        for size, model in results["models"].items()
        for batch, result in model["batches"].items()
    )


def main() -> int:
    """Runs a command, prints its results as a table and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--batches", type=lambda text: [int(word) for word in text.split(",")], default=[1, 8, 64])
    common.add_argument("--rounds", type=int, default=5)
    common.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    command = commands.add_parser("beside", parents=[common], help="perparam and others on a CPU")
    command.add_argument("model", nargs="?", default="0.6B", choices=random_checkpoints.MODELS, metavar="MODEL",
        help=f"{' or '.join(random_checkpoints.MODELS)}; default: 0.6B",
    )  # fmt: skip
    command.add_argument("--transformers", metavar="PYTHON", help="a Python with torch, transformers and accelerate")
    command.add_argument("--llama", metavar="PYTHON", help="a Python with llama-cpp-python and gguf")
    command = commands.add_parser("device", parents=[common], help="perparam relative to the device's bandwidth")
    command.add_argument(
        "models", nargs="*", default=["0.6B"], metavar="MODEL", help="0.6B, 1.7B, 4B, 8B, 14B, 32B; default: 0.6B"
    )
    worker = commands.add_parser("work")
    worker.add_argument("contender")
    worker.add_argument("folder")
    arguments = parser.parse_args()
    if arguments.command == "work":
        work(arguments.contender, arguments.folder)
        return 0
    name, results = (beside if arguments.command == "beside" else device)(arguments)
    import timing

    print((beside_table if arguments.command == "beside" else device_table)(results))
    arguments.out.mkdir(parents=True, exist_ok=True)
    machine = timing.machine()
    path = arguments.out / f"{name}-{timing.slug(machine['device'])}.json"
    path.write_text(json.dumps({"machine": machine, "rounds": arguments.rounds, "results": results}, indent=1) + "\n")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
