"""Classification of texts, and of the tokens in them.

    python -m perparam.examples.classify [CHECKPOINT]

CHECKPOINT is a folder or a name on the Hugging Face hub of a model for sequence or token classification. Without one,
a small checkpoint with random weights is made, whose answers mean nothing.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import perparam
from perparam.examples.make_checkpoint import make_checkpoint

TEXTS = ("A film to remember.", "I left after ten minutes.")


def classes(checkpoint: str, texts: Sequence[str]) -> list[list[tuple[str, float]]]:
    """The most likely class and its probability: one for each text, or one for each token of each text."""
    model, tokenizer = perparam.load_model(checkpoint), perparam.load_tokenizer(checkpoint)
    rows = [tokenizer.encode(text) for text in texts]
    longest = max(map(len, rows))
    ids = np.array([row + [0] * (longest - len(row)) for row in rows])
    mask = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in rows])

    logits = nnx.jit(type(model).__call__)(model, ids, mask)  # (texts, classes), or (texts, tokens, classes)
    probabilities = np.asarray(jax.nn.softmax(logits.astype(jnp.float32)))
    if probabilities.ndim == 2:
        probabilities = probabilities[:, None]  # the text as a whole

    names = model.config.id2label
    return [
        [(names[each.argmax()], float(each.max())) for each in of_text[: len(row)]]
        for of_text, row in zip(probabilities, rows, strict=True)
    ]


def main(checkpoint: str) -> None:
    """Prints the classes of each text."""
    for text, found in zip(TEXTS, classes(checkpoint, TEXTS), strict=True):
        print(text, " ".join(f"{name} {probability:.2f}" for name, probability in found))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        architecture = "Qwen3ForSequenceClassification"
        small = make_checkpoint(f"{work}/tiny", "tiny", architecture=architecture, labels=("bad", "good"))
        main(*sys.argv[1:] or (str(small),))
