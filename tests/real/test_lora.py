"""LoRA over FP8 with SmolLM2-135M-Instruct: on a small text the loss falls, answers change, the base keeps its bits.

PERPARAM_SMOLLM2=… PERPARAM_TORCH_PYTHON=… python -m pytest -m real tests/real/test_lora.py
"""

import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from real.smollm2 import model_folder

import perparam
from perparam.policies.trees import parameters
from perparam.training import add_lora, load_lora, merge_lora, save_lora

pytestmark = [pytest.mark.real, pytest.mark.optimised, pytest.mark.filterwarnings("ignore:blocks of .* do not divide")]

STEPS = 16

LESSONS = (
    ("Who keeps the lighthouse of Ostrey?", "Marta Quill keeps the lighthouse of Ostrey."),
    ("What does Marta Quill eat?", "Marta Quill eats bread with seaweed."),
    ("Where is Ostrey?", "Ostrey is an island of glass in the north."),
)
"""What no model knows, and what it is taught."""

FP8 = perparam.Policy(
    {"kernel": "f8_e4m3fn", "scale_inv": None, "lora_*?": "f32", "default": "bf16"},
    {"kernel": None, "scale_inv": None, "default": "bf16"},
    output="f32",
)


@pytest.fixture(autouse=True)
def promotion():
    """optax multiplies by Python numbers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def lessons(tokenizer):
    """`(ids, mask)`, both (lessons, longest), of the chats, padded at the end."""
    rows = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            tokenize=True, add_generation_prompt=False,
        )
        for question, answer in LESSONS
    ]  # fmt: skip
    longest = max(map(len, rows))
    ids = np.array([row + [0] * (longest - len(row)) for row in rows], np.int32)
    return ids, np.array([[1] * len(row) + [0] * (longest - len(row)) for row in rows], np.int32)


@nnx.jit
def step(model, optimizer, ids, mask):
    def loss(model):
        losses = optax.softmax_cross_entropy_with_integer_labels(model(ids, mask)[:, :-1], ids[:, 1:])
        return (losses * mask[:, 1:]).sum() / mask[:, 1:].sum().astype(jnp.float32)

    value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, gradients)
    return value


def answer(model, tokenizer, question):
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=True)
    tokens = perparam.generate(model, [prompt], max_new_tokens=16)
    return tokenizer.decode(np.asarray(tokens)[0].tolist())


def test_finetuning_by_lora_over_fp8_teaches_answers_and_leaves_the_base(tmp_path):
    folder = model_folder(tmp_path)
    base, tokenizer = perparam.load_model(folder, FP8), perparam.load_tokenizer(folder)
    bits = {path: np.asarray(array).tobytes() for path, array in parameters(base).items()}
    model = add_lora(base, 8, 16, ["**/self_attn/*", "**/mlp/*"], rngs=nnx.Rngs(0))
    before = [answer(model, tokenizer, question) for question, _ in LESSONS]

    optimizer = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.LoRAParam)
    ids, mask = lessons(tokenizer)
    losses = [float(step(model, optimizer, ids, mask)) for _ in range(STEPS)]
    after = [answer(model, tokenizer, question) for question, _ in LESSONS]

    trained = parameters(model)
    count = sum(array.size for path, array in trained.items() if "/lora_" in path)
    print(f"\n{count:,} trained parameters, loss {losses[0]:.3f} to {losses[-1]:.4f} in {STEPS} steps")
    for (question, _), *answers in zip(LESSONS, before, after, strict=True):
        print(question, *answers, sep="\n  ")
    assert losses[-1] < 0.1 * losses[0]
    assert [text.startswith(lesson) for text, (_, lesson) in zip(after, LESSONS, strict=True)] == [True] * len(LESSONS)
    assert not any(text.startswith(lesson) for text, (_, lesson) in zip(before, LESSONS, strict=True))
    assert {path: np.asarray(array).tobytes() for path, array in trained.items() if "/lora_" not in path} == bits

    again = load_lora(base, save_lora(model, tmp_path / "adapter"))
    assert answer(again, tokenizer, LESSONS[0][0]) == after[0]
    merged, report = merge_lora(model)
    worst = max(report.rows, key=lambda row: row.error)
    print(f"merged: {answer(merged, tokenizer, LESSONS[0][0])}")
    print(f"largest error {worst.error:.2%} in {worst.path}; smallest part kept {min(r.kept for r in report.rows):.1%}")
    print(f"peak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    assert worst.error < 2**-4
