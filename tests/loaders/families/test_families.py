"""Every model family does what the first one does: load, plan, audit, compare, generate, chat, save, convert, shard."""

import builtins
import dataclasses

import checkpoints
import numpy as np
import pytest
from checkpoints import FAMILIES

import perparam
from perparam.__main__ import main
from perparam.examples.make_tokenizer import write_tokenizer
from perparam.loaders import convert_checkpoint, families
from perparam.models import DecoderConfig, Llama
from perparam.policies.errors import UnsupportedConfig, UnsupportedExport
from perparam.policies.trees import parameters

pytestmark = pytest.mark.filterwarnings("ignore:blocks of .* do not divide the sides")  # small models

VARIANTS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
}
CASES = [(name, variant) for name in FAMILIES for variant in VARIANTS]


def fields(family, variant="untied"):
    ids = {"vocab_size": 300, "eos_token_id": 298, "pad_token_id": 299}  # room for the bytes of a tokenizer
    return checkpoints.fields(**ids | FAMILIES[family] | VARIANTS[variant])


@pytest.fixture(params=CASES, ids="-".join)
def case(request, tmp_path):
    """`(config.json, folder)` of an FP8 checkpoint of a family."""
    return written(tmp_path, *request.param)


def written(tmp_path, family, variant="untied"):
    config = fields(family, variant)
    return config, checkpoints.write(tmp_path / "checkpoint", config, checkpoints.tensors(config))


def test_every_implemented_family_is_tested():
    assert set(FAMILIES) == set(families.FAMILIES)


def test_a_config_of_no_family_is_refused():
    class Other(DecoderConfig):
        pass

    sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), 4)
    heads = dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), 2)
    with pytest.raises(UnsupportedConfig, match=r"Other is not the config of .*: LlamaConfig, Qwen2Config"):
        families.family_of(Other(**sizes, **heads))


def test_a_config_that_its_file_cannot_hold_is_refused():
    config = dataclasses.replace(families.read_config(fields("llama")), windows=(None, 5))
    with pytest.raises(UnsupportedExport, match=r"windows: the config.json of LlamaForCausalLM cannot hold"):
        families.config_to_json(config)
    without_eos = dataclasses.replace(config, windows=(), eos_token_id=())
    assert families.config_to_json(without_eos)["eos_token_id"] is None  # transformers has a default of its own


def test_a_model_takes_the_config_of_its_family_with_sizes_that_fit():
    config = families.read_config(fields("qwen3"))
    with pytest.raises(UnsupportedConfig, match="Llama: expected a LlamaConfig, found Qwen3Config"):
        Llama(config, rngs=None)
    for changes, text in (
        ({"num_key_value_heads": 3}, "4 attention heads do not divide among 3"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"windows": (4,)}, "windows has length 1, expected num_hidden_layers, 2"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be positive, found 0"),
        ({"task": "translation"}, "task must be one of causal_lm, .*, found 'translation'"),
        ({"task": "token_classification"}, "id2label has 0 labels for the task token_classification"),
        ({"id2label": ("a",)}, "id2label has 1 labels for the task causal_lm"),
    ):
        with pytest.raises(UnsupportedConfig, match=text):
            dataclasses.replace(config, **changes)
    assert dataclasses.replace(config, eos_token_id=3, dtype="bf16").eos_token_id == (3,)
    assert dataclasses.replace(config, windows=(None, None)).windows == ()


def test_the_name_table_names_each_parameter_of_the_model(case):
    config, folder = case
    model = perparam.load_model(folder)
    assert isinstance(model, families.FAMILIES[config["model_type"]].model)
    named = families.family_of(model.config).tensors(model.config)
    shapes = {path: array.shape for path, array in parameters(model).items() if not path.endswith("scale_inv")}
    of_experts = {path for path, _, expert in named.values() if expert is not None}
    count = config.get("num_experts")
    assert {path: (count, *shape) if path in of_experts else shape for path, shape, _ in named.values()} == shapes
    assert {name: shape for name, (_, shape, _) in named.items()} == checkpoints.shapes(config)


def test_a_written_config_reads_as_the_same(case):
    _, folder = case
    config = families.read_config(folder / "config.json")
    assert families.read_config(families.config_to_json(config)) == config


def test_fp8_kernels_are_kept_and_saved_byte_for_byte(case, tmp_path):
    _, folder = case
    before = checkpoints.read(folder)
    perparam.save_model(perparam.load_model(folder), tmp_path / "saved")
    convert_checkpoint(folder, tmp_path / "converted")
    for copy in ("saved", "converted"):
        after = checkpoints.read(tmp_path / copy)
        assert {name: array.dtype for name, array in after.items()} == {n: a.dtype for n, a in before.items()}
        assert all(after[name].tobytes() == before[name].tobytes() for name in before)
        assert families.read_config(tmp_path / copy / "config.json").eos_token_id == (298,)


# Qwen3's commands are tested by test_command_line.py.
@pytest.mark.parametrize(
    "family",
    [pytest.param(each, marks=pytest.mark.thorough) for each in ("llama", "qwen2", "qwen3_moe")],
)
def test_every_command_runs(family, tmp_path, capsys, monkeypatch):
    _, folder = written(tmp_path, family)
    write_tokenizer(folder, 298, 299)
    lines = iter(["What is it?", "/policy kv_cache=f8_e4m3fn", "And now?", "/quit"])
    monkeypatch.setattr(builtins, "input", lambda _: next(lines))
    for command in (
        ["plan", folder, "--policy", "bf16"],
        ["audit", folder, "--policy", "fp8_dynamic", "--tokens", "1,2,3"],
        ["compare", folder, "--policy", "f32", "--policy", "kv_cache=int8", "--tokens", "1,2,3,4"],
        ["generate", folder, "--prompt", "It is", "--max-new-tokens", "3"],
        ["chat", folder, "--max-new-tokens", "3"],
        ["convert", folder, tmp_path / "bf16", "--policy", "bf16"],
    ):
        assert main(list(map(str, command))) == 0, capsys.readouterr().err
    printed = capsys.readouterr()
    assert "layers/0-1/self_attn/q_proj/kernel" in printed.out
    assert printed.out.count("tokens, the first after") == 2
    assert perparam.checkpoint_tree(tmp_path / "bf16")["layers"]["0"]["mlp"]["up_proj"]["kernel"].block is None


@pytest.mark.parametrize("block", [(1, -1), (-1, -1)], ids=["channel", "tensor"])
def test_kernels_scaled_by_channel_or_tensor_are_saved_as_compressed_tensors(block, tmp_path):
    _, folder = written(tmp_path, "llama")
    policy = {"params": {"lm_head/kernel": None, "kernel": {"dtype": "f8_e4m3fn", "block": block, "scale": "bf16"}}}
    model = perparam.load_model(folder, policy)
    saved = perparam.save_model(model, tmp_path / "saved")
    config = families.read_config(saved / "config.json").quantization
    assert (config.method, config.block, config.not_converted) == ("compressed-tensors", block, ("lm_head",))
    tensors = checkpoints.read(saved)
    out = model.config.intermediate_size
    assert tensors["model.layers.0.mlp.up_proj.weight_scale"].shape == ((out, 1) if block == (1, -1) else (1,))
    again = perparam.load_model(saved)
    for (path, array), other in zip(parameters(model).items(), parameters(again).values(), strict=True):
        assert array.dtype == other.dtype, path
        np.testing.assert_array_equal(np.asarray(array).view(np.uint8), np.asarray(other).view(np.uint8))
