"""`perparam embed` and `perparam rerank`: what they print and write, and the examples for their functions."""

import numpy as np
import pytest
from checkpoints import GOLDEN

import perparam
from perparam.__main__ import main
from perparam.examples import classify, embed, rerank
from perparam.examples.make_checkpoint import make_checkpoint

EMBEDDING, RERANKER = (str(GOLDEN / "tasks" / name) for name in ("embedding_fp8", "reranker_fp8"))


def test_embed_prints_a_line_for_each_text_or_writes_an_array(tmp_path, capsys):
    lines, output = tmp_path / "texts.txt", tmp_path / "out.npy"
    lines.write_text("the city\n\nhello world\n")
    assert main(["embed", EMBEDDING, "--dimensions", "4", "the city", "", "hello world"]) == 0
    printed = np.array([line.split() for line in capsys.readouterr().out.splitlines()], np.float32)
    assert main(["embed", EMBEDDING, "--lines", str(lines), "--dimensions", "4", "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}: 3×4 float32\n"
    np.testing.assert_allclose(np.load(output), printed, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(printed, axis=1), 1, atol=1e-5)


def test_embed_names_an_output_that_it_cannot_write_before_it_loads_the_model(tmp_path, capsys):
    for output in ("vectors.csv", str(tmp_path / "absent" / "x.npy")):
        with pytest.raises(SystemExit) as caught:
            main(["embed", str(tmp_path / "no checkpoint"), "text", "--output", output])
        assert caught.value.code == 2
        assert (
            f"--output: expected a .npy file in a folder that can be written, found {output}" in capsys.readouterr().err
        )


@pytest.mark.slow
def test_rerank_prints_the_best_document_first(capsys):
    documents = ["the city", "hello\nworld", "the weather"]
    assert main(["rerank", RERANKER, "--query", "What is it?", *documents]) == 0
    lines = capsys.readouterr().out.splitlines()
    scores = [float(line.split()[0]) for line in lines]
    assert scores == sorted(scores, reverse=True)
    assert {line.split("  ", 1)[1] for line in lines} == {"the city", "hello world", "the weather"}


def test_chat_refuses_a_model_without_a_head_at_its_start(capsys):
    assert main(["chat", EMBEDDING]) == 2
    assert "chat needs a language-model head, and this model has no head" in capsys.readouterr().err


# The examples.


@pytest.mark.slow
def test_the_example_of_embeddings_finds_the_nearest_document(tmp_path, capsys):
    folder = str(make_checkpoint(tmp_path / "tiny", "tiny", architecture="Qwen3Model"))
    prompt = f"Instruct: {embed.TASK}\nQuery:{embed.QUERIES[1]}"
    table = embed.similarities(folder, embed.QUERIES, (embed.DOCUMENTS[0], prompt))
    assert table.shape == (2, 2)
    assert abs(table[1, 1] - 1) < 1e-2  # the same text; bfloat16
    assert table[1].argmax() == 1


@pytest.mark.slow
def test_the_example_of_reranking_puts_the_best_document_first(tmp_path):
    folder = str(make_checkpoint(tmp_path / "tiny", "tiny", words=("yes", "no")))
    found = rerank.ranking(folder, rerank.QUERY, rerank.DOCUMENTS)
    assert [score for score, _ in found] == sorted((score for score, _ in found), reverse=True)
    assert {document for _, document in found} == set(rerank.DOCUMENTS)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["Sequence", "Token"])
def test_the_example_of_classification_gives_a_class_to_each_text_or_token(task, tmp_path):
    kind = {"architecture": f"Qwen3For{task}Classification", "labels": ("a", "b", "c")}
    folder = str(make_checkpoint(tmp_path / "tiny", "tiny", **kind))
    found = classify.classes(folder, classify.TEXTS)
    lengths = [len(perparam.load_tokenizer(folder).encode(text)) for text in classify.TEXTS]
    assert [len(each) for each in found] == ([1, 1] if task == "Sequence" else lengths)
    # In a batch with a longer text as by itself.
    alone = classify.classes(folder, classify.TEXTS[:1])[0]
    assert [name for name, _ in found[0]] == [name for name, _ in alone]
    np.testing.assert_allclose([p for _, p in found[0]], [p for _, p in alone], atol=2e-2)
