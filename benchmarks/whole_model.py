"""A whole model of Qwen3-0.6B's shape on a CPU, beside transformers: prefill, decoding and resident memory.

    python benchmarks/whole_model.py [--transformers PYTHON] [--rounds 7] [--out benchmarks/results]

Both load the same FP8 checkpoint, with random weights, made in a temporary folder.  perparam keeps it FP8: once as it
does without a policy, exactly, and once with weights rounded to bfloat16 within products.  transformers, which has no
FP8 matmul for CPUs, dequantises it to bfloat16.  Each runs in a process of its own, transformers under the Python that
`--transformers` names, with as many threads as there are cores; rounds alternate, so that a machine that slows down
slows all of them.  A ratio is taken within a round; its median and quartiles are reported.

    prefill   seconds to the first new token of a prompt of 512
    decode    seconds a token, of the next 24 after a prompt of 16
    resident  bytes of the whole process after loading, before the first token
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

PROMPT, NEW, SHORT = 512, 24, 16
CONFIG = {
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
CONTENDERS = ("perparam", "perparam compute=bf16", "transformers bfloat16")
"""The last is what the others are compared with."""


def write_checkpoint(folder: pathlib.Path) -> None:
    """An FP8 checkpoint of `CONFIG` with random weights, in Hugging Face layout."""
    from perparam.examples import make_checkpoint as maker

    config = maker._COMMON | CONFIG | {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    maker.write_safetensors(folder / "model.safetensors", maker.tensors(config, seed=0, ones=False))


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def perparam_generator(folder: str, policy: str | None = None):
    """A function from a prompt and a count to that many new tokens."""
    import numpy as np

    import perparam

    model = perparam.load_model(folder, policy)
    return lambda prompt, count: np.asarray(perparam.generate(model, prompt, max_new_tokens=count, eos_token_id=()))


def transformers_generator(folder: str, dtype: str):
    """Likewise, greedy, with transformers."""
    import torch
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    torch.set_num_threads(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    model = model.to(getattr(torch, dtype)).eval()

    def generate(prompt, count):
        ids = torch.as_tensor(prompt)
        with torch.no_grad():
            return model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=count, max_new_tokens=count
            )

    return generate


def work(contender: str, folder: str) -> None:
    """A worker: loads, then answers each line of its input with the seconds of a prefill and of a decoded token."""
    import numpy as np

    name, *dtype = contender.split()
    generate = perparam_generator(folder, *dtype) if name == "perparam" else transformers_generator(folder, *dtype)
    print(resident(), flush=True)
    rng = np.random.default_rng(0)
    long, short = rng.integers(0, CONFIG["vocab_size"], (1, PROMPT)), rng.integers(0, CONFIG["vocab_size"], (1, SHORT))

    def seconds(prompt, count) -> float:
        start = time.perf_counter()
        generate(prompt, count)
        return time.perf_counter() - start

    for _ in sys.stdin:
        prefill, first, all_new = seconds(long, 1), seconds(short, 1), seconds(short, NEW + 1)
        print(json.dumps({"prefill": prefill, "decode": (all_new - first) / NEW}), flush=True)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def main() -> int:
    """Makes the checkpoint, runs the rounds and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformers", metavar="PYTHON", help="a Python with torch and transformers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(*arguments.worker)
        return 0
    contenders = CONTENDERS if arguments.transformers else CONTENDERS[:2]
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(pathlib.Path(folder))
        workers, memory = {}, {}
        for one in contenders:
            python = sys.executable if one.startswith("perparam") else arguments.transformers
            command = [python, os.path.abspath(__file__), "--worker", one, folder]
            workers[one] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            memory[one] = int(workers[one].stdout.readline())
        rounds: list[dict[str, dict[str, float]]] = []
        for number in range(arguments.rounds + 1):
            times = {}
            for one, worker in workers.items():
                worker.stdin.write("go\n")
                worker.stdin.flush()
                times[one] = json.loads(worker.stdout.readline())
            if number:  # the first compiles
                rounds.append(times)
                print({one: {k: round(v, 4) for k, v in t.items()} for one, t in times.items()}, flush=True)
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    report(contenders, memory, rounds, arguments.out)
    return 0


def report(contenders, memory, rounds, out: pathlib.Path) -> None:
    """Prints a table and writes it as JSON."""
    lines, results = [], {}
    for one in contenders:
        seconds = {what: quartiles([times[one][what] for times in rounds]) for what in ("prefill", "decode")}
        # How many times as fast as the last contender this one is, round by round.
        speedups = {
            what: quartiles([times[contenders[-1]][what] / times[one][what] for times in rounds])
            for what in ("prefill", "decode")
        }
        results[one] = {"seconds": seconds, f"times as fast as {contenders[-1]}": speedups, "resident": memory[one]}
        lines.append(
            f"{one:22}  prefill {PROMPT / seconds['prefill'][1]:4.0f} tokens/s"
            f"  decode {1 / seconds['decode'][1]:5.1f} tokens/s"
            f"  resident {memory[one] / 2**20:5.0f} MiB  |  over {contenders[-1]}: "
            + ", ".join(f"{what} {m:.2f} ({a:.2f} to {b:.2f})" for what, (a, m, b) in speedups.items())
            + f", resident {memory[one] / memory[contenders[-1]]:.2f}"
        )
    print("\n".join(lines))
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"whole-model-{cpu_name()}.json"
    content = {"date": datetime.date.today().isoformat(), "rounds": len(rounds), "cores": os.cpu_count()}
    path.write_text(json.dumps(content | {"results": results}, indent=1) + "\n")
    print(f"written to {path}")


def cpu_name() -> str:
    """The processor, as part of a file name."""
    text = pathlib.Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    name = next((line.split(":")[1] for line in text.splitlines() if line.startswith("model name")), platform.machine())
    return "-".join(name.lower().replace("(r)", "").replace("(tm)", "").split()[:3])


if __name__ == "__main__":
    sys.exit(main())
