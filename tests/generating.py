"""What the tests of generation share: three prompts, and what full passes without a cache say of them."""

import checkpoints
import numpy as np
from checkpoints import fields, tensors, write

import perparam
from perparam import Policy, Sampling

FLOAT32_ERROR = 1e-5
"""As in test_qwen3: the same sums in another order."""

NEW, PAD = 7, 60
IDS = np.array([[3, 14, 15, 9, 26, 5], [60, 60, 9, 7, 1, 2], [50, 51, 52, 53, 54, 60]])
MASK = np.array([[1] * 6, [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])


def load(folder, **changes):
    """One layer: programs are compiled here for half a dozen shapes."""
    config = fields(num_hidden_layers=1, **changes)
    return perparam.load_model(write(folder, config, tensors(config, seed=1)), Policy(compute="f32"))


WARM = Sampling(temperature=1.3)


def ended(tokens, eos, pad=PAD):
    """The rows of `tokens` with `pad` after the first of `eos`."""
    after = np.cumsum(np.isin(tokens, eos), axis=1) - np.isin(tokens, eos) > 0
    return np.where(after, pad, tokens)


def whole_passes(model, tokens, ids=IDS, mask=MASK):
    """Logits (b, new, vocabulary) that a model without a cache gives before each of `tokens` (b, new)."""
    every = np.concatenate([np.where(mask, ids, 0), tokens], axis=1)
    real = np.concatenate([mask, np.ones_like(tokens)], axis=1)
    logits = checkpoints.logits(model, every, real)
    new = tokens.shape[1]
    before = [
        np.concatenate([logits[row : row + 1, [last]], logits[row : row + 1, -new:-1]], axis=1)
        for row, last in enumerate(mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1))
    ]
    return np.concatenate(before).astype(np.float64)
