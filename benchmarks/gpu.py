"""Checks and measures everything that perparam has for Hopper GPUs (H100, H200), with one command.

    python benchmarks/gpu.py                        # under 20 minutes on an otherwise idle GPU
    python benchmarks/gpu.py --parts checks         # only the results of kernels
    python benchmarks/gpu.py --dry --out FOLDER     # tests this script on a CPU, with tiny shapes

Parts run one after another, each in processes of its own and within its own time, since an error of a kernel makes a
CUDA context unusable and a kernel may never end.  A part that fails is reported, and the others still run.  The results
are written to `results/gpu-<device>.json`, and as a page to `results/gpu-<device>.md`, after every part.  The exit code
is 1 if a check or a part fails, and 2 without a Hopper GPU.

A new kernel needs an entry in `gpu_checks.checks`; a new benchmark is a script that writes a JSON file into the folder
`--out`, and an entry of `parts`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import IO, Any

import gpu_page

HERE = pathlib.Path(__file__).parent

SHAPES = "4096x4096,12288x4096,4096x12288,1024x4096"
"""The linear layers of Qwen3-8B."""

PATIENCE = 90.0
"""Seconds without a line after which a check is stopped: the first one also starts JAX, and compiling takes some."""

DEVICE = """
import json, subprocess, jax, timing
device = jax.devices()[0]
driver = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
try:
    driver = subprocess.run(driver, capture_output=True, text=True, check=True).stdout.strip()
except (OSError, subprocess.CalledProcessError):
    driver = None
capability = getattr(device, "compute_capability", None)
print(json.dumps(timing.machine() | {"slug": timing.slug(timing.machine()["device"]), "capability": capability,
                                     "driver, clock, power": driver}))
