"""`perparam demo`: a small checkpoint, its plan, and its logits under two policies."""

from __future__ import annotations

import argparse
import pathlib
import tempfile
import time

import jax.numpy as jnp
import numpy as np

from ..examples.make_checkpoint import make_checkpoint
from ..loaders import checkpoint_tree, load_model
from ..loaders.metrics import divergence
from ..models import generate
from ..policies import get_policy
from ..policies.labels import human_bytes
from .options import OptionError, message

SUMMARY = "Make a small FP8 Qwen3 checkpoint, print its plan, and run it under two policies."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("--folder", metavar="DIR", help="folder for the checkpoint; default: a temporary folder")


def run(options: argparse.Namespace) -> None:
    """Makes the checkpoint and prints the rest."""
    if options.folder is not None:
        return _demo(_made(pathlib.Path(options.folder), "--folder"))
    with tempfile.TemporaryDirectory(prefix="perparam-demo-") as folder:
        return _demo(_made(pathlib.Path(folder), "temporary folder"))


def _made(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The new checkpoint in `folder`, which is called `name` in an error."""
    try:
        return make_checkpoint(folder)
    except OSError as error:
        text = message(error)
        raise OptionError(f"{name}: {text if str(folder) in text else f'{folder}: {text}'}") from error


def _demo(folder: pathlib.Path) -> None:
    file = pathlib.Path(__file__).parent.parent / "examples" / "policy.yaml"
    text = file.read_text(encoding="utf-8")
    print(f"A small Qwen3 with FP8 kernels and random weights, in Hugging Face layout: {folder}\n")
    print(f"The policy, examples/policy.yaml:\n\n{text}\nIts plan, made from the headers of the checkpoint:\n")
    policy = get_policy(file)
    policy.explain(checkpoint_tree(folder)).print()
    prompt = np.arange(1, 17)[None]
    logits = {}
    for name, each in (("the policy", policy), ("f32", "f32")):
        start = time.perf_counter()
        model = load_model(folder, each)
        loaded = time.perf_counter()
        logits[name] = np.asarray(model(prompt)).astype(np.float32)
        tokens = np.asarray(generate(model, prompt, max_new_tokens=12))[0]
        size = human_bytes(get_policy(None).explain(model).total_bytes)
        print(f"\nUnder {name}: {size} of parameters, loaded in {loaded - start:.2f} s")
        print(f"  logits {logits[name].shape}, generated {','.join(map(str, tokens))}")
    under_policy, exact = logits["the policy"], logits["f32"]
    error = np.linalg.norm(under_policy - exact) / np.linalg.norm(exact)
    _, agrees = divergence(jnp.asarray(exact), jnp.asarray(under_policy))
    print(
        f"\nLogits under the policy differ from float32 by {error:.1e} (relative); "
        f"the most likely token is the same for {float(agrees.mean()):.0%} of tokens."
    )
    print(
        "\nTo keep the checkpoint, run `perparam demo --folder DIR`, then try `perparam plan DIR`, `perparam chat DIR` "
        "and `perparam compare DIR --policy f32 --policy bf16`."
    )
