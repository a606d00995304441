"""Reranking: the documents that a search found, in the order in which a language model finds that they answer a query.

    python -m perparam.examples.rerank [CHECKPOINT]

CHECKPOINT is a folder or a name on the Hugging Face hub, such as Qwen/Qwen3-Reranker-0.6B. Without one, a small
checkpoint with random weights is made, whose answers mean nothing.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence

import perparam
from perparam.examples.make_checkpoint import make_checkpoint

QUERY = "What is the capital of China?"
DOCUMENTS = (
    "Gravity is a force that attracts two bodies towards each other.",
    "The capital of China is Beijing.",
    "China is a country in East Asia.",
)


def ranking(checkpoint: str, query: str, documents: Sequence[str]) -> list[tuple[float, str]]:
    """The documents with their scores, the best first."""
    model, tokenizer = perparam.load_model(checkpoint), perparam.load_tokenizer(checkpoint)
    scores = perparam.rerank(model, tokenizer, query, documents)
    return sorted(zip(scores.tolist(), documents, strict=True), reverse=True)


def main(checkpoint: str) -> None:
    """Prints the documents, the best first."""
    for score, document in ranking(checkpoint, QUERY, DOCUMENTS):
        print(f"{score:.3f} {document}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        main(*sys.argv[1:] or (str(make_checkpoint(f"{work}/tiny", "tiny", words=("yes", "no"))),))
