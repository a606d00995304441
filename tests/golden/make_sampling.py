"""Write the golden logits: what Hugging Face transformers' processors make of random ones, in `sampling.npz`.

    python tests/golden/make_sampling.py

needs torch and transformers. `sampling.npz` then holds

    logits           float32 [rows, vocabulary]
    prompt, answer   int32 [rows, time], the tokens so far
    cases            JSON of each case: {"temperature": 0.7, ...}, what is left out having no effect
    processed        float32 [cases, rows, vocabulary], -inf where a token is filtered out

The processors stand in the order in which `GenerationMixin._get_logits_processor` puts them.
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

ROWS, VOCABULARY, PROMPT, ANSWER = 6, 61, 9, 5
PROCESSORS = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}
ALONE = {
    "repetition_penalty": (0.5, 1.1, 2.0),
    "temperature": (0.1, 0.7, 1.5, 10.0),
    "top_k": (1, 5, 60, 1000),
    "top_p": (0.05, 0.5, 0.9, 0.999),
    "min_p": (0.001, 0.1, 0.5, 1.0),
}
TOGETHER = [
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.5, "min_p": 0.1},
    {"temperature": 2.0, "top_p": 0.9, "min_p": 0.05},
    {"top_k": 10, "min_p": 0.2},
    {"repetition_penalty": 1.3, "temperature": 0.8, "top_p": 0.9},
    {"repetition_penalty": 1.3, "temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
]
CLOSE = 1e-5
"""No sum of shares is nearer than this to where top_p cuts, nor, as a part of it, a share to where min_p does."""


def check_margins(case: dict, logits: torch.Tensor) -> None:
    """Fails where rounding could decide what is filtered out."""
    shares = logits.double().softmax(-1).sort(-1, descending=True).values
    if "top_p" in case:
        assert (shares.cumsum(-1) - case["top_p"]).abs().min() > CLOSE, case
    if 0 < case.get("min_p", 1) < 1:
        assert ((shares / shares[:, :1] / case["min_p"]).log().abs() > CLOSE).all(), case


def main() -> None:
    rng = np.random.default_rng(0)
    logits = (2 * rng.normal(size=(ROWS, VOCABULARY))).astype(np.float32)
    prompt = rng.integers(0, VOCABULARY, (ROWS, PROMPT)).astype(np.int32)
    answer = rng.integers(0, VOCABULARY, (ROWS, ANSWER)).astype(np.int32)
    cases = [{name: value} for name, values in ALONE.items() for value in values] + TOGETHER
    tokens = torch.from_numpy(np.concatenate([prompt, answer], axis=1)).long()
    processed = []
    for case in cases:
        scores = torch.from_numpy(logits.copy())
        for name, processor in PROCESSORS.items():
            if name in case:
                check_margins({name: case[name]}, scores)
                scores = LogitsProcessorList([processor(case[name])])(tokens, scores)
        processed.append(scores.numpy())
    np.savez_compressed(
        Path(__file__).parent / "sampling.npz",
        logits=logits, prompt=prompt, answer=answer, cases=np.array([json.dumps(case) for case in cases]),
        processed=np.stack(processed),
    )  # fmt: skip


if __name__ == "__main__":
    main()
