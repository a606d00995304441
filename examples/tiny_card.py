"""The model card of the tiny model, README.md in its folder: every figure is that of the run that made the folder.

    python -m perparam.examples.tiny_card FOLDER [--plot FILE.png]

writes the card again from history.json and the checkpoint in FOLDER, and the picture of the training with `--plot`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform

import jax
from flax import nnx

import perparam
from perparam.commands import demo

CARD = """\
# The tiny model

A Qwen3 of {parameters:,} parameters that writes in the manner of the King James Bible, for demonstrations and tests.
It knows nothing else, and what it writes is no scripture. `perparam demo` shows it, and `perparam chat` continues what
is typed.

- **Shape**: {layers} layers, hidden size {hidden}, {heads} query heads and {kv_heads} key-value heads, MLP of {mlp},
  {vocabulary} tokens (byte-level BPE, trained on the training text), tied embeddings, a sliding window of {window}
  tokens.
- **Files**: bfloat16, {bytes:,} bytes of parameters.
- **Text**: the King James Bible (1611) from Debian's packages `bible-kjv` and `bible-kjv-text` 4.38, without the
  numbers of verses. It is in the public domain, except in the United Kingdom, where the Crown's letters patent restrict
  its printing; Debian's file of the text may be copied, modified and distributed at will.
- **Licence of the model**: Apache-2.0, as perparam.
- **Command**: `python -m perparam.examples.train_tiny examples/tiny --plot docs/tiny-model.png`
- **Training**: {steps:,} steps of {batch} rows of {window} tokens in {seconds:,.0f} s, with {cpu:,.0f} s of CPU
  time{note}.
  Muon for kernels and Adam for the rest, by `with_policy`: parameters and first moments are stored in bfloat16, masters
  in float32, and arithmetic is in float32.
- **Made** on {date} with {machine}, {versions}.

## Held-out text

The last 4 % of the text, {held_out} bytes from 2 Timothy 3 to the end, were never trained on. The same tokens, in bits
for each byte of text:

| | bits per byte |
|---|---|
{bits}

The n-gram models have modified Kneser-Ney smoothing (`examples/kneser_ney.py`), of the same training text.

![Bits per byte of the validation text during the training](../../docs/tiny-model.png)

## Policies

The perplexity of the tokens in `held_out.txt`, the beginning of the held-out text, in windows of 256 tokens:

| policy | perplexity | KL to f32, nats | top-1 agreement with f32 |
|---|---|---|---|
{policies}

`mxfp8` is weight-only.

## Samples

The model continues the words before the bar, at a temperature of 0.8 among the 50 likeliest tokens. Nothing was chosen:
the keys are 1, 2 and 3.

{samples}
"""


def card(folder: pathlib.Path, note: str = "") -> str:
    """The text of the card of a checkpoint with its history.json; `note` follows the time of the training."""
    history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    models = {name: perparam.load_model(folder, policy, progress=False) for name, policy in demo.POLICIES.items()}
    config = models["bf16"].config
    tokenizer = perparam.load_tokenizer(folder)
    found = demo.costs(models, demo.held_out_ids(folder))
    samples = [f"```text\n{demo.sample(models['bf16'], tokenizer, key=key, length=160)}\n```" for key in (1, 2, 3)]
    names = ("jax", "flax", "optax", "tokenizers")
    return CARD.format(
        parameters=sum(array.size for array in jax.tree.leaves(nnx.state(models["bf16"]))),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        mlp=config.intermediate_size,
        vocabulary=config.vocab_size,
        window=config.window(0),
        bytes=(folder / "model.safetensors").stat().st_size,
        note=note,
        date=datetime.date.today().isoformat(),
        machine=f"{os.cpu_count()} cores, {platform.machine()}",
        versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in names),
        held_out=f"{history['bytes']['held_out']:,}",
        bits="\n".join(f"| {name} | {bits:.4f} |" for name, bits in history["held_out"].items()),
        policies="\n".join(
            f"| {name} | {cost.perplexity:.3f} | {cost.kl:.1e} | {cost.top1:.1%} |" for name, cost in found.items()
        ),
        samples="\n\n".join(samples),
        steps=history["recipe"]["steps"],
        batch=history["recipe"]["batch"],
        seconds=history["seconds"],
        cpu=history["cpu"],
    )


def plot(folder: pathlib.Path, file: str | os.PathLike[str]) -> None:
    """Draws the training of history.json, and the held-out figures as horizontal lines; needs matplotlib."""
    from matplotlib.figure import Figure

    history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    steps, bits = zip(*history["validation"], strict=True)
    axes.plot(steps, bits, "o-", markersize=3, label="model, validation text")
    for i, (name, value) in enumerate(history["held_out"].items(), 1):
        axes.axhline(value, linestyle="--", color=f"C{i}", label=f"{name}, held-out text: {value:.3f}")
    axes.set(xlabel="step", ylabel="bits per byte", title="The training of the tiny model")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=100)


def main() -> None:
    """Writes the card, and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--note", default="", help="text after the time of the training, such as what else ran")
    parser.add_argument("--plot", help="a picture of the training")
    options = parser.parse_args()
    if options.plot is not None:
        plot(options.folder, options.plot)
    (options.folder / "README.md").write_text(card(options.folder, options.note), encoding="utf-8")


if __name__ == "__main__":
    main()
