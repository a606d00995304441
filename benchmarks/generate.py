"""Generation by whole models: how fast prompts are read and tokens are made, in what memory, beside what is possible.

    python benchmarks/generate.py beside [--transformers PYTHON] [--batches 1,8,64] [--rounds 5]
    python benchmarks/generate.py device [MODEL ...] [--batches 1,8,64] [--rounds 5]

`beside` takes a model of Qwen3-0.6B's shape on a CPU.  All contenders load the same FP8 checkpoint, with random
weights, made in a temporary folder.  perparam keeps it FP8: once as it does without a policy, exactly, and once with
weights rounded to bfloat16 within products.  transformers, which has no FP8 matmul for CPUs, dequantises it, to
bfloat16 and to float32.  Each runs in a process of its own, transformers under the Python that `--transformers` names,
with as many threads as there are cores; rounds alternate, so that a machine that slows down slows all of them.  A ratio
is taken within a round; its median and quartiles are reported.

    prefill   seconds to the first new token of every row; prompts have 512 tokens in all, but at least 16 each
    decode    seconds a step, which makes a token of every row, after prompts of 16
    streamed  the same, handed over in parts of 8 tokens (perparam; 64 steps, beside as many at once)
    resident  bytes of the whole process after loading, before the first token

`device` takes models of random weights, in FP8 with bfloat16 heads, on whatever JAX computes on, a GPU if there is one:
prefill and decode as above, and which part of the bandwidth of copying a large array, measured in the same rounds, it
is to read every weight once a step.
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
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Report = dict[str, Any]

PROMPT, SHORTEST, STREAMED, PART = 512, 16, 64, 8
VOCABULARY = 151936
NEW = {1: 24, 8: 16, 64: 8}
"""Steps that are timed at a batch; of others as many as of the next smaller one."""

CONTENDERS = ("perparam", "perparam compute=bf16", "transformers bfloat16", "transformers float32")


def write_checkpoint(folder: pathlib.Path) -> None:
    """An FP8 checkpoint of Qwen3-0.6B's shape with random weights, in Hugging Face layout."""
    from perparam.examples import make_checkpoint as maker

    config = maker._COMMON | {
        "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16,
        "num_hidden_layers": 28, "num_key_value_heads": 8, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "vocab_size": VOCABULARY,
        "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    maker.write_safetensors(folder / "model.safetensors", maker.tensors(config, seed=0, ones=False))


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


Generator = Callable[[np.ndarray, int], Any]
"""From prompts (rows, length) and a count to that many new tokens a row."""


def perparam_generator(model: Any, part: int | None = None) -> Generator:
    """Greedy; in parts of `part` tokens, or at once."""
    import perparam
    from perparam.models import decode

    def generate(prompts, count):
        if part is None:
            return np.asarray(perparam.generate(model, prompts, max_new_tokens=count, eos_token_id=()))
        return [
            each.tokens for each in decode(model, prompts, None, GenerationConfig(count, eos_token_id=()), chunk=part)
        ]

    return generate


def transformers_generator(folder: str, dtype: str) -> Generator:
    """Greedy, with transformers."""
    import torch
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    torch.set_num_threads(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    model = model.to(getattr(torch, dtype)).eval()

    def generate(prompts, count):
        ids = torch.as_tensor(prompts)
        with torch.no_grad():
            return model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=count, max_new_tokens=count
            )

    return generate


def steps(batch: int) -> int:
    """How many steps are timed."""
    return NEW[max(each for each in NEW if each <= batch)]


def prompts(batch: int, length: int) -> np.ndarray:
    """Random ids (batch, length), the same whoever asks."""
    return np.random.default_rng(length).integers(1, VOCABULARY, (batch, length))


def measure(generate: Generator, batch: int) -> dict[str, float]:
    """Seconds of a prefill and of a decoding step."""

    def seconds(length: int, count: int) -> float:
        ids = prompts(batch, length)
        start = time.perf_counter()
        generate(ids, count)
        return time.perf_counter() - start

    count = steps(batch)
    prefill, first, all_new = seconds(length(batch), 1), seconds(SHORTEST, 1), seconds(SHORTEST, count + 1)
    return {"prefill": prefill, "decode": (all_new - first) / count}


def length(batch: int) -> int:
    """Tokens of each prompt that is timed."""
    return max(PROMPT // batch, SHORTEST)


def streaming(whole: Generator, in_parts: Generator) -> dict[str, float]:
    """Seconds a step of a row at once and in parts, the prefill included in both."""
    ids, result = prompts(1, SHORTEST), {}
    for name, generate in (("at once", whole), ("streamed", in_parts)):
        start = time.perf_counter()
        generate(ids, STREAMED)
        result[name] = (time.perf_counter() - start) / STREAMED
    return result


def spread(values: Any) -> dict[str, float]:
    """The median and the quartiles around it."""
    lower, median, upper = np.percentile(values, (25, 50, 75))
    return {"lower": float(lower), "median": float(median), "upper": float(upper)}


def shown(values: dict[str, float]) -> str:
    """`median (lower–upper)`."""
    return f"{values['median']:.3g} ({values['lower']:.3g}–{values['upper']:.3g})"


# Beside transformers.


def work(contender: str, folder: str) -> None:
    """A worker: loads, says what is resident, then answers each line of its input, a batch, with seconds."""
    name, *argument = contender.split()
    in_parts = None
    if name == "perparam":
        import perparam

        model = perparam.load_model(folder, *argument)
        generate, in_parts = perparam_generator(model), perparam_generator(model, PART)
    else:
        generate = transformers_generator(folder, *argument)
    print(resident(), flush=True)
    for line in sys.stdin:
        times = measure(generate, int(line))
        if in_parts and int(line) == 1:
            times |= streaming(generate, in_parts)
        print(json.dumps(times), flush=True)


def beside(arguments: argparse.Namespace) -> tuple[str, Report]:
    """Runs the contenders; the name of the results and the results."""
    contenders = CONTENDERS if arguments.transformers else CONTENDERS[:2]
    workers, memory = {}, {}
    rounds: dict[int, list[dict[str, dict[str, float]]]] = {batch: [] for batch in arguments.batches}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(pathlib.Path(folder))
        for one in contenders:
            python = sys.executable if one.startswith("perparam") else arguments.transformers
            command = [python, os.path.abspath(__file__), "work", one, folder]
            workers[one] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            memory[one] = int(workers[one].stdout.readline())
        for number in range(arguments.rounds + 1):
            for batch in arguments.batches:
                times = {}
                for one, worker in workers.items():
                    worker.stdin.write(f"{batch}\n")
                    worker.stdin.flush()
                    times[one] = json.loads(worker.stdout.readline())
                if number:  # the first compiles
                    rounds[batch].append(times)
                    print(batch, {one: {k: round(v, 4) for k, v in t.items()} for one, t in times.items()}, flush=True)
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    return "generate-beside", {
        "resident": memory,
        "batches": {str(batch): ratios(contenders, each) for batch, each in rounds.items()},
    }


def ratios(contenders: tuple[str, ...], rounds: list[dict[str, dict[str, float]]]) -> Report:
    """Of each contender: seconds, and how many times as fast as each of transformers' it is, round by round."""
    result: Report = {}
    for one in contenders:
        seconds = {what: np.array([times[one][what] for times in rounds]) for what in rounds[0][one]}
        result[one] = {"seconds": {what: spread(values) for what, values in seconds.items()}}
        if "streamed" in seconds:
            result[one]["streamed, of the speed at once"] = spread(seconds["at once"] / seconds["streamed"])
        if one.startswith("perparam"):
            for other in contenders[2:]:
                result[one][f"times as fast as {other}"] = {
                    what: spread(np.array([times[other][what] for times in rounds]) / seconds[what])
                    for what in ("prefill", "decode")
                }
    return result


def beside_table(results: Report) -> str:
    """A line a batch and contender."""
    lines = []
    for batch, contenders in results["batches"].items():
        for one, result in contenders.items():
            each = {what: result["seconds"][what]["median"] for what in ("prefill", "decode")}
            line = (
                f"batch {batch:>2}  {one:22}  prefill {length(int(batch)) * int(batch) / each['prefill']:5.0f} tokens/s"
            )
            line += f"  decode {int(batch) / each['decode']:6.1f} tokens/s"
            for name, values in result.items():
                if name.startswith("times"):
                    line += f"  | {name}: {', '.join(f'{what} {shown(value)}' for what, value in values.items())}"
                if name.startswith("streamed"):
                    line += f"  | {name} {shown(values)}"
            lines.append(line)
    lines += [f"{one}: {size / 2**20:.0f} MiB resident" for one, size in results["resident"].items()]
    return "\n".join(lines)


# On a device.


def random_model(size: str) -> Any:
    """A Qwen3 stored as its FP8 checkpoints are, of random numbers made on the device."""
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
    made = [values(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, made))


def device(arguments: argparse.Namespace) -> tuple[str, Report]:
    """Times the models; the name of the results and the results."""
    import jax
    import timing
    from flax import nnx

    copy = timing.yardsticks()["copy"]
    results: Report = {}
    for size in arguments.models:
        model = random_model(size)
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
        generate = perparam_generator(model)
        results[size] = {"weight bytes": weights, "batches": {}}
        for batch in arguments.batches:
            measure(generate, batch)  # compiles
            rounds = []
            for _ in range(arguments.rounds):
                rounds.append(measure(generate, batch) | {"copy": copy.moved / copy.sample()})
            column = {what: np.array([each[what] for each in rounds]) for what in rounds[0]}
            results[size]["batches"][str(batch)] = {
                "prefill, tokens per second": spread(length(batch) * batch / column["prefill"]),
                "decode, tokens per second": spread(batch / column["decode"]),
                "copy, bytes per second": spread(column["copy"]),
                "weights read once, of copy": spread(weights / column["decode"] / column["copy"]),
            }
    return "generate-device", {"models": results}


def device_table(results: Report) -> str:
    """A line a model and batch."""
    return "\n".join(
        f"{size:>5}  batch {batch:>2}  " + "  ".join(f"{name} {shown(values)}" for name, values in result.items())
        for size, model in results["models"].items()
        for batch, result in model["batches"].items()
    )


def main() -> int:
    """Runs, prints a table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--batches", type=lambda text: [int(word) for word in text.split(",")], default=[1, 8, 64])
    common.add_argument("--rounds", type=int, default=5)
    common.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    one = commands.add_parser("beside", parents=[common], help="perparam and transformers on a CPU")
    one.add_argument("--transformers", metavar="PYTHON", help="a Python with torch, transformers and accelerate")
    one = commands.add_parser("device", parents=[common], help="perparam beside the device's bandwidth")
    one.add_argument(
        "models", nargs="*", default=["0.6B"], metavar="MODEL", help="0.6B, 1.7B, 4B, 8B, 14B or 32B; else 0.6B"
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
