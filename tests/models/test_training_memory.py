"""The plan of training has the bytes of what is allocated: parameters, gradients, optimizer state and masters."""

import jax
import optax
import pytest
import trainings
from flax import nnx
from trainings import POLICIES, TOKENS, divided, loss_of, model_under, nbytes

from perparam import Policy
from perparam.training import value_and_grad, with_policy

EIGHT_BITS = Policy(
    trainings.FP8, **trainings.BF16, grads="bf16", master={"embedding": None, "default": "f32"},
    opt_state={"{mu,nu}/**/kernel": "dynamic8", "mu": "bf16"},
)  # fmt: skip
CASES = {**POLICIES, "8-bit moments": EIGHT_BITS, "delayed scales": POLICIES["FP8, stochastic rounding"]}


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_what_is_allocated(name):
    policy, lora = CASES[name], name == "LoRA over FP8"
    tx = with_policy(optax.adamw(1e-3), policy, scales="delayed" if name == "delayed scales" else "fresh")
    model = model_under(policy, lora=lora)
    plan = policy.explain(model, optimizer=tx, trainable="**/lora_{a,b}" if lora else "**")
    graphdef, trainable, frozen = divided(model, lora)
    state = tx.init(trainable)
    assert plan.total_bytes == nbytes(trainable) + nbytes(frozen)
    assert plan.training.optimizer_bytes == nbytes(state)
    assert plan.training.master_bytes == nbytes(state.master)
    assert plan.training.amax_bytes == nbytes(state.amax)
    assert (plan.training.master_bytes > 0) == (policy.master != Policy().master)

    def loss(trainable):
        return loss_of(nnx.merge(graphdef, nnx.State(trainable), nnx.State(frozen))(TOKENS), TOKENS)

    _, gradients = jax.eval_shape(value_and_grad(loss, policy=policy), trainable)
    assert plan.training.gradient_bytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(gradients))
