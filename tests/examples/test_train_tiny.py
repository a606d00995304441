"""The training of the tiny model: its batches, its measure, a short run, and the checkpoint that perparam contains."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from checkpoints import relative_error
from flax import nnx

import perparam
from perparam.commands import demo
from perparam.examples import tiny_card, tiny_text, train_tiny

SMALL = dataclasses.replace(
    train_tiny.CONFIG,
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
)
CHAPTER = "In the beginning God created the heaven and the earth.\nAnd God said, Let there be light.\n"
TEXT = "\n".join([CHAPTER] * 60)

# Float32 sums of at most 300 exponentials or 64 products a logit, over three norms, agree to 2**-24 * sqrt(300) * 10.
FLOAT32_ERROR = 1e-5
# Perplexities of the card, printed with three digits, in other instruction sets: losses of bfloat16 logits that differ
# by a rounding, 2**-9 of logits of up to 20, in the mean over 2,000 tokens with random signs.
CARD = 2e-3


@pytest.fixture(autouse=True)
def promotion():
    """optax computes with Python numbers and counts, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_text.trained_tokenizer(TEXT, SMALL.vocab_size)


def test_an_epoch_has_each_row_once_and_rows_are_pieces_of_the_text():
    tokens, drawn = np.arange(1000), train_tiny.batches(np.arange(1000), rows=4, length=20)
    epoch = [next(drawn) for _ in range(12)]
    starts = np.concatenate([batch[:, 0] for batch in epoch])
    assert len(set(starts.tolist())) == 48
    assert len(set(starts % 20)) == 1
    for batch in epoch:
        assert batch.shape == (4, 21)
        np.testing.assert_array_equal(batch, tokens[batch[:, :1] + np.arange(21)])
    assert set(next(drawn)[:, 0] % 20) != set(starts % 20)


@pytest.mark.slow
def test_bits_per_byte_count_each_token_once_with_half_a_window_of_context():
    model = perparam.models.Qwen3(SMALL, policy="f32", rngs=nnx.Rngs(0))
    before, tokens = np.arange(40) % 300, (7 * np.arange(45)) % 300
    found = train_tiny.bits_per_byte(model, before, tokens, 100, length=16)
    stream = np.concatenate([before, tokens])
    nats = 0.0
    for start in range(40, 85, 8):
        rows = stream[start - 9 : start + 7][None].astype(np.int32)
        rows = rows[:, : 84 - (start - 9)]  # the last window is short
        log_p = np.asarray(jax.nn.log_softmax(model(rows)[0]), np.float64)
        for place in range(8, rows.shape[1]):
            nats -= log_p[place, stream[start - 9 + place + 1]]
    assert found == pytest.approx(nats / np.log(2) / 100, rel=FLOAT32_ERROR)


@pytest.mark.slow
def test_a_short_run_learns_and_saves_a_checkpoint_that_loads(tokenizer, tmp_path, capsys):
    ids = tiny_text.encoded(tokenizer, TEXT)
    recipe = train_tiny.Recipe(steps=40, batch=4)
    part = ids[:200], len(tokenizer.decode(ids[:200].tolist(), skip_special_tokens=False).encode())
    model, history = train_tiny.train(SMALL, train_tiny.POLICY, recipe, ids, part, length=32)
    assert {array.dtype.name for array in jax.tree.leaves(nnx.state(model))} == {"bfloat16"}
    assert history.losses[-1] < 0.7 * history.losses[0]
    assert history.validation[-1][1] < history.validation[0][1]
    assert len(history.losses) == history.validation[-1][0] == 40
    assert "step 40 of 40, " in capsys.readouterr().out
    (tmp_path / "README.md").write_text("stays")
    train_tiny.save(model, tokenizer, TEXT, tmp_path)
    saved = perparam.load_model(tmp_path)
    for path, array in checkpoints.arrays(model).items():
        np.testing.assert_array_equal(array, checkpoints.arrays(saved)[path])
    assert (tmp_path / "README.md").read_text() == "stays"
    assert saved.config.windows == (train_tiny.LENGTH,)
    assert TEXT.startswith((tmp_path / "held_out.txt").read_text())
    train_tiny.write_history(history, recipe, tiny_text.parts(TEXT), {"model": 1.25}, tmp_path)
    card = tiny_card.card(tmp_path, ", beside other programs")
    assert "| model | 1.2500 |" in card
    assert "40 steps of 4 rows" in card
    assert "s of CPU\n  time, beside other programs.\n" in card
    assert card.count("And it came to pass|") == 3


@pytest.mark.slow
def test_the_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "history.json").write_text('{"validation": [[10, 3.0], [20, 2.0]], "held_out": {"5-gram": 2.5}}')
    tiny_card.plot(tmp_path, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_checkpoint_of_the_demo_is_small_and_stored_in_bfloat16():
    arrays = checkpoints.arrays(perparam.load_model(demo.TINY))
    assert {array.dtype.name for array in arrays.values()} == {"bfloat16"}
    assert sum(array.size for array in arrays.values()) <= 2_000_000
    needed = ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json")
    assert sum((demo.TINY / name).stat().st_size for name in needed) <= 4_000_000


def test_fp8_blocks_of_the_checkpoint_are_whole():
    plan = perparam.get_policy("fp8_weight_only").explain(perparam.checkpoint_tree(demo.TINY))
    narrow = [row for row in plan if row.format == "f8_e4m3fn"]
    assert len(narrow) == 7 * train_tiny.CONFIG.num_hidden_layers
    assert not [row.path for row in narrow if any(dim % 128 for dim in row.shape)]


@pytest.mark.slow
def test_the_card_has_the_perplexities_that_policies_have():
    card = (demo.TINY / "README.md").read_text(encoding="utf-8")
    written = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \| [^|]+ \| [\d.]+% \|$", card, re.MULTILINE))
    models = {name: perparam.load_model(demo.TINY, policy) for name, policy in demo.POLICIES.items()}
    found = demo.costs(models, demo.held_out_ids())
    assert list(written) == list(found)
    for name, cost in found.items():
        assert cost.perplexity == pytest.approx(float(written[name]), rel=CARD), name


@pytest.mark.torch
def test_transformers_computes_the_same_logits(tmp_path):
    ids = demo.held_out_ids()[None, :400]  # longer than the window of attention
    script = pathlib.Path(__file__).parent.parent / "loaders" / "transformers_logits.py"
    job = {"folder": str(demo.TINY), "dtype": "float32", "ids": ids.tolist(), "result": str(tmp_path / "result.npz")}
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    python = os.environ.get("PERPARAM_TORCH_PYTHON", sys.executable)
    run = subprocess.run(
        [python, script], input=json.dumps(job) + "\n", env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-3000:]
    ours = perparam.load_model(demo.TINY, perparam.Policy(compute="f32", output="f32"))(ids)
    assert ours.dtype == jnp.float32
    assert relative_error(np.asarray(ours), np.load(job["result"])["logits"]) <= FLOAT32_ERROR


def test_the_tokenizer_of_the_checkpoint_keeps_every_byte_of_the_excerpt():
    text = (demo.TINY / "held_out.txt").read_text(encoding="utf-8")
    saved = tokenizers.Tokenizer.from_file(str(demo.TINY / "tokenizer.json"))
    decoded = saved.decode(demo.held_out_ids().tolist(), skip_special_tokens=False)
    assert decoded.replace(tiny_text.SPECIAL[0], "\n") == text
