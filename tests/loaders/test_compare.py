"""`compare`: perplexity, divergence and agreement beside what numpy makes of the same logits; bytes, table, picture."""

import gc
import importlib
import json
import math
import re
import sys
import types
import weakref

import checkpoints
import numpy as np
import pytest
from checkpoints import fields, tensors, write

import perparam
from perparam import get_policy
from perparam.loaders.compare import TEXT, Compared, Comparison, _by_name, compare
from perparam.loaders.compare_plot import _labels
from perparam.loaders.metrics import mean_and_error
from perparam.policies.errors import InvalidPolicy, InvalidTokens, MissingPackage, PerparamError

MODULE = importlib.import_module("perparam.loaders.compare")
WINDOWS = importlib.import_module("perparam.loaders.windows")
IDS = np.random.default_rng(0).integers(0, 61, 19)
WINDOW = 8
"""Two whole windows and a ragged one of three tokens."""

NARROW = {"params": {"default": "bf16", "kernel": "f8_e5m2"}, "compute": "f32", "output": "f32"}
"""Parameters that err, in programs that do not."""
POLICIES = {"f32": "f32", "narrow": NARROW, "bf16": "bf16", "fp8": "fp8_weight_only"}

FLOAT32 = 1e-4
"""Logits of order one in float32, summed in another order: some hundred times 2**-24."""

