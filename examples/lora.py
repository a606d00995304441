"""LoRA over a frozen FP8 checkpoint: train adapters, save them as peft does, and merge them.

    python -m perparam.examples.lora

Without a network: the checkpoint is small and random, and the task is that of `finetune.py`, a fixed permutation.
"""

from __future__ import annotations

import pathlib
import tempfile

import optax
from flax import nnx

import perparam
from perparam.examples.finetune import OVER_FP8, batches, cross_entropy
from perparam.examples.make_checkpoint import make_checkpoint
from perparam.models import Decoder
from perparam.training import add_lora, load_lora, merge_lora, save_lora


def train(model: Decoder, steps: int = 30, learning_rate: float = 2e-2) -> list[float]:
    """The losses of AdamW on the adapters of `model`, which changes; nothing else has gradients or moments."""
    optimizer = nnx.Optimizer(model, optax.adamw(learning_rate), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer, tokens):
        def loss(model):
            return cross_entropy(model(tokens), tokens)

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, gradients)
        return value

    return [float(step(model, optimizer, tokens)) for tokens in batches(model.config.vocab_size, steps)]


def main(steps: int = 30) -> None:
    """Prints the losses, the table of the merge, and how far the merged model is from the one with adapters."""
    with tempfile.TemporaryDirectory() as work:
        base = perparam.load_model(make_checkpoint(f"{work}/tiny", "tiny"), OVER_FP8)
        model = add_lora(base, 8, 16, "layers/**", rngs=nnx.Rngs(0))
        losses = train(model, steps)
        print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")

        folder = save_lora(model, pathlib.Path(work) / "adapter")
        print("saved:", *sorted(path.name for path in folder.iterdir()))
        model = load_lora(base, folder)  # or one that peft saved

        merged, report = merge_lora(model)
        report.print()
        ids = batches(base.config.vocab_size, 1, seed=1)[0]
        for name, each in (("adapters", model), ("merged", merged)):
            print(f"{name:9}held-out loss {float(cross_entropy(each(ids), ids)):.3f}")


if __name__ == "__main__":
    main()
