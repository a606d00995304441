"""A checkpoint's folder: its files, its name table, its pairs, and whether config.json and the tensors agree."""

import json
import os
import re
import shutil

import checkpoints
import ml_dtypes
import numpy as np
import pytest
from checkpoints import BF16, CASES, F8, GOLDEN, fields, tensors, write, write_index

import perparam
from perparam.loaders import CheckpointWarning, open_checkpoint
from perparam.policies.errors import InvalidCheckpoint, MissingFile, PerparamError, UnsupportedConfig

GATE = "model.layers.1.mlp.gate_proj.weight"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoint"


def refusal(folder, kind=InvalidCheckpoint) -> str:
    """What `open_checkpoint` says, which always names the folder and ends in what to do."""
    with pytest.raises(kind) as caught:
        open_checkpoint(folder)
    assert isinstance(caught.value, PerparamError)
    assert str(folder) in str(caught.value)
    return str(caught.value)


# What headers say.


@pytest.mark.parametrize("case", CASES)
def test_paths_shapes_and_dtypes_are_those_of_the_files(case):
    stored = checkpoints.read(GOLDEN / case)
    found = open_checkpoint(GOLDEN / case).infos
    config = json.loads((GOLDEN / case / "config.json").read_text())
    names = {
        name: (one.shape[len(index) :], one.dtype)
        for path, one in found.items()
        for name, index in checkpoints.places(path, one.shape, config).items()
    }
    stored = {name: a.reshape(1, 1) if a.shape == (1,) else a for name, a in stored.items()}  # one scale of a tensor
    tied = config.get("tie_word_embeddings")
    assert names.keys() == stored.keys() - ({"lm_head.weight"} if tied else set())
    assert all(names[name] == (stored[name].shape, stored[name].dtype) for name in names)


def test_narrow_kernels_carry_the_block_of_quantization_config(folder):
    config = fields(quantization_config={**checkpoints.FIELDS["quantization_config"], "weight_block_size": [20, 12]})
    tree = perparam.checkpoint_tree(write(folder, config, tensors(config)))
    assert tree["layers"]["0"]["mlp"]["down_proj"]["kernel"].block == (20, 12)
    assert tree["lm_head"]["kernel"].block is None