BF16 = 3e-2
"""Logits rounded to eight bits, the sums before it in another order: an ulp, 2**-8, of numbers up to four."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = fields(quantization_config=None, num_hidden_layers=1, torch_dtype="float32")
    return write(tmp_path_factory.mktemp("plain"), config, tensors(config, plain_dtype=np.float32))


@pytest.fixture(scope="module")
def found(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WINDOWS, "WINDOW", WINDOW)
        patch.setattr(MODULE, "_speed", lambda *_: 123.45)
        return compare(folder, POLICIES, IDS)


def log_softmax(logits):
    logits = logits.astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def measured(folder, policy, window):
    """Perplexity, divergence from float32 and agreement with it, window by window and without padding."""
    models = [perparam.load_model(folder, each) for each in ("f32", policy)]
    losses, divergences, same = [], [], []
    for start in range(0, len(IDS), window):
        ids = IDS[start : start + window]
        p, q = (log_softmax(checkpoints.logits(model, ids[None])[0]) for model in models)
        losses += [-q[i, following] for i, following in enumerate(ids[1:])]
        divergences += list((np.exp(p) * (p - q)).sum(-1))
        same += list(p.argmax(-1) == q.argmax(-1))
    assert len(same) == len(IDS)
    return math.exp(np.mean(losses)), np.mean(divergences), np.mean(same)


def test_the_standard_error_is_that_of_a_ratio_over_windows():
    rng = np.random.default_rng(0)
    # Errors of the mean over windows of 50 correlated tokens: each window shares a shift of standard deviation 1.
    means, errors = zip(
        *(
            mean_and_error(50 * rng.normal(size=40) + rng.normal(size=(40, 50)).sum(1), np.full(40, 50))
            for _ in range(400)
        ),
        strict=True,
    )
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)  # 400 draws know a deviation to 3.5 %
    assert math.isnan(mean_and_error(np.array([3.0]), np.array([2]))[1])


@pytest.mark.slow
def test_the_first_policy_agrees_with_itself(found):
    assert found.rows[0].kl == 0
    assert found.rows[0].top1 == 1
    assert found.tokens == len(IDS)
    assert [row.name for row in found.rows] == list(POLICIES)
    assert {row.tokens_per_second for row in found.rows} == {123.45}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tolerance"), [("f32", FLOAT32), ("narrow", FLOAT32), ("bf16", BF16)])
def test_the_measures_are_what_numpy_makes_of_the_logits(name, tolerance, found, folder):
    (row,) = (row for row in found.rows if row.name == name)
    perplexity, kl, top1 = measured(folder, POLICIES[name], WINDOW)
    assert row.perplexity == pytest.approx(perplexity, rel=tolerance)
    assert row.kl == pytest.approx(kl, rel=10 * tolerance, abs=1e-7)
    assert row.top1 == pytest.approx(top1, abs=1e-6 if tolerance == FLOAT32 else 1 / len(IDS))
    assert row.kl > 0 or name == "f32"
    assert row.top1 < 1 or name != "narrow"  # so that agreement is tested


@pytest.mark.slow
def test_windows_matter_and_a_text_may_be_shorter_than_one(folder, found, monkeypatch):
    monkeypatch.setattr(MODULE, "_speed", lambda *_: 0.0)
    whole = compare(folder, {"f32": "f32", "narrow": NARROW}, IDS).rows[1]
    perplexity, kl, top1 = measured(folder, NARROW, len(IDS))
    assert whole.perplexity == pytest.approx(perplexity, rel=FLOAT32)
    assert whole.perplexity != pytest.approx(found.rows[1].perplexity, rel=10 * FLOAT32)
    assert whole.kl == pytest.approx(kl, rel=10 * FLOAT32, abs=1e-7)
    assert whole.top1 == pytest.approx(top1)


@pytest.mark.slow
def test_a_last_window_of_one_token_has_no_next_one(folder, monkeypatch):
    monkeypatch.setattr(MODULE, "_speed", lambda *_: 0.0)
    monkeypatch.setattr(WINDOWS, "WINDOW", 6)
    (row,) = compare(folder, ["f32"], IDS).rows
    assert row.perplexity == pytest.approx(measured(folder, "f32", 6)[0], rel=FLOAT32)
    assert row.top1 == 1


def test_bytes_are_those_of_the_plan(found, folder):
    for row in found.rows:
        policy, model = get_policy(POLICIES[row.name]), perparam.load_model(folder, POLICIES[row.name])
        plan = perparam.get_policy(policy).explain(perparam.checkpoint_tree(folder))
        assert (row.bytes, row.kv_bytes) == (plan.total_bytes, plan.kv_bytes)
        assert row.bytes == sum(leaf.nbytes for leaf in checkpoints.arrays(model).values())
        assert row.bytes == perparam.get_policy(policy).explain(model).total_bytes
    assert found.rows[0].bytes == 2 * found.rows[2].bytes > 2 * found.rows[1].bytes
    assert found.rows[0].kv_bytes == 2 * found.rows[2].kv_bytes > 0


@pytest.mark.slow
def test_two_models_are_held_at_a_time(folder, monkeypatch):
    load, alive, most = MODULE.load_model, [], []

    def counted(*given, **options):
        model = load(*given, **options)
        alive.append(weakref.ref(model))
        gc.collect()
        most.append(sum(each() is not None for each in alive))
        return model

    monkeypatch.setattr(MODULE, "load_model", counted)
    monkeypatch.setattr(MODULE, "_evaluate", lambda *_: np.ones((1, 5)))
    monkeypatch.setattr(MODULE, "_speed", lambda *_: 0.0)
    compare(folder, POLICIES, IDS[:4])
    assert most == [1, 2, 2, 2]


def test_policies_may_have_names_of_their_own(folder, monkeypatch):
    monkeypatch.setattr(MODULE, "_evaluate", lambda *_: np.ones((1, 5)))
    monkeypatch.setattr(MODULE, "_speed", lambda *_: 0.0)
    made = compare(folder, {"as it is": None, "narrow": get_policy("bf16")}, IDS[:4])
    assert [row.name for row in made.rows] == ["as it is", "narrow"]
    assert made.tokens == 4


@pytest.mark.slow
def test_rows_of_a_batch_are_texts_of_their_own(folder, found, monkeypatch):
    monkeypatch.setattr(MODULE, "_speed", lambda *_: 123.45)
    (row,) = compare(folder, {"bf16": "bf16"}, IDS[: 2 * WINDOW].reshape(2, WINDOW)).rows
    monkeypatch.setattr(WINDOWS, "WINDOW", WINDOW)
    assert compare(folder, {"bf16": "bf16"}, IDS[: 2 * WINDOW]).rows == (row,)


@pytest.mark.slow
def test_decoding_is_timed(folder):
    (row,) = compare(folder, ["f32"], IDS[:3]).rows
    assert row.tokens_per_second > 0


ROWS = (
    Compared("f32", 12.5, math.nan, 0.0, 1.0, 5 << 20, 144, 1000.0),
    Compared("a policy with a long name", 13.0, 0.0456, 0.0123, 0.9, 1300 << 10, 72, 12.34),
)


def test_the_table():
    assert str(Comparison(ROWS, 19)).splitlines() == [
        "policy                          perplexity  KL, nats    top-1  parameters  cache/token  tokens/s",
        "f32                                12.5000  0.00e+00  100.00%     5.0 MiB        144 B    1000.0",
        "a policy with a long name  13.0000 ± 0.046  1.23e-02   90.00%     1.3 MiB         72 B      12.3",
        "",
        "KL and top-1 are relative to f32",
        "19 tokens of text",
    ]


@pytest.mark.parametrize(
    ("policies", "tokens", "text"),
    [
        (["f32"], [1], "two token ids or more, and a policy, found (1,) and 1"),
        (["f32"], [[1], [2]], "found (2, 1) and 1"),
        (["f32"], [], "expected token ids, found none: the shape is (0,)"),
        (["f32"], None, "expected tokens or text, found neither"),
        ([], [1, 2, 3], "found (3,) and 0"),
        ({}, [1, 2, 3], "found (3,) and 0"),
    ],
)
def test_a_text_of_one_token_or_no_policy_is_an_error(policies, tokens, text, folder):
    with pytest.raises(InvalidTokens, match=re.escape(text)):
        compare(folder, policies, tokens)


def test_an_empty_text_is_an_error(folder, monkeypatch):
    monkeypatch.setattr(WINDOWS, "load_tokenizer", lambda *_: types.SimpleNamespace(encode=lambda _: []))
    with pytest.raises(InvalidTokens, match=r"expected a text with tokens, found '', which has none"):
        compare(folder, ["f32"], text="")


def test_a_policy_that_occurs_again_has_a_number():
    assert _by_name(["bf16", "f32", "bf16", {}, "bf16"]) == {
        "bf16": "bf16", "f32": "f32", "bf16 (2)": "bf16", "policy 4": {}, "bf16 (3)": "bf16",
    }  # fmt: skip


def test_what_is_no_policy_and_no_token_is_an_error(folder):
    with pytest.raises(InvalidPolicy, match="bf17"):
        compare(folder, ["bf17"], [1, 2])
    with pytest.raises(InvalidTokens, match="outside the vocabulary of 61"):
        compare(folder, ["f32"], [*range(50), 61])


def test_the_text_to_read_is_a_page():
    assert TEXT.isascii()
    assert 700 < len(TEXT) < 1500


def test_json_has_a_line_a_policy():
    text = Comparison(ROWS, 19).to_json()
    assert text.splitlines()[2].startswith('  {"name": "a policy with a long name", "perplexity": 13.0, ')
    assert json.loads(text)["rows"][0]["perplexity_error"] is None


def test_labels_of_a_picture_differ_where_values_do():
    assert _labels([3054.254, 3047.594, 3054.4816, 0.0]) == ["3054.3", "3047.6", "3054.5", "0"]
    assert _labels([12.5, 12.5, 1234.5, 0.012345]) == ["12.5", "12.5", "1234", "0.0123"]


def test_a_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    Comparison(ROWS, 19).plot(tmp_path / "table.png")
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert (tmp_path / "table.png").stat().st_size > 5000


def test_a_plot_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    for name in ("matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackage, match="pip install matplotlib"):
        Comparison(ROWS, 19).plot(tmp_path / "table.png")
    assert not (tmp_path / "table.png").exists()


@pytest.mark.parametrize("name", ["table.abc", "table", "nowhere/table.png"])
def test_what_no_picture_can_be_written_to_is_an_error(name, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(PerparamError, match=re.escape(name)):
        Comparison(ROWS, 19).plot(tmp_path / name)
    assert not list(tmp_path.iterdir())
