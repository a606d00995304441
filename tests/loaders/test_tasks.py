"""Models without a head and classifiers: their outputs beside those of transformers, their names, and refusals."""

import functools

import checkpoints
import numpy as np
import pytest
from checkpoints import GOLDEN, relative_error
from saving import assert_same_tensors, config_of

import perparam
from perparam import load_model, save_model
from perparam.loaders import convert_checkpoint, open_checkpoint
from perparam.policies.errors import InvalidCheckpoint, UnsupportedTask

pytestmark = pytest.mark.filterwarnings("ignore:blocks of .* do not divide the sides")  # small models

TASKS = GOLDEN / "tasks"
CASES = sorted(path.name for path in TASKS.iterdir())

FLOAT32_ERROR = 1e-5
"""As test_golden.py derives it."""

MORE_THAN_THE_REFERENCE = 1.5
"""As there; over nine logits, of which one row decides, twice that (seen: 2.63)."""

KEPT = perparam.Policy(compute="f32")


@functools.cache
def expected(case):
    with np.load(TASKS / case / "expected.npz") as file:
        return dict(file)


def outputs(case, policy, mirrored=False):
    """The outputs of a case, those of padding as zeros; `mirrored`: with the padding on the other side."""
    exact = expected(case)
    ids, mask = exact["input_ids"], exact["attention_mask"]
    where = np.broadcast_to(np.arange(mask.shape[1]), mask.shape)
    if mirrored:  # stable: the tokens of a row stay in order
        where = np.argsort(-mask if mask[:, 0].min() == 0 else mask, axis=1, kind="stable")
    ids, mask = np.take_along_axis(ids, where, 1), np.take_along_axis(mask, where, 1)
    found = checkpoints.logits(load_model(TASKS / case, policy), ids, mask).astype(np.float32)
    if found.ndim == 2:
        return found
    back = np.argsort(where, axis=1)[..., None]
    return np.where(exact["attention_mask"][..., None] > 0, np.take_along_axis(found, back, 1), 0)


OUTPUTS = [case for case in CASES if "outputs_f32" in expected(case)]
SLOW = ("llama_sequence", "qwen2_model", "embedding_fp8")  # others, and test_embed.py, show the same code


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in OUTPUTS]
)
def test_float32_outputs_are_those_of_transformers_whatever_the_side_of_the_padding(case):
    for mirrored in (False, True):
        assert relative_error(outputs(case, KEPT, mirrored), expected(case)["outputs_f32"]) <= FLOAT32_ERROR


@pytest.mark.slow
@pytest.mark.parametrize("case", OUTPUTS)
def test_bfloat16_outputs_are_about_as_near_to_float32_as_those_of_transformers(case):
    exact, found = expected(case), outputs(case, None)
    reference = relative_error(exact["outputs_bf16"], exact["outputs_f32"])
    more = MORE_THAN_THE_REFERENCE * (2 if exact["outputs_f32"].ndim == 2 else 1)
    assert relative_error(found, exact["outputs_f32"]) <= more * reference


@pytest.mark.slow
def test_the_hidden_states_of_a_causal_model_are_those_that_its_head_takes():
    model, ids = load_model(TASKS / "reranker_fp8", KEPT), [[1, 2, 3]]
    states = model.last_hidden_state(ids)
    assert states.shape == (1, 3, model.config.hidden_size)
    np.testing.assert_allclose(model.embed_tokens.attend(states), model(ids), rtol=FLOAT32_ERROR, atol=FLOAT32_ERROR)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_is_saved_and_converted_byte_for_byte_under_the_name_of_its_architecture(case, tmp_path):
    source = open_checkpoint(TASKS / case)
    save_model(load_model(TASKS / case), tmp_path / "saved")
    convert_checkpoint(TASKS / case, tmp_path / "converted")
    names = config_of(TASKS / case)
    # Qwen3-Embedding names the class of a model with a head, whose tensors have other names.
    architectures = ["Qwen3Model"] if case == "embedding_fp8" else names["architectures"]
    for copy in (tmp_path / "saved", tmp_path / "converted"):
        assert_same_tensors(checkpoints.read(copy), checkpoints.read(TASKS / case))
        assert config_of(copy)["architectures"] == architectures
        assert config_of(copy).get("id2label") == names.get("id2label")
        again = open_checkpoint(copy).config
        assert (again.task, again.id2label) == (source.config.task, source.config.id2label)