def test_headers_are_enough_for_a_tree_and_a_plan(folder, monkeypatch):
    from perparam.loaders.safetensors import reader

    write(folder, fields(), tensors(fields()), shards=2)

    def refuse(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(reader.Tensor, "read", refuse)
    tree = perparam.checkpoint_tree(folder)
    assert perparam.Policy("bf16").explain(tree).total_bytes > 0
    assert perparam.infer_policy(folder).params.rules
    with pytest.raises(AssertionError, match="a weight was read"):
        perparam.load_model(folder)


# Which files.


def test_a_missing_folder_is_named(tmp_path):
    assert "neither a folder nor a name on the hub. Pass an existing" in refusal(tmp_path / "absent", MissingFile)


def test_a_folder_without_config_is_refused(folder):
    write(folder, fields(), tensors(fields()))
    (folder / "config.json").unlink()
    assert "config.json: there is no such file" in refusal(folder, MissingFile)


def test_a_folder_without_weights_is_refused(folder):
    write(folder, fields(), {})
    (folder / "model.safetensors").unlink()
    message = refusal(folder, MissingFile)
    assert "contains neither model.safetensors nor model.safetensors.index.json. Is the download complete?" in message


def test_one_file_goes_before_an_index(folder):
    write(folder, fields(), tensors(fields(), seed=1))
    write_index(folder, {"model.norm.weight": "absent.safetensors"})
    assert open_checkpoint(folder).tensors["norm/scale"].file.name == "model.safetensors"


def test_missing_shards_are_named(folder):
    write(folder, fields(), tensors(fields()), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "1 of 3 shards is missing: model-00002-of-00003.safetensors. Complete" in refusal(folder, MissingFile)


def test_an_index_that_names_a_tensor_its_shard_lacks_is_refused(folder):
    write(folder, fields(), tensors(fields()), shards=2)
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    weight_map[GATE] = ONE if weight_map[GATE] == TWO else TWO
    write_index(folder, weight_map)
    assert f"lists tensors that are not in their file: {GATE} (not in {weight_map[GATE]})" in refusal(folder)


@pytest.mark.parametrize(
    "file",
    ["/etc/passwd", "../model.safetensors", "..", ".", "", "sub/model.safetensors", "sub\\model.safetensors",
     "./model.safetensors", "model.safetensors/", "model\0.safetensors", "m" * 300],
)  # fmt: skip
def test_an_index_that_points_out_of_its_folder_is_refused(folder, file):
    write(folder, fields(), tensors(fields()), shards=2)
    for near in (folder.parent, folder / "sub"):  # files that could be read, if it were followed
        near.mkdir(exist_ok=True)
        shutil.copy(folder / ONE, near / "model.safetensors")
    write_index(folder, {"model.norm.weight": file})
    text = refusal(folder)
    assert "is not the name of a safetensors file in this folder. Do not use this checkpoint." in text
    assert f"{file!r:.50}" in text


@pytest.mark.parametrize("weight_map", [None, [], "model.safetensors", {"model.norm.weight": 1}], ids=repr)
def test_an_index_without_a_map_from_tensors_to_files_is_refused(folder, weight_map):
    write(folder, fields(), tensors(fields()), shards=2)
    write_index(folder, weight_map)
    assert "weight_map is not a mapping from tensors to files" in refusal(folder)


def test_an_index_that_is_no_json_is_refused(folder):
    write(folder, fields(), tensors(fields()), shards=2)
    (folder / "model.safetensors.index.json").write_text("<html>")
    assert "model.safetensors.index.json: not valid JSON" in refusal(folder)


def test_a_damaged_shard_is_named(folder):
    write(folder, fields(), tensors(fields()), shards=2)
    (folder / TWO).write_bytes((folder / TWO).read_bytes()[:-1])
    assert re.search(rf"{TWO}: the header describes \d+ bytes, the file has \d+", refusal(folder))


# Which tensors.


def test_everything_that_is_wrong_with_the_tensors_is_in_one_error(folder):
    stored = tensors(fields())
    del stored["model.norm.weight"], stored["model.layers.0.self_attn.q_proj.weight"]
    stored[GATE] = stored[GATE][:-1]
    stored["model.layers.0.mlp.up_proj.weight_scale_inv"] = np.ones((5, 2), BF16)
    stored["model.layers.0.input_layernorm.weight"] = np.ones(56, np.int32)
    stored["model.layers.7.mlp.up_proj.weight"] = np.ones((76, 56), BF16)
    stored["score.weight"] = np.ones((2, 56), BF16)
    message = refusal(write(folder, fields(), stored))
    for problem in (
        "missing: model.norm.weight (56,)",
        "missing: model.layers.0.self_attn.q_proj.weight (72, 56)",
        "misshapen: model.layers.1.mlp.gate_proj.weight is (75, 56), expected (76, 56)",
        "layers/0/mlp/up_proj/scale_inv: scales of shape (5, 2) do not fit a kernel of shape (76, 56)",
        "expected (5, 3)",
        "wrong dtype: model.layers.0.input_layernorm.weight is i32",
        "unused: model.layers.7.mlp.up_proj.weight (76, 56)",
        "unused: score.weight (2, 56)",
        "Download the folder again, or correct config.json.",
    ):
        assert problem in message


def test_a_long_list_of_problems_is_cut(folder):
    stored = tensors(fields()) | {f"extra.{i}": np.ones(1, BF16) for i in range(30)}
    message = refusal(write(folder, fields(), stored))
    assert "30 tensors are not what config.json describes" in message
    assert "and 10 more" in message


@pytest.mark.parametrize("dtype", [F8, np.dtype(ml_dtypes.float8_e5m2), np.dtype(np.int8)], ids=str)
def test_a_narrow_kernel_without_scales_is_refused(folder, dtype):
    stored = tensors(fields())
    del stored[f"{GATE}_scale_inv"]
    stored[GATE] = np.ones(stored[GATE].shape, dtype)
    message = refusal(write(folder, fields(), stored))
    assert re.search(r"layers/1/mlp/gate_proj/kernel: \w+ \(76, 56\) without its scales", message)
    assert "its magnitude is lost" in message


def test_a_narrow_embedding_without_scales_is_refused(folder):
    stored = tensors(fields())
    stored["model.embed_tokens.weight"] = stored["model.embed_tokens.weight"].astype(F8)
    message = refusal(write(folder, fields(), stored))
    assert "embed_tokens/embedding: f8_e4m3fn (61, 56) without its scales 'embed_tokens/embedding_scale_inv'" in message


def test_scales_without_their_kernel_are_refused(folder):
    stored = tensors(fields())
    del stored[GATE]
    message = refusal(write(folder, fields(), stored))
    assert f"missing: {GATE} (76, 56)" in message


def test_scales_of_nothing_are_refused(folder):
    stored = tensors(fields()) | {"model.layers.0.mlp.router.weight_scale_inv": np.ones((2, 2), BF16)}
    assert "unused: model.layers.0.mlp.router.weight_scale_inv (2, 2)" in refusal(write(folder, fields(), stored))


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight"])
def test_scales_beside_a_plain_parameter_are_refused(folder, name):
    stored = tensors(fields()) | {f"{name}_scale_inv": np.ones((4, 3), BF16)}
    message = refusal(write(folder, fields(), stored))
    assert re.search(r"scales \(4, 3\) beside '\S+', which is bf16 and needs none", message)


@pytest.mark.parametrize("shape", [(3, 5), (5, 4), (1, 1), (5, 3, 1), (15,), ()], ids=str)
def test_a_grid_that_does_not_fit_the_block_is_refused(folder, shape):
    stored = tensors(fields()) | {f"{GATE}_scale_inv": np.ones(shape, BF16)}
    message = refusal(write(folder, fields(), stored))
    assert (
        f"scales of shape {shape} do not fit a kernel of shape (76, 56) in blocks of (16, 24), expected (5, 3)"
        in message
    )
    assert "Name the block the kernel was quantised with." in message


def test_a_block_that_config_does_not_name_is_128_by_128(folder):
    config = fields(quantization_config={"quant_method": "fp8"})
    stored = tensors(fields())
    assert "in blocks of (128, 128), expected (1, 1)" in refusal(write(folder, config, stored))


@pytest.mark.parametrize("dtype", [F8, np.dtype(np.int32)], ids=str)
def test_scales_of_a_dtype_that_no_scale_has_are_refused(folder, dtype):
    stored = tensors(fields()) | {f"{GATE}_scale_inv": np.ones((5, 3), dtype)}
    message = refusal(write(folder, fields(), stored))
    assert re.search(rf"wrong dtype: {GATE}_scale_inv is \w+, expected f32, bf16 or f16", message)


def test_a_narrow_norm_is_refused(folder):
    stored = tensors(fields()) | {"model.norm.weight": np.ones(56, F8)}
    message = refusal(write(folder, fields(), stored))
    assert "wrong dtype: model.norm.weight is f8_e4m3fn, expected f32, bf16, f16" in message


def test_biases_are_there_exactly_where_config_says(folder):
    with_bias = fields(attention_bias=True)
    found = open_checkpoint(write(folder, with_bias, tensors(with_bias))).infos
    assert found["layers/1/self_attn/o_proj/bias"].shape == (56,)
    assert "unused: model.layers.0.self_attn.q_proj.bias" in refusal(write(folder, fields(), tensors(with_bias)))
    assert "missing: model.layers.0.self_attn.q_proj.bias (72,)" in refusal(write(folder, with_bias, tensors(fields())))


@pytest.mark.parametrize("stored_head", [False, True], ids=["without lm_head.weight", "with lm_head.weight"])
def test_a_tied_model_is_read(folder, stored_head):
    config = fields(tie_word_embeddings=True)
    stored = tensors(config)
    if stored_head:
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"]
    assert "lm_head/kernel" not in open_checkpoint(write(folder, config, stored)).tensors


def test_an_untied_model_needs_its_head(folder):
    stored = tensors(fields())
    del stored["lm_head.weight"]
    assert "missing: lm_head.weight (61, 56)" in refusal(write(folder, fields(), stored))


# Whether config.json agrees.


def listed(*modules, **changes):
    return fields(
        quantization_config={**checkpoints.FIELDS["quantization_config"], "modules_to_not_convert": list(modules)},
        **changes,
    )


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("model.layers.1.mlp.gate_proj", ["model.layers.1.mlp.gate_proj"]),
        ("layers.1.mlp.gate_proj", ["model.layers.1.mlp.gate_proj"]),
        ("wrapped.model.layers.1.mlp.gate_proj", ["model.layers.1.mlp.gate_proj"]),
        ("model.layers.1.mlp", [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]),
        ("gate_proj", ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj"]),
    ],
    ids=["a module", "without its prefix", "with a wrapper's prefix", "a parent", "a name"],
)
def test_modules_listed_as_unquantised_that_are_pass_in_silence(folder, name, places):
    config = listed("lm_head", name)
    found = open_checkpoint(write(folder, config, tensors(config, plain=places))).infos
    assert found["layers/1/mlp/gate_proj/kernel"].dtype == BF16


def test_a_listed_module_that_is_quantised_warns_with_its_name(folder):
    config = listed("lm_head", "model.layers.0.mlp.down_proj")
    write(folder, config, tensors(config))
    expected = r"_to_not_convert lists modules that are quantised: layers/0/mlp/down_proj\. The tensors are used\."
    with pytest.warns(CheckpointWarning, match=expected) as caught:
        checkpoint = open_checkpoint(folder)
    assert str(folder) in str(caught[0].message)
    assert checkpoint.infos["layers/0/mlp/down_proj/kernel"].dtype == F8


def test_an_unlisted_module_that_is_not_quantised_warns_with_its_name(folder):
    write(folder, listed("lm_head"), tensors(fields(), plain=["model.layers.1.self_attn.k_proj"]))
    expected = r"does not list modules that are not quantised: layers/1/self_attn/k_proj\. The tensors are used\."
    with pytest.warns(CheckpointWarning, match=expected):
        checkpoint = open_checkpoint(folder)
    assert checkpoint.infos["layers/1/self_attn/k_proj/kernel"].dtype == BF16


def test_quantised_modules_without_quantization_config_warn(folder):
    config = fields(quantization_config=None)
    stored = tensors(config) | {GATE: np.ones((76, 56), F8), f"{GATE}_scale_inv": np.ones((1, 1), np.float32)}
    with pytest.warns(
        CheckpointWarning, match=r"no quantization_config, but these are quantised .*layers/1/mlp/gate_proj"
    ):
        checkpoint = open_checkpoint(write(folder, config, stored))
    assert checkpoint.infos["layers/1/mlp/gate_proj/kernel"].block == (128, 128)


def test_a_config_that_is_not_implemented_is_refused_with_its_file(folder):
    write(folder, fields(model_type="gemma", architectures=["GemmaForCausalLM"]), tensors(fields()))
    assert f"{folder / 'config.json'}: GemmaForCausalLM (model_type 'gemma') is not supp" in refusal(
        folder, UnsupportedConfig
    )


# What the checkpoint adds to config.json.


def test_ids_of_generation_config_win(folder):
    write(
        folder, fields(), tensors(fields()), generation_config={"eos_token_id": [7, 8], "pad_token_id": 9, "top_k": 20}
    )
    config = open_checkpoint(folder).config
    assert (config.eos_token_id, config.pad_token_id) == ((7, 8), 9)


@pytest.mark.parametrize("generation", [None, {}, {"eos_token_id": None}], ids=["absent", "empty", "null"])
def test_without_ids_in_generation_config_those_of_config_hold(folder, generation):
    write(folder, fields(), tensors(fields()), **({} if generation is None else {"generation_config": generation}))
    config = open_checkpoint(folder).config
    assert (config.eos_token_id, config.pad_token_id) == ((59,), 60)


@pytest.mark.parametrize(
    "ids", [{"eos_token_id": "7"}, {"eos_token_id": [7, None, "x"]}, {"pad_token_id": True}], ids=str
)
def test_ids_that_are_no_integers_are_refused(folder, ids):
    write(folder, fields(), tensors(fields()), generation_config=ids)
    assert re.search(r"generation_config\.json: .*expected token ids, found", refusal(folder))


@pytest.mark.parametrize(("stored", "runs_in"), [(BF16, BF16), (np.dtype(np.float16), np.dtype(np.float16))], ids=str)
def test_a_narrow_torch_dtype_means_the_dtype_of_the_embedding(folder, stored, runs_in):
    config = fields(torch_dtype="float8_e4m3fn")
    arrays = tensors(config) | {"model.embed_tokens.weight": np.ones((61, 56), stored)}
    assert open_checkpoint(write(folder, config, arrays)).config.dtype == runs_in


def test_a_config_without_dtype_means_that_of_the_embedding(folder):
    config = fields(torch_dtype=None)
    assert open_checkpoint(write(folder, config, tensors(config))).config.dtype == BF16


# Foreign files.


@pytest.mark.parametrize(
    ("body", "head"), [("", ""), ("model.language_model.", ""), ("language_model.model.", "language_model.")], ids=repr
)
def test_the_prefixes_of_other_classes_are_recognised(folder, body, head):
    def renamed(name):
        return body + name.removeprefix("model.") if name.startswith("model.") else head + name

    stored = {renamed(name): array for name, array in tensors(fields()).items()}
    write(folder, fields(), stored)
    found = perparam.load_params(folder)
    for path, array in found.items():
        assert np.asarray(array).tobytes() == stored[renamed(checkpoints.checkpoint_name(path))].tobytes()


def test_two_prefixes_at_once_are_not_mixed(folder):
    stored = tensors(fields())
    stored["layers.0.mlp.up_proj.weight"] = stored["model.layers.0.mlp.up_proj.weight"]
    write(folder, fields(), stored)
    assert "unused: layers.0.mlp.up_proj.weight (76, 56)" in refusal(folder)


def test_what_the_config_explains_is_left_out_and_told(folder, capsys):
    from perparam.__main__ import main
    from perparam.loaders import open_checkpoint

    config = fields(tie_word_embeddings=True)
    stored = tensors(config)
    stored["lm_head.weight"] = np.zeros((61, 56), np.float32)
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(9, np.float32)
    write(folder, config, stored)
    assert open_checkpoint(folder).left_out == {
        "lm_head.weight": "the head is tied to the embedding",
        "model.layers.0.self_attn.rotary_emb.inv_freq": "frequencies are computed from rope_theta",
    }
    assert main(["plan", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "left out: lm_head.weight, since the head is tied to the embedding" in printed


def test_a_pipe_for_a_config_is_not_waited_for(folder):
    write(folder, fields(), tensors(fields()))
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert "config.json: not a regular file" in refusal(folder)


def test_an_index_beyond_all_measure_is_refused_at_once(folder):
    write(folder, fields(), tensors(fields()), shards=2)
    (folder / "model.safetensors.index.json").write_bytes(b'{"weight_map": {"a": "' + b"x" * (17 << 20) + b'"}}')
    assert "more than 16 MiB or 262144 entries of JSON" in refusal(folder)
