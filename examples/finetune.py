"""Training under a policy: mixed precision from scratch, then fine-tuning over frozen FP8 kernels.

    python -m perparam.examples.finetune

The task is small enough for a CPU: the next token is a fixed permutation of the current one.
"""

from __future__ import annotations

import functools
import tempfile

import jax
import numpy as np
import optax
from flax import nnx

import perparam
from perparam.examples.make_checkpoint import make_checkpoint

CONFIG = perparam.models.Qwen3Config(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
)
F32 = perparam.Policy(params="f32", compute="f32", output="f32")
MIXED = perparam.Policy(params="f32", compute="bf16", output="f32")
OVER_FP8 = perparam.Policy(
    # Kernels stay in FP8, as in the checkpoint; trainable parameters are float32.
    params={"kernel": None, "default": "f32"},
    compute={"kernel": None, "default": "bf16"},
    output="f32",
)


def batches(vocabulary: int, steps: int, *, rows: int = 8, length: int = 24, seed: int = 0) -> np.ndarray:
    """Token ids (steps, rows, length), in which a fixed permutation maps each token to the next one."""
    rng = np.random.default_rng(seed)
    successor = rng.permutation(vocabulary)
    tokens = [rng.integers(0, vocabulary, (steps, rows))]
    for _ in range(length - 1):
        tokens.append(successor[tokens[-1]])
    return np.stack(tokens, axis=-1)


def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy of next tokens in nats; logits (b, t, v) float32, tokens (b, t)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def train(policy: perparam.Policy, steps: int = 60, learning_rate: float = 5e-3) -> tuple[list[float], nnx.State]:
    """`(losses, parameters)` of a model trained from scratch with AdamW under `policy`, by `init` and `apply`."""
    module = functools.partial(perparam.models.Qwen3, CONFIG)
    parameters = perparam.init(module, policy, jax.random.key(0))
    optimizer = optax.chain(perparam.training.refuse_narrow(), optax.adamw(learning_rate))
    state = optimizer.init(parameters)

    @jax.jit
    def step(parameters, state, tokens):
        def loss(parameters):
            return cross_entropy(perparam.apply(module, policy, parameters, tokens), tokens)

        value, gradients = jax.value_and_grad(loss)(parameters)
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, value

    losses = []
    for tokens in batches(CONFIG.vocab_size, steps):
        parameters, state, value = step(parameters, state, tokens)
        losses.append(float(value))
    return losses, parameters


def finetune(
    model: perparam.models.Decoder, steps: int = 30, learning_rate: float = 1e-2
) -> tuple[list[float], nnx.Optimizer]:
    """`(losses, optimizer)` of AdamW on the norms and embeddings of `model`; its narrow kernels are frozen.

    Narrow kernels are not `nnx.Param`s, so they have no gradient and no optimizer state.
    """
    optimizer = nnx.Optimizer(model, optax.adamw(learning_rate), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, tokens):
        def loss(model):
            return cross_entropy(model(tokens), tokens)

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.Param))(model)
        optimizer.update(model, gradients)
        return value

    return [float(step(model, optimizer, tokens)) for tokens in batches(model.config.vocab_size, steps)], optimizer


def main() -> None:
    """Trains and fine-tunes, and prints the first and last losses."""
    for name, policy in (("f32", F32), ("f32 storage, bf16 compute", MIXED)):
        losses, _ = train(policy)
        print(f"from scratch, {name}: loss {losses[0]:.3f} to {losses[-1]:.3f}")
    with tempfile.TemporaryDirectory() as folder:
        model = perparam.load_model(make_checkpoint(folder, "tiny"), OVER_FP8)
    losses, _ = finetune(model)
    print(f"over frozen FP8 kernels: loss {losses[0]:.3f} to {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
