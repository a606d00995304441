"""SmolLM2-135M-Instruct against Hugging Face transformers, and under each policy of the published table.

    PERPARAM_SMOLLM2=… PERPARAM_TORCH_PYTHON=… python -m pytest -m real

Both variables are optional: the folder that keeps the model, and an interpreter that has what README.md lists.
"""

import importlib
import json
import pathlib
import subprocess

import checkpoints
import numpy as np
import pytest
from checkpoints import relative_error
from real import table
from real.smollm2 import HERE, POLICIES, model_folder, plain_environment, text, torch_python

import perparam
from perparam.loaders.windows import WINDOW
from perparam.policies.trees import parameters

pytestmark = [pytest.mark.real, pytest.mark.optimised, pytest.mark.filterwarnings("ignore:blocks of .* do not divide")]

FLOAT32_ERROR = 1e-5
"""Frobenius norm of the difference over that of transformers' logits. A float32 sum of n products in 16 lanes has a
relative error of about sqrt(n / 16) * 2**-24. A layer has six matmuls with n = 576 and one with n = 1536, in the mean
square 6.7 * 2**-24 each; 30 layers have 210, and both sides round: sqrt(2 * 210) * 6.7 * 2**-24 = 8.2e-6."""

TABLE_ERROR = 1e-4
"""`compare` sums the 256 numbers of a window in float32, which errs by 256 * 2**-24 = 1.5e-5 at most, and its program
has a mask. Seen: 5e-6."""

GREEDY_TOKENS = 64

QUESTIONS = (
    "What is the capital of France? Answer in one sentence.",
    "Write a haiku about the sea.",
    "Explain in two sentences what a matrix is.",
)

TEXTS = (
    "", " ", "\n\n", "Sir Walter Elliot, of Kellynch Hall", "  two  spaces\tand a tab", "In 1818, 3.14159 and 10,000",
    "naïve café, 東京, Ελλάδα, 🙂 and \U0001f469\u200d\U0001f467", "it's they'll I'D",
    "def f(x):\n    return x**2  # ≤ ½", "<|im_start|>user\nHi<|im_end|>", "half a <|im_start", "\ufffd\x00\x7f",
    "a" * 300,
)  # fmt: skip

STORED = {"fp8": "float8_e4m3fn", "mxfp8": "float8_e4m3fn", "int8": "int8", "bf16": "bfloat16", "f32": "float32"}
"""The dtype of kernels by the beginning of a policy's name."""

