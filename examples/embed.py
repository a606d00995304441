"""Search by meaning: the documents whose embeddings are nearest to those of queries.

    python -m perparam.examples.embed [CHECKPOINT]

CHECKPOINT is a folder or a name on the Hugging Face hub, such as Qwen/Qwen3-Embedding-0.6B. Without one, a small
checkpoint with random weights is made, whose answers mean nothing.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence

import numpy as np

import perparam
from perparam.examples.make_checkpoint import make_checkpoint

TASK = "Given a web search query, retrieve relevant passages that answer the query"
QUERIES = ("What is the capital of China?", "Explain gravity")
DOCUMENTS = (
    "The capital of China is Beijing.",
    "Gravity is a force that attracts two bodies towards each other.",
    "Copper is a soft and ductile metal.",
)


def similarities(checkpoint: str, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
    """The cosine of the angle between the embeddings of each query and each document, (queries, documents)."""
    model, tokenizer = perparam.load_model(checkpoint), perparam.load_tokenizer(checkpoint)
    # Queries are preceded by the task, documents are not.
    of_queries = perparam.embed(model, tokenizer, queries, instruction=TASK)
    return of_queries @ perparam.embed(model, tokenizer, documents).T


def main(checkpoint: str) -> None:
    """Prints the best document for each query."""
    table = similarities(checkpoint, QUERIES, DOCUMENTS)
    for query, row in zip(QUERIES, table, strict=True):
        print(f"{query} {row.max():.3f} {DOCUMENTS[row.argmax()]}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        main(*sys.argv[1:] or (str(make_checkpoint(f"{work}/tiny", "tiny", architecture="Qwen3Model")),))
