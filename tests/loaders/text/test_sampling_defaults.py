"""`sampling_defaults`: the sampling that a generation_config.json asks for."""

import json

import pytest

from perparam import Sampling
from perparam.loaders import sampling_defaults
from perparam.models.generation.sampling import GREEDY
from perparam.policies.errors import InvalidCheckpoint, InvalidSampling


def defaults(folder, **config):
    (folder / "generation_config.json").write_text(json.dumps(config))
    return sampling_defaults(folder)


def test_sampling_defaults_reads_the_generation_config_of_qwen3(tmp_path):
    """As Qwen3-0.6B has it."""
    config = {
        "bos_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643], "pad_token_id": 151643,
        "temperature": 0.6, "top_k": 20, "top_p": 0.95, "transformers_version": "4.51.0",
    }  # fmt: skip
    assert defaults(tmp_path, **config) == Sampling(temperature=0.6, top_k=20, top_p=0.95)


def test_fields_that_are_null_or_not_there_have_no_effect(tmp_path):
    assert defaults(tmp_path, do_sample=True) == Sampling()
    assert defaults(tmp_path, do_sample=True, top_k=None, temperature=1, min_p=0.1) == Sampling(min_p=0.1)
    assert defaults(tmp_path, do_sample=True, repetition_penalty=1.05).repetition_penalty == 1.05


def test_without_the_file_or_without_do_sample_the_default_is_greedy(tmp_path):
    assert sampling_defaults(tmp_path) == GREEDY
    assert sampling_defaults(str(tmp_path)) == GREEDY
    for config in ({}, {"temperature": 0.6}, {"do_sample": False, "temperature": 0.6}, {"do_sample": None}):
        assert defaults(tmp_path, **config) == GREEDY


@pytest.mark.parametrize(
    "wrong", [{"temperature": "0.6"}, {"top_k": 20.5}, {"top_k": True}, {"top_p": [0.9]}, {"min_p": False}], ids=str
)
def test_fields_of_another_type_are_refused(tmp_path, wrong):
    (name,) = wrong
    with pytest.raises(InvalidCheckpoint, match=rf"generation_config\.json: {name}: expected a number, found"):
        defaults(tmp_path, do_sample=True, **wrong)


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 1.5}, {"top_k": -3}], ids=str)
def test_fields_out_of_range_are_refused(tmp_path, wrong):
    (name,) = wrong
    with pytest.raises(InvalidSampling, match=f"{name}: expected a number from"):
        defaults(tmp_path, do_sample=True, **wrong)


def test_a_file_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(InvalidCheckpoint, match=r"generation_config\.json"):
        sampling_defaults(tmp_path)