"""
"""A program that describes the device; here JAX is not imported, since it would keep most of the GPU's memory."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A benchmark.

    name     of the part, as in `--parts`
    seconds  time after which it is stopped
    command  script in this folder, and its arguments; it writes JSON files into the folder of the last argument
    """

    name: str
    seconds: float
    command: tuple[str, ...]


def parts(dry: bool) -> tuple[float, list[Part]]:
    """Returns the seconds for all checks, and the benchmarks: together less than 20 minutes."""
    if dry:
        tiny = ("--quick", "--shapes", "256x256", "--rows", "1", "--rotated", "1000000", "--modes", "W8A8")
        return 120, [
            Part("matmul", 120, ("matmul.py", *tiny, "--results")),
            Part("attention", 120, ("attention.py", "--dry", "--out")),
            Part("generate", 120, ("generate.py", "device", "tiny", "--batches", "1", "--rounds", "1", "--out")),
        ]
    common = ("--modes", "W8A16,W8A8", "--seconds")
    prompts = ("--shapes", "24576x7168,7168x16384,4096x7168", "--rows", "4096")
    return 370, [
        # A case takes some 20 seconds: `--seconds` is when the last one begins.
        Part("matmul, published shapes", 120, ("matmul.py", *prompts, *common, "80", "--results")),
        Part(
            "matmul", 260, ("matmul.py", "--shapes", SHAPES, "--rows", "1,64,128,512,4096", *common, "220", "--results")
        ),
        Part("attention", 90, ("attention.py", "--out")),
        Part("generate 0.6B", 120, ("generate.py", "device", "0.6B", "--rounds", "3", "--out")),
        Part("generate 8B", 210, ("generate.py", "device", "8B", "--batches", "1,64", "--rounds", "3", "--out")),
    ]


def environment(dry: bool) -> dict[str, str]:
    """Returns the environment of all processes."""
    return dict(os.environ) | ({"JAX_PLATFORMS": "cpu"} if dry else {})


def describe(dry: bool) -> dict[str, Any]:
    """Returns the device, its capability and driver, and versions.

    Raises:
      SystemExit: if this is no Hopper GPU and the run is not dry; the message says what there is, and what to do.
    """
    run = subprocess.run([sys.executable, "-c", DEVICE], cwd=HERE, env=environment(dry), capture_output=True, text=True)
    if run.returncode:
        print(run.stderr, file=sys.stderr)
        refuse("JAX found no device")
    device: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    if not dry and device["platform"] != "gpu":
        refuse(f"JAX's default device is a {device['platform']}")
    if not dry and device["capability"] != "9.0":
        refuse(f"{device['device']} has compute capability {device['capability']}, not 9.0")
    return device


def refuse(why: str) -> None:
    """Ends the process with the exit code 2 and the reason."""
    print(
        f"gpu.py needs a Hopper GPU (H100, H200): {why}. Run it on a machine with such a GPU, an NVIDIA driver and "
        "`pip install 'jax[cuda13]'`, or pass --dry to test the script on a CPU.",
        file=sys.stderr,
    )
    raise SystemExit(2)


def run_part(part: Part, dry: bool) -> dict[str, Any]:
    """Returns the results of a benchmark: its JSON files, its time, the end of its output, and why it failed, if so."""
    start, why = time.monotonic(), None
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE / part.command[0]), *part.command[1:], folder]
        try:
            run = subprocess.run(
                command, env=environment(dry), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                timeout=part.seconds,
            )  # fmt: skip
            output = run.stdout
            if run.returncode:
                why = f"exit code {run.returncode}"
        except subprocess.TimeoutExpired as stopped:
            output = stopped.stdout or ""
            output = output if isinstance(output, str) else output.decode(errors="replace")
            why = f"stopped after {part.seconds:.0f} s"
        results = []
        for file in sorted(pathlib.Path(folder).glob("*.json")):
            with contextlib.suppress(ValueError):  # a part that was stopped while it wrote
                results.append(json.loads(file.read_text()))
    return {
        "name": part.name,
        "seconds": round(time.monotonic() - start, 1),
        "budget": part.seconds,
        "failed": why or (None if results else "it wrote no results"),
        "output": output[-20000:],
        "results": results,
    }


def run_checks(command: list[str], budget: float, patience: float, dry: bool) -> dict[str, Any]:
    """Returns the results of all checks; a check that crashes or never ends fails, and the next ones still run.

    command  runs checks as `gpu_checks.py` does
    """
    start, done, names, after = time.monotonic(), [], list[str](), None
    while after is None or names[-1] != after:
        seconds = budget - (time.monotonic() - start)
        begun, why, before = None, None, len(done)
        for word in watched([*command, *(["--after", after] if after else [])], seconds, patience, dry):
            if isinstance(word, str):
                why = word
            elif "left" in word:
                names = names or word["left"]
            elif "begins" in word:
                begun = word["begins"]
            else:
                done.append(word)
                print(gpu_page.check_line(word), flush=True)
                begun = None
        if begun is not None:
            done.append({"name": begun, "passed": False, "why": why})
            print(gpu_page.check_line(done[-1]), flush=True)
        if time.monotonic() - start >= budget or len(done) == before or not names:
            break
        after = done[-1]["name"]
    missing = [name for name in names if name not in {one["name"] for one in done}]
    done += [{"name": name, "passed": False, "why": "not run"} for name in missing]
    if not names:
        done.append({"name": "the start of the checks", "passed": False, "why": why})
    return {"seconds": round(time.monotonic() - start, 1), "budget": budget, "results": done}


def watched(command: list[str], seconds: float, patience: float, dry: bool) -> Iterator[dict[str, Any] | str]:
    """Yields the lines of JSON of a process, and at last, as text, why it ended.

    It is stopped after `seconds`, or after `patience` seconds without a line.
    """
    lines: queue.Queue[str | None] = queue.Queue()

    def read(stream: IO[str]) -> None:
        for text in stream:
            lines.put(text)
        lines.put(None)

    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, env=environment(dry), stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        reader = threading.Thread(target=read, args=(process.stdout,))
        reader.start()
        end, why = time.monotonic() + seconds, ""
        while True:
            left = max(end - time.monotonic(), 0.0)
            try:
                text = lines.get(timeout=min(patience, left))
            except queue.Empty:
                why = f"stopped after {patience:.0f} s without a result" if left > patience else "no time left"
                process.kill()
                break
            if text is None:
                break
            if text.startswith("{"):
                yield json.loads(text)
        code = process.wait()
        reader.join()
        errors.seek(0)
        last = ([line for line in errors.read().splitlines() if line.strip()] or [""])[-1][:300]
        yield why or f"exit code {code}: {last}"


def main() -> int:
    """Runs all parts and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU, to test this script")
    parser.add_argument("--parts", type=lambda text: text.split(";"), metavar="NAME;…", help="only these; default: all")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results", help="folder of the results")
    arguments = parser.parse_args()
    budget, benchmarks = parts(arguments.dry)
    names = ["checks", *(part.name for part in benchmarks)]
    chosen = arguments.parts or names
    if unknown := set(chosen) - set(names):
        parser.error(f"no part {', '.join(sorted(unknown))}, expected some of: {'; '.join(names)}")
    device = describe(arguments.dry)
    report: dict[str, Any] = {"machine": device, "dry": arguments.dry, "parts": []}
    path = arguments.out / f"gpu-{device['slug']}{'-dry' if arguments.dry else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        path.write_text(json.dumps(report, ensure_ascii=False) + "\n")
        path.with_suffix(".md").write_text(gpu_page.page(report))

    if "checks" in chosen:
        print(f"checks, at most {budget:.0f} s", flush=True)
        command = [sys.executable, str(HERE / "gpu_checks.py"), *["--dry"] * arguments.dry]
        report["checks"] = run_checks(command, budget, PATIENCE, arguments.dry)
        write()
        print(gpu_page.checks_summary(report["checks"]), flush=True)
    for part in benchmarks:
        if part.name in chosen:
            print(f"\n{part.name}, at most {part.seconds:.0f} s", flush=True)
            report["parts"].append(run_part(part, arguments.dry))
            write()
            print(report["parts"][-1]["output"], gpu_page.part_summary(report["parts"][-1]), sep="\n", flush=True)
    print(f"\nwritten to {path} and {path.with_suffix('.md')}")
    failed = any(not one["passed"] for one in report.get("checks", {"results": []})["results"])
    return 1 if failed or any(part["failed"] for part in report["parts"]) else 0


if __name__ == "__main__":
    sys.exit(main())