def test_the_task_follows_from_the_architecture_and_the_names_of_the_tensors(tmp_path):
    config = checkpoints.fields()
    with_head = checkpoints.tensors(config)
    body = {name: array for name, array in with_head.items() if name != "lm_head.weight"}
    bare = {name.removeprefix("model."): array for name, array in body.items()}

    def opened(name, arrays, **changes):
        return open_checkpoint(checkpoints.write(tmp_path / name, {**config, **changes}, arrays))

    published = opened("published", bare, architectures=["Qwen3ForCausalLM"])
    saved = opened("saved", body, architectures=["Qwen3Model"])
    more = opened("more", with_head, architectures=["Qwen3Model"])
    assert published.infos == saved.infos == more.infos
    assert published.config == saved.config == more.config
    assert published.config.task == "feature_extraction"
    assert more.left_out == {"lm_head.weight": "the model has no such head"}
    causal = opened("causal", with_head, architectures=None)
    assert (causal.config.task, "lm_head/kernel" in causal.infos) == ("causal_lm", True)


def scored(labels, **more):
    config = checkpoints.fields(**more)
    arrays = checkpoints.tensors(config)
    del arrays["lm_head.weight"]
    return config, arrays | {"score.weight": np.ones((labels, config["hidden_size"]), checkpoints.BF16)}


def test_classes_without_names_get_those_of_transformers(tmp_path):
    config, arrays = scored(3, architectures=["Qwen3ForSequenceClassification"], num_labels=3)
    found = open_checkpoint(checkpoints.write(tmp_path, config, arrays))
    assert found.config.id2label == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert found.infos["score/kernel"].shape == (3, config["hidden_size"])


def test_classes_are_named_by_label2id_where_there_is_no_id2label(tmp_path):
    names = {"label2id": {"no": 1, "yes": 0, "maybe": 2}}
    config, arrays = scored(3, architectures=["Qwen3ForSequenceClassification"], **names)
    assert open_checkpoint(checkpoints.write(tmp_path, config, arrays)).config.id2label == ("yes", "no", "maybe")


SEQUENCE = "Qwen3ForSequenceClassification"


@pytest.mark.parametrize(
    ("architecture", "remove", "text"),
    [
        (
            None,
            "score.weight",
            r"missing: lm_head\.weight .*\n.* tie_word_embeddings .*, set architectures to \[\"Qwen3M",
        ),
        (None, None, rf"score\.weight is the head of a classifier: set architectures .* to \[\"{SEQUENCE}\"\]"),
        (SEQUENCE, None, r"score.weight is \(3, 56\), expected \(2, 56\)\n  Set id2label or num_labels in config.json"),
        (SEQUENCE, "score.weight", r"missing: score.weight \(2, 56\)\n  Download the folder again"),
        (None, "model.norm.weight", r"Download the folder again, or correct config.json"),
    ],
)
def test_the_error_about_a_head_says_what_to_correct(architecture, remove, text, tmp_path):
    config, arrays = scored(3, architectures=[architecture] if architecture else None)
    arrays.pop(remove, None)
    with pytest.raises(InvalidCheckpoint, match=text):
        open_checkpoint(checkpoints.write(tmp_path, config, arrays))


def test_rules_name_the_head_of_a_classifier():
    policy = {"params": {"score/kernel": "f32", "kernel": "f8_e4m3fn"}, "compute": "f32"}
    plan = perparam.get_policy(policy).explain(perparam.checkpoint_tree(TASKS / "llama_sequence"))
    assert [row.storage for row in plan if row.path == "score/kernel"] == [np.float32]


@pytest.mark.parametrize("case", ["embedding_fp8", "llama_sequence"])
def test_what_needs_a_language_model_head_refuses_other_models(case):
    folder, model = TASKS / case, load_model(TASKS / case)
    remedy = (
        "use perparam.embed" if case == "embedding_fp8" else r"for sequence classification\. Call it for the logits"
    )
    for what, call in {
        "generation": lambda: perparam.generate(model, [[1, 2]]),
        "compare": lambda: perparam.compare(folder, ["f32"], [1, 2, 3]),
        "audit": lambda: perparam.audit(model, "bf16", [[1, 2]]),
        "rerank": lambda: perparam.rerank(model, perparam.load_tokenizer(TASKS / "reranker_fp8"), "a", ["b"]),
    }.items():
        with pytest.raises(UnsupportedTask, match=f"{what} needs a language-model head, .*{remedy}"):
            call()
    if case == "embedding_fp8":
        with pytest.raises(UnsupportedTask, match="logits needs"):
            model.logits(np.zeros((1, model.config.hidden_size)))
