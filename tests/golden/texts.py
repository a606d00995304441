"""Embeddings and scores of texts, computed in torch as the model cards of Qwen3-Embedding and Qwen3-Reranker do."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))
from small_tokenizer import WORDS, write_json, write_tokenizer

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
TEXTS = (
    "What is the weather in the city?",
    "",
    "hello 你好 world",
    "The assistant is there. " * 14,
    "é",
    "What is a question, and what is the answer?",
)
QUERY = "What is the weather?"
MAX_LENGTH = {"embed": 140, "rerank": 336}
"""Less than the longest text has: it is truncated."""


def results_of_texts(kind: str, model: PreTrainedModel, folder: Path) -> dict[str, np.ndarray]:
    """Arrays for expected.npz; writes the tokenizer and `texts.json` into the checkpoint's folder."""
    appended = "<|endoftext|>" if kind == "embed" else None
    write_tokenizer(folder, words=(*WORDS, "yes", "no"), append=appended)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", config | {"chat_template": None})
    (folder / "generation_config.json").unlink()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")
    length = MAX_LENGTH[kind]
    values = {"texts": TEXTS, "instruction": INSTRUCTION, "query": QUERY, "max_length": length}
    write_json(folder / "texts.json", values)
    if kind == "rerank":
        return {"scores": scores(model, tokenizer, length)}
    queries = [f"Instruct: {INSTRUCTION}\nQuery:{text}" for text in TEXTS]
    return {
        "documents": embeddings(model, tokenizer, list(TEXTS), length),
        "queries": embeddings(model, tokenizer, queries, length),
        "documents_of_16": embeddings(model, tokenizer, list(TEXTS), length, 16),
    }


def embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int, dimensions: int = -1
) -> np.ndarray:
    """(texts, dimensions) float32."""
    batch = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    assert (batch["attention_mask"].sum(1) == length).any(), "no text is truncated"
    with torch.no_grad():
        last = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state[:, -1]
    last = last[:, :dimensions] if dimensions > 0 else last
    return torch.nn.functional.normalize(last, p=2, dim=1).numpy()


def scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, length: int) -> np.ndarray:
    """(texts,) float32: the probability of "yes" after the prompt of each text, as against "no"."""
    system = (
        "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
        'Note that the answer can only be "yes" or "no".'
    )
    before = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
    after = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    before, after = (tokenizer.encode(text, add_special_tokens=False) for text in (before, after))
    pairs = [f"<Instruct>: {INSTRUCTION}\n<Query>: {QUERY}\n<Document>: {text}" for text in TEXTS]
    room = length - len(before) - len(after)
    middle = tokenizer(pairs, truncation="longest_first", max_length=room, return_attention_mask=False)["input_ids"]
    assert any(len(ids) == room for ids in middle), "no text is truncated"
    assert any(len(ids) < room for ids in middle), "every text is truncated"
    rows = [before + ids + after for ids in middle]
    batch = tokenizer.pad({"input_ids": rows}, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits[:, -1]
    chosen = logits[:, [tokenizer.convert_tokens_to_ids(token) for token in ("no", "yes")]]
    return chosen.log_softmax(1)[:, 1].exp().numpy()