GRIDS = {
    "self_attn/q_proj": (5, 5), "self_attn/k_proj": (2, 5), "self_attn/v_proj": (2, 5), "self_attn/o_proj": (5, 5),
    "mlp/gate_proj": (12, 5), "mlp/up_proj": (12, 5), "mlp/down_proj": (5, 12),
}  # fmt: skip
"""Scales of 128×128 blocks: 576 = 4.5 blocks, 192 = 1.5 and 1536 = 12."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def theirs(folder, tmp_path_factory):
    """What transformers makes of TEXTS and QUESTIONS: the JSON result, and the logits of each prompt."""
    result = tmp_path_factory.mktemp("transformers") / "result"
    subprocess.run(
        [torch_python(), HERE / "transformers_smollm2.py", folder, result, str(GREEDY_TOKENS)], check=True, timeout=600,
        input=json.dumps({"texts": TEXTS, "questions": QUESTIONS}), text=True, env=plain_environment(),
    )  # fmt: skip
    with np.load(f"{result}.npz") as file:
        logits = [file[str(i)] for i in range(len(QUESTIONS))]
    return json.loads(pathlib.Path(f"{result}.json").read_text()), logits


@pytest.fixture(scope="module")
def tokenizer(folder):
    return perparam.load_tokenizer(folder)


@pytest.fixture(scope="module")
def exact(folder):
    return perparam.load_model(folder, "f32")


@pytest.fixture(scope="module")
def narrow(folder):
    return perparam.load_model(folder, "fp8_weight_only")


def prompt_of(tokenizer, question):
    return tokenizer.apply_chat_template([{"role": "user", "content": question}])


def test_token_ids_are_those_of_transformers(tokenizer, theirs):
    assert [tokenizer.encode(each) for each in TEXTS] == theirs[0]["texts"]


def test_every_digit_is_a_token(tokenizer):
    assert len(tokenizer.encode("1818")) == 4


@pytest.mark.parametrize("i", range(len(QUESTIONS)))
def test_chat_prompts_are_those_of_transformers(tokenizer, theirs, i):
    answer = theirs[0]["answers"][i]
    prompt = prompt_of(tokenizer, QUESTIONS[i])
    assert prompt == answer["prompt"]
    assert tokenizer.encode(prompt, add_special_tokens=False) == answer["ids"]


@pytest.mark.parametrize("i", range(len(QUESTIONS)))
def test_float32_logits_are_those_of_transformers(exact, theirs, i):
    ids = np.array(theirs[0]["answers"][i]["ids"])[None]
    error = relative_error(checkpoints.logits(exact, ids)[0], theirs[1][i])
    print(f"{error:.2e} of {FLOAT32_ERROR:.0e}")
    assert error <= FLOAT32_ERROR


@pytest.mark.parametrize("i", range(len(QUESTIONS)))
def test_greedy_answers_are_those_of_transformers(exact, tokenizer, theirs, i):
    (answer,) = perparam.generate_text(exact, tokenizer, prompt_of(tokenizer, QUESTIONS[i]), GREEDY_TOKENS)
    assert list(answer.tokens) == theirs[0]["answers"][i]["tokens"]
    assert answer.text == theirs[0]["answers"][i]["text"]


@pytest.mark.parametrize("name", POLICIES)
def test_the_answer_is_paris_under_every_policy(folder, tokenizer, name):
    model = perparam.load_model(folder, POLICIES[name])
    stored = next(dtype for start, dtype in STORED.items() if name.startswith(start))
    assert parameters(model)["layers/0/self_attn/q_proj/kernel"].dtype == stored
    # Without "Answer in one sentence", float32 itself prefers "The" to the French "L" by 0.1 in the logits.
    (answer,) = perparam.generate_text(model, tokenizer, prompt_of(tokenizer, QUESTIONS[0]), 32)
    print(f"{name}: {answer.text!r}")
    assert "Paris" in answer.text


def test_grids_of_scales_are_ragged(narrow):
    stored = parameters(narrow)
    shapes = {name: stored[f"layers/29/{name}/scale_inv"].shape for name in GRIDS}
    assert shapes == GRIDS


def test_a_saved_fp8_checkpoint_has_the_same_logits_bit_for_bit(narrow, tokenizer, tmp_path):
    saved = perparam.save_model(narrow, tmp_path / "saved", "fp8_weight_only")
    stored = checkpoints.read(saved)
    names = {name: f"model.layers.0.{name.replace('/', '.')}.weight_scale_inv" for name in GRIDS}
    assert {name: stored[names[name]].shape for name in GRIDS} == GRIDS
    again = perparam.load_model(saved, "fp8_weight_only")
    ids = np.array(tokenizer.encode(text())[:64])[None]
    np.testing.assert_array_equal(checkpoints.logits(again, ids), checkpoints.logits(narrow, ids))


def test_the_text_has_50_000_tokens(tokenizer):
    assert len(tokenizer.encode(text())) >= 50_000


def test_the_table_is_that_of_compare_and_continues_where_it_stopped(folder, tokenizer, tmp_path, monkeypatch):
    policies = {name: POLICIES[name] for name in ("f32", "int8, one scale a row")}
    ids, results = np.array(tokenizer.encode(text()))[: 2 * WINDOW], tmp_path / "results.jsonl"
    table.measure(folder, ids, policies, results)
    whole = results.read_text().splitlines(keepends=True)
    assert len(whole) == 4
    results.write_text("".join(whole[:3]))
    table.measure(folder, ids, policies, results)
    assert results.read_text().splitlines(keepends=True) == whole

    monkeypatch.setattr(importlib.import_module("perparam.loaders.compare"), "_speed", lambda *_: 1.0)
    expected = perparam.compare(folder, policies, ids).rows
    found = list(table.rows(folder, policies, results, windows=2))
    for row, compared in zip(found, expected, strict=True):
        assert (row.name, row.bytes, row.kv_bytes) == (compared.name, compared.bytes, compared.kv_bytes)
        assert row.perplexity == pytest.approx((compared.perplexity, compared.perplexity_error), rel=TABLE_ERROR)
        assert row.kl.value == pytest.approx(compared.kl, rel=TABLE_ERROR)
        assert row.top1.value == pytest.approx(compared.top1, abs=TABLE_ERROR)
    ratio = expected[1].perplexity / expected[0].perplexity
    assert found[1].excess.value == pytest.approx(ratio - 1, abs=TABLE_ERROR)
