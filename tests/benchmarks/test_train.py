"""`benchmarks/train.py`: that it trains with and without perparam, and reports what did not go as planned."""

import json
import sys

import jax.numpy as jnp
import optax
import pytest
import train
import train_worker
import trainers

CONTENDERS = ("optax bf16, f32 state", "perparam bf16, f32 state")


@pytest.mark.slow  # each contender starts Python and compiles
def test_the_script_trains_compares_and_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    arguments = ["--size", "toy", "--rounds", "1", "--only", ";".join(CONTENDERS), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    assert train.main() == 0, capsys.readouterr().out
    (written,) = tmp_path.glob("train-*.json")
    report = json.loads(written.read_text())
    plain, ours = (report["contenders"][name] for name in CONTENDERS)
    assert plain["baseline"] == ours["baseline"] == CONTENDERS[0]
    assert ours["live"]["parameters"] == plain["live"]["parameters"] == ours["planned"]["parameters"]
    assert ours["live"]["optimizer"] == plain["live"]["optimizer"] + 4  # a step count of its own
    assert ours["last loss"] < ours["loss"] == plain["loss"]
    assert report["gates"][train.GATED]["step"]["median"] > 0
    assert CONTENDERS[1] in capsys.readouterr().out


def test_a_contender_that_does_not_run_is_reported_with_its_error(monkeypatch, capsys):
    def make(size):
        raise ModuleNotFoundError("No module named 'qwix'")

    monkeypatch.setitem(trainers.CONTENDERS, "qwix QT fp8", make)
    train_worker.work("qwix QT fp8", "toy")
    error = json.loads(capsys.readouterr().out)
    assert error == {"error": "ModuleNotFoundError: No module named 'qwix'"}
    results = {"contenders": {}, "gates": {}, "failed": {"qwix QT fp8": error["error"]}, "faults": []}
    assert "does not run: qwix QT fp8: ModuleNotFoundError: No module named 'qwix'" in train.table(results)


def result(**changes):
    memory = {"planned": {"parameters": 8, "optimizer": 16}, "live": {"parameters": 8, "optimizer": 16, "frozen": 0}}
    return memory | {"arguments": 28, "batch": 4, "loss": 4.0, "last loss": 3.0} | changes


def test_faults_are_memory_that_was_not_planned_and_a_loss_that_does_not_fall():
    assert train.faults({"a": result(), "b": result(planned=None, arguments=0)}) == []
    assert train.faults({"a": result(planned={"parameters": 8, "optimizer": 12})}) == [
        "a: 12 bytes of optimizer were planned, and 16 are allocated."
    ]
    assert train.faults({"a": result(arguments=36)}) == ["a: the compiled step has 36 bytes of arguments, expected 28."]
    assert train.faults({"a": result(**{"last loss": float("nan")})}) == ["a: the loss was 4 and became nan."]


def test_steps_of_a_trainer_are_those_of_its_optimizer():
    def gradients(params, frozen, ids):
        return (params["x"] * ids).sum(), {"x": ids}

    tx = optax.sgd(0.5)
    trainer = trainers.Trainer({"x": jnp.ones(2)}, None, gradients, tx, tx.init({"x": jnp.ones(2)}))
    params, _, loss = trainer.step(trainer.params, trainer.state, None, jnp.array([2.0, 4.0]))
    assert params["x"].tolist() == [0.0, -1.0]
    assert loss == 6.0


def test_every_contender_has_a_baseline_of_the_same_model():
    assert trainers.BASELINES[""] == train.BASELINE
    for name in trainers.CONTENDERS:
        baseline = train.baseline_of(name, trainers.BASELINES)
        assert baseline in trainers.CONTENDERS
        assert baseline.startswith("Qwen3") == name.startswith("Qwen3")
