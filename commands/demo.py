"""`perparam demo`: a small model that writes text, its plan, and its perplexity and text under several policies."""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import textwrap
from collections.abc import Mapping

import jax
import numpy as np
import tokenizers
from flax import nnx

from ..examples import tiny_text
from ..loaders import (
    Tokenizer,
    checkpoint_tree,
    convert_checkpoint,
    generate_text,
    load_model,
    load_tokenizer,
)
from ..loaders.metrics import divergence, float32_logits, next_token_loss
from ..loaders.windows import token_windows
from ..models import CausalLM, Sampling
from ..policies import Policy, PolicyLike, get_policy
from ..policies.labels import human_bytes
from ..policies.tables import Column, Table
from .options import OptionError, message

SUMMARY = "Show a small model that writes text, and what policies cost it."

TINY = pathlib.Path(__file__).parent.parent / "examples" / "tiny"
"""The checkpoint; `examples/train_tiny.py` made it."""

POLICIES: dict[str, PolicyLike] = {
    "f32": "f32",
    "bf16": "bf16",
    "fp8_weight_only": "fp8_weight_only",
    "fp8_dynamic": "fp8_dynamic",
    "mxfp8": Policy({"kernel": "mxfp8"}, {"kernel": None, "default": "bf16"}, "bf16"),
}
"""The policies that are compared, by name; the first one is the reference. mxfp8 is weight-only."""

PROMPT = "And it came to pass"
SAMPLING = Sampling(temperature=0.8, top_k=50)
LENGTH = 64
"""Tokens of a sample, the same for all, so that each model compiles one program."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a policy costs on a text: its perplexity, and the KL divergence and top-1 agreement with the reference."""

    perplexity: float
    kl: float
    top1: float


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("--folder", metavar="DIR", help="also save the model with FP8 kernels, as a checkpoint in DIR")


def run(options: argparse.Namespace) -> None:
    """Saves the checkpoint if it has a folder, and prints the rest."""
    if options.folder is not None:
        save(pathlib.Path(options.folder))
    models = {name: load_model(TINY, policy, progress=False) for name, policy in POLICIES.items()}
    tokenizer = load_tokenizer(TINY)
    size = sum(array.size for array in jax.tree.leaves(nnx.state(models["bf16"])))
    _say(
        f"A Qwen3 of {size / 1e6:.1f} million parameters, trained on the King James Bible on 2 CPU cores. In bfloat16, "
        "as it was saved, it continues the words before the bar:"
    )
    print(f"\n{sample(models['bf16'], tokenizer, key=2)}\n")
    file = TINY.parent / "policy.yaml"
    print(f"The policy examples/policy.yaml:\n\n{file.read_text(encoding='utf-8')}")
    print("Its plan, made from the headers of the checkpoint:\n")
    get_policy(file).explain(checkpoint_tree(TINY)).print()
    ids = held_out_ids()
    found = costs(models, ids)
    print()
    _say(f"On {len(ids)} tokens of chapters that it was not trained on, KL and top-1 relative to f32:")
    print(f"\n{_table(models, found).to_text()}\n")
    print("The same words, continued under each policy with the same random numbers:")
    for name, model in models.items():
        print(f"\n{name}\n{sample(model, tokenizer, key=1)}")
    print()
    exact, narrow = found["f32"], found["fp8_weight_only"]
    print(f"With FP8 kernels the perplexity is {narrow.perplexity:.2f}, in float32 {exact.perplexity:.2f};")
    print(f"the most likely token is the same for {narrow.top1:.0%} of tokens.")
    print()
    _say(
        "To go on, run `perparam demo --folder DIR`, then `perparam chat DIR`, `perparam plan DIR`, and "
        "`perparam compare DIR --policy f32 --policy bf16`."
    )


def save(folder: pathlib.Path) -> None:
    """Saves the model with FP8 kernels in a new or empty folder.

    Raises:
      OptionError: the folder has files, or cannot be made.
    """
    try:
        if folder.exists() and any(folder.iterdir()):
            raise OptionError(f"--folder: {folder}: the folder is not empty. Choose a new one.")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        text = message(error)
        raise OptionError(f"--folder: {text if str(folder) in text else f'{folder}: {text}'}") from error
    convert_checkpoint(TINY, folder, "fp8_weight_only", progress=False)
    _say(f"Saved with FP8 kernels in {folder}.")
    print()


def held_out_ids(folder: pathlib.Path = TINY) -> np.ndarray:
    """Ids (length,) int32 of the excerpt from the text that the model was not trained on."""
    text = (folder / "held_out.txt").read_text(encoding="utf-8")
    return tiny_text.encoded(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), text)


def costs(models: Mapping[str, CausalLM], ids: np.ndarray) -> dict[str, Cost]:
    """The cost of each model on a text with ids (length,), in windows of 256 tokens, relative to the first model."""
    windows, real = token_windows(ids, None, next(iter(models.values())).config.vocab_size)
    reference, result = None, {}
    for name, model in models.items():
        logits = float32_logits(model)(windows, real)
        reference = logits if reference is None else reference
        loss = np.asarray(next_token_loss(logits, windows), np.float64)[real[:, 1:]].mean()
        kl, agrees = (np.asarray(each, np.float64)[real].mean() for each in divergence(reference, logits))
        result[name] = Cost(math.exp(loss), max(float(kl), 0.0), float(agrees))  # rounding can make it negative
    return result


def sample(model: CausalLM, tokenizer: Tokenizer, *, key: int, length: int = LENGTH) -> str:
    """The prompt, a bar and the model's continuation, indented and at most 79 characters wide."""
    (completion,) = generate_text(model, tokenizer, PROMPT, length, sampling=SAMPLING, key=key)
    lines = f"{PROMPT}|{completion.text}".splitlines()
    return "\n".join(textwrap.fill(line, 79, initial_indent="  ", subsequent_indent="  ") for line in lines)


def _table(models: Mapping[str, CausalLM], found: Mapping[str, Cost]) -> Table:
    columns = [
        Column("policy"),
        *(Column(name, right=True) for name in ("perplexity", "KL, nats", "top-1", "parameters")),
    ]
    lines = []
    for name, cost in found.items():
        size = human_bytes(get_policy(None).explain(models[name]).total_bytes)
        lines.append((name, f"{cost.perplexity:.3f}", f"{cost.kl:.2e}", f"{cost.top1:.2%}", size))
    return Table(tuple(columns), lines)


def _say(text: str) -> None:
    """Prints a paragraph of at most 79 characters a line."""
    print(textwrap.fill(text, 79, break_on_hyphens=False))
