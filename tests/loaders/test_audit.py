"""`audit`: errors of parameters and logits, beside what numpy computes from the same files."""

import importlib
import json
import re

import checkpoints
import numpy as np
import pytest
from checkpoints import BF16, fields, relative_error, tensors, write

import perparam
from perparam import Policy
from perparam.policies.errors import InvalidTokens, UnmatchedRule

WINDOWS = importlib.import_module("perparam.loaders.windows")
UP = "layers/0/mlp/up_proj/kernel"
IDS = np.array([[3, 14, 15, 9, 26, 5], [35, 8, 9, 7, 60, 60]])
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])

E4M3_RMS = (2e-2, 3.5e-2)
"""Rounding to four significant bits: uniform within 2**-4 of the exponent, 0.42 * 2**-4 = 2.7e-2 rms on average; small
values of a block, of which there are few in a normal distribution, come off worse."""

FLOAT32_SUM = 1e-4
"""A float32 error over a float32 norm: sums of some thousand squares, and differences of numbers 100 times as large."""

KL_ERROR = 1e-6
"""Probabilities of order one rounded to float32, 61 of them a token: 61 * 2**-24 = 4e-6 at the very worst."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """An unquantised checkpoint."""
    config = fields(quantization_config=None, num_hidden_layers=1)
    return write(tmp_path_factory.mktemp("plain"), config, tensors(config))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """An FP8 checkpoint."""
    config = fields(num_hidden_layers=1)
    return write(tmp_path_factory.mktemp("narrow"), config, tensors(config))


@pytest.fixture(scope="module")
def quantised(plain):
    """The audit of quantising in blocks of (16, 24)."""
    return perparam.audit(plain, QUANTISE, IDS, MASK)


@pytest.fixture(scope="module")
def kept(narrow):
    """The audit of changing nothing."""
    return perparam.audit(narrow, Policy(compute="f32"), IDS, MASK)


QUANTISE = Policy({"lm_head/kernel": None, "kernel": "f8_e4m3fn"}, "f32", block=(16, 24))


def rows(audit):
    return {row.plan.path: row for row in audit.rows}


def likelihoods(logits):
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_what_is_kept_costs_nothing(kept):
    assert {(row.error, row.worst_error, row.saturated) for row in kept.rows} == {(0.0, 0.0, 0.0)}
    assert kept.logit_error <= 1e-5  # the same weights, widened within the program: float error only
    assert kept.top1 == 1.0


def test_there_is_one_row_a_parameter_and_none_for_scales(kept, narrow):
    names = [checkpoints.checkpoint_name(row.plan.path) for row in kept.rows]
    assert sorted(names) == sorted(name for name in checkpoints.read(narrow) if not name.endswith("_scale_inv"))


@pytest.mark.slow
def test_quantising_to_e4m3_costs_what_four_bits_cost(quantised):
    errors = {path: row.error for path, row in rows(quantised).items() if path.endswith("_proj/kernel")}
    assert len(errors) == 7
    assert all(E4M3_RMS[0] <= error <= E4M3_RMS[1] for error in errors.values())
    assert rows(quantised)["lm_head/kernel"].error == 0.0


def test_a_row_is_what_numpy_computes(plain, quantised):
    exact = checkpoints.read(plain)[checkpoints.checkpoint_name(UP)].astype(np.float64)
    scales = np.array(
        [
            [np.abs(exact[top : top + 16, left : left + 24]).max() / 448 for left in range(0, 56, 24)]
            for top in range(0, 76, 16)
        ]
    )
    spread = np.kron(scales, np.ones((16, 24)))[:76, :56]
    stored = (exact / spread).astype(np.float32).astype(checkpoints.F8).astype(np.float64) * spread
    row = rows(quantised)[UP]
    assert row.error == pytest.approx(relative_error(stored, exact), rel=FLOAT32_SUM)
    blocks = {
        (i, j): relative_error(*(x[16 * i : 16 * i + 16, 24 * j : 24 * j + 24] for x in (stored, exact)))
        for i, j in np.ndindex(5, 3)
    }
    assert row.worst_block == max(blocks, key=blocks.get)
    assert row.worst_error == pytest.approx(max(blocks.values()), rel=FLOAT32_SUM)


def test_a_blocks_largest_value_is_not_called_saturated(quantised):
    assert {row.saturated for row in quantised.rows} == {0.0}


def test_a_cast_is_rounded_and_what_saturates_counted(tmp_path):
    config = fields(quantization_config=None, num_hidden_layers=1)
    stored = tensors(config)
    name = "model.embed_tokens.weight"
    table = stored[name].astype(np.float32)
    table[60, :5] = [1e5, -1e5, 3e38, 1e-3, 6e4]  # three beyond float16's 65504
    stored[name] = table.astype(BF16)
    policy = Policy({"embedding": "f16", "lm_head/kernel": "f16"}, "f32")
    found = rows(perparam.audit(write(tmp_path, config, stored), policy, IDS))
    assert found["embed_tokens/embedding"].saturated == pytest.approx(3 / table.size)
    exact = stored["lm_head.weight"].astype(np.float32)
    assert found["lm_head/kernel"].error == pytest.approx(
        relative_error(exact.astype(np.float16), exact), rel=FLOAT32_SUM
    )
    assert found["lm_head/kernel"].saturated == 0.0
    assert found["lm_head/kernel"].worst_block == ()


def test_logits_are_compared_over_real_tokens(plain, quantised):
    exact = checkpoints.logits(perparam.load_model(plain, "f32"), IDS, MASK)
    found = checkpoints.logits(perparam.load_model(plain, QUANTISE), IDS, MASK)
    real = MASK != 0
    log_p, log_q = likelihoods(exact[real]), likelihoods(found[real])
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    assert quantised.tokens == 10
    assert quantised.logit_error == pytest.approx(relative_error(found, exact, MASK), rel=1e-3)
    assert quantised.kl == pytest.approx(divergence, abs=KL_ERROR)
    assert quantised.kl > 100 * KL_ERROR
    assert quantised.top1 == (exact[real].argmax(-1) == found[real].argmax(-1)).mean()


def test_the_plan_is_the_policys(plain, quantised):
    planned = {row.path: row for row in QUANTISE.explain(perparam.checkpoint_tree(plain)).rows}
    assert {row.path: row for row in quantised.plan.rows} == planned


@pytest.mark.slow
def test_a_model_is_audited_as_its_folder_and_left_as_it_was(plain, quantised):
    model = perparam.load_model(plain)
    before = checkpoints.arrays(model)
    again = perparam.audit(model, QUANTISE, IDS, MASK)
    assert (again.rows, again.kl, again.top1) == (quantised.rows, quantised.kl, quantised.top1)
    after = checkpoints.arrays(model)
    assert all(after[path] is before[path] for path in before)


@pytest.mark.slow
def test_one_row_may_be_flat_and_a_text_is_its_ids(plain, tmp_path, monkeypatch):
    model = perparam.load_model(plain)
    flat = perparam.audit(model, QUANTISE, IDS[1], MASK[1])
    assert (flat.kl, flat.tokens) == (perparam.audit(model, QUANTISE, IDS[1:], MASK[1:]).kl, 4)
    monkeypatch.setattr(WINDOWS, "load_tokenizer", lambda path, revision: _Letters() if path == plain else None)
    assert perparam.audit(model, QUANTISE, text="abc").kl == perparam.audit(model, QUANTISE, [[1, 2, 3]]).kl
    with pytest.raises(InvalidTokens, match="expected tokens or text, found both"):
        perparam.audit(model, QUANTISE, [1], text="a")


class _Letters:
    def encode(self, text):
        return [ord(letter) - ord("a") + 1 for letter in text]


@pytest.mark.slow
def test_a_long_row_is_audited_in_windows(plain, quantised, monkeypatch):
    monkeypatch.setattr(WINDOWS, "WINDOW", 3)
    cut = perparam.audit(plain, QUANTISE, IDS[0])
    monkeypatch.undo()
    assert cut.tokens == 6
    assert cut.kl == pytest.approx(perparam.audit(plain, QUANTISE, IDS[0].reshape(2, 3)).kl, rel=1e-5)


def test_json_has_a_line_a_parameter(quantised):
    lines = quantised.to_json().splitlines()
    found = json.loads("\n".join(lines))
    assert len(found["rows"]) == len(quantised.rows) == len(lines) - 3
    assert found["kl"] == quantised.kl
    assert {row["path"]: row["error"] for row in found["rows"]}[UP] == rows(quantised)[UP].error


def test_it_prints_what_changes_the_worst_first(quantised):
    lines = str(quantised).splitlines()
    assert lines[0].split() == ["path", "change", "error", "worst", "block", "at", "saturated"]
    table = [line.split() for line in lines[1 : lines.index("")]]
    assert len(table) == 7
    shown = [float(cells[2]) for cells in table]
    assert shown == sorted(shown, reverse=True)
    assert all(cells[0].endswith("_proj/kernel") and cells[1] == "quantised" for cells in table)
    assert re.search(
        r"10 tokens against float32: logits off by \S+ \(relative\), KL \S+ nats, top-1 agreement", str(quantised)
    )


def test_nothing_changed_prints_as_that(kept):
    assert "storage changes no parameter" in str(kept)


@pytest.mark.parametrize(
    ("tokens", "mask"),
    [
        (None, None),
        ([[1, 2]], [[1]]),
        ([[1, 2]], [[0, 0]]),
        ([1, 2], [[1], [1, 1]]),
        ([[0.5, 1.0]], None),
        ([[1, 61]], None),
        ([[-1, 1]], None),
    ],
    ids=["none", "another mask", "nothing real", "a ragged mask", "floats", "beyond the vocabulary", "negative"],
)
def test_tokens_that_no_model_takes_are_refused(narrow, tokens, mask):
    with pytest.raises(InvalidTokens, match=r"expected|outside the vocabulary|different length"):
        perparam.audit(narrow, Policy(compute="f32"), tokens, mask)


@pytest.mark.parametrize("slot", ["params", "compute"])
def test_a_rule_that_decides_nothing_is_refused(narrow, slot):
    with pytest.raises(UnmatchedRule, match="'kernal'"):
        perparam.audit(narrow, {slot: {"kernal": "f32"}}, IDS)
