"""What the proofs of training share: a small model, policies, and runs that learn a few sequences by heart."""

import functools

import jax
import numpy as np
import optax
from flax import nnx

from perparam import Policy
from perparam.models import Qwen3, Qwen3Config
from perparam.policies import parameters
from perparam.training import add_lora, value_and_grad, with_policy

CONFIG = Qwen3Config(
    vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
)  # fmt: skip

_RNG = np.random.default_rng(0)
TOKENS = np.concatenate([np.arange(4)[:, None], _RNG.integers(0, 32, (4, 15))], axis=1)
"""Four random sequences, each with another first token, so that a model can know all tokens but the first."""

FP8 = {"kernel": "f8_e4m3fn", "default": "bf16"}
NARROW = {"**/{kernel,embedding}": "f8_e4m3fn", "default": "bf16"}
BF16 = {"compute": {"kernel": None, "default": "bf16"}, "output": "f32", "block": (32, 32)}

POLICIES = {
    "f32": Policy("f32", "f32", "f32"),
    "bf16 and masters": Policy("bf16", "bf16", "f32", master="f32"),
    "FP8 and masters": Policy(FP8, **BF16, master="f32"),
    "FP8, stochastic rounding": Policy(FP8, **BF16),
    "LoRA over FP8": Policy({"**/lora_{a,b}?": "f32", **FP8}, **BF16),
}
"""The policies of the proofs, by name.  Those without masters round stochastically, but for "f32"."""

STOCHASTIC = ("FP8, stochastic rounding",)


def model_under(policy, *, lora=False, config=CONFIG):
    """A model with random parameters; with `lora`, with adapters of rank 8 beside all kernels."""
    model = Qwen3(config, policy=policy, rngs=nnx.Rngs(0))
    return add_lora(model, 8, 16, ("layers/**", "lm_head"), rngs=nnx.Rngs(1)) if lora else model


def loss_of(logits, tokens):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


@functools.partial(jax.jit, static_argnames=("graphdef", "tx", "steps"))
def run(graphdef, trainable, frozen, *, tx, steps, tokens=TOKENS):
    """`(losses, trainable parameters, optimizer state)` after `steps` steps in one compiled program.

    trainable, frozen  the two parts of a model's state, as pure dictionaries
    """

    def loss(trainable):
        return loss_of(nnx.merge(graphdef, nnx.State(trainable), nnx.State(frozen))(tokens), tokens)

    def step(carry, _):
        trainable, state = carry
        value, gradients = value_and_grad(loss)(trainable)
        updates, state = tx.update(gradients, state, trainable)
        return (optax.apply_updates(trainable, updates), state), value

    (trainable, state), losses = jax.lax.scan(step, (trainable, tx.init(trainable)), None, length=steps)
    return losses, trainable, state


def divided(model, lora=False):
    """`(graphdef, trainable, frozen)` of a model; with `lora`, its adapters are trainable, otherwise all parameters."""
    graphdef, trainable, frozen = nnx.split(model, nnx.LoRAParam if lora else ..., ...)
    return graphdef, nnx.to_pure_dict(trainable), nnx.to_pure_dict(frozen)


def overfitted(policy, steps, learning_rate, *, rounding="nearest", lora=False, config=CONFIG):
    """`(losses, model)` of Adam, whose rate falls linearly to zero, on TOKENS."""
    graphdef, trainable, frozen = divided(model_under(policy, lora=lora, config=config), lora)
    tx = with_policy(optax.adam(optax.linear_schedule(learning_rate, 0.0, steps)), policy, rounding=rounding)
    losses, trainable, _ = run(graphdef, trainable, frozen, tx=tx, steps=steps)
    return np.asarray(losses), nnx.merge(graphdef, nnx.State(trainable), nnx.State(frozen))


def nbytes(tree):
    """Bytes of the arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def arrays(model):
    """The arrays of a model by path."""
    return parameters(nnx.state(model))
