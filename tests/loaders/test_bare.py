"""Safetensors files without a model that perparam knows: their own names, scaled pairs, and how they are told apart."""

import json

import jax
import numpy as np
import pytest
from checkpoints import F8, fields, narrow_pair, safetensors_bytes, tensors, write, write_index
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import perparam
from perparam import Policy
from perparam.commands import main
from perparam.loaders import CheckpointWarning
from perparam.policies.errors import (
    InvalidCheckpoint,
    InvalidScale,
    InvalidSharding,
    MissingFile,
    UnpairedScale,
    UnsupportedConfig,
)

RNG = np.random.default_rng(0)
BERT = {
    "embeddings.word_embeddings.weight": RNG.normal(size=(60, 32)).astype(np.float32),
    "embeddings.position_ids": np.arange(2**40, 2**40 + 8).reshape(1, 8),
    "encoder.layer.0.output.dense.weight": RNG.normal(size=(32, 40)).astype(np.float16),
    "encoder.layer.0.output.dense.bias": RNG.normal(size=32).astype(np.float32),
}


def folder_of(path, arrays, config=None, file="model.safetensors", **metadata):
    path.mkdir()
    (path / file).write_bytes(safetensors_bytes(arrays, **metadata))
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


# Names.


@pytest.mark.parametrize("file", ["model.safetensors", "diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("single", [False, True], ids=["folder", "file"])
def test_tensors_have_their_own_names_and_bits(tmp_path, file, single):
    folder = folder_of(tmp_path / "vit", BERT, file=file)
    found = perparam.load_params(folder / file if single else folder)
    assert {path: np.asarray(array).tobytes() for path, array in found.items()} == {
        name.replace(".", "/"): array.tobytes() for name, array in BERT.items()
    }
    # JAX would truncate it to 32 bits.
    assert found["embeddings/position_ids"].dtype == np.int64


def test_a_policy_is_applied_while_reading(tmp_path):
    folder = folder_of(tmp_path / "bert", BERT)
    policy = Policy({"encoder/**/weight": "f32", "bias": None, "default": "bf16"})
    found = perparam.load_params(folder, policy)
    tree = {name.replace(".", "/"): array for name, array in BERT.items()}
    stored = policy.store(tree)
    assert {path: (array.dtype, np.asarray(array).tobytes()) for path, array in found.items()} == {
        path: (array.dtype, np.asarray(array).tobytes()) for path, array in stored.items()
    }
    plan = policy.explain(perparam.checkpoint_tree(folder))
    assert {row.path: row.change for row in plan}["encoder/layer/0/output/dense/weight"] == "cast"


def test_the_inferred_policy_changes_nothing(tmp_path):
    pairs = narrow_pair(RNG, (32, 64), (16, 16)), narrow_pair(RNG, (32, 64), (32, 32))
    tree = {
        name: perparam.ScaledArray(*pair, perparam.policies.as_format({"dtype": "f8_e4m3fn", "block": block,
                                                                       "scale": "bf16"}))
        for name, pair, block in zip("ab", pairs, ([16, 16], [32, 32]), strict=True)
    }  # fmt: skip
    folder = perparam.save_params({**tree, "n": np.ones(3, np.int32), "c": np.ones(2, np.float16)}, tmp_path / "saved")
    plan = perparam.infer_policy(folder).explain(perparam.checkpoint_tree(folder))
    assert {row.change for row in plan} == {"kept"}


# Scaled pairs.


@pytest.mark.parametrize(
    ("suffix", "grid", "block"),
    [("_scale_inv", (2, 1), (128, 128)), ("_scale", (2, 1), (128, 128)), ("_scale", (200, 1), (1, -1)),
     ("_scale", (200,), (1, -1)), ("_scale", (1, 1), (-1, -1)), ("_scale", (1,), (-1, -1)), ("_scale", (), (-1, -1))],
)  # fmt: skip
def test_scales_beside_a_narrow_weight_make_a_pair(tmp_path, suffix, grid, block):
    kernel, scales = RNG.normal(size=(200, 100)).astype(F8), np.full(grid, 0.5, np.float32)
    folder = folder_of(tmp_path / "t5", {"a.weight": kernel, f"a.weight{suffix}": scales})
    found = perparam.load_params(folder, scaled=True)["a/weight"]
    assert found.format.block == block
    again = perparam.load_params(perparam.save_params({"a.weight": found}, tmp_path / "again"), scaled=True)["a/weight"]
    assert (again.format, again.scale_inv.tolist()) == (found.format, found.scale_inv.tolist())
    wide = perparam.load_params(folder, "f32")
    assert list(wide) == ["a/weight"]
    assert (np.asarray(wide["a/weight"]) == kernel.astype(np.float32) * 0.5).all()


def test_the_block_is_that_of_config_json_or_of_the_policy(tmp_path):
    kernel, scales = narrow_pair(RNG, (64, 96), (16, 24))
    arrays = {"a.weight": kernel, "a.weight_scale_inv": scales}
    quantization = {"quant_method": "fp8", "weight_block_size": [16, 24]}
    given = folder_of(tmp_path / "given", arrays, {"model_type": "t5", "quantization_config": quantization})
    assert perparam.load_params(given, bare=True, scaled=True)["a/weight"].block == (16, 24)
    absent = folder_of(tmp_path / "absent", arrays)
    with pytest.raises(InvalidScale, match="Name the block"):
        perparam.load_params(absent)
    policy = Policy({"weight": "f8_e4m3fn"}, block=(16, 24))
    assert perparam.load_params(absent, policy, scaled=True)["a/weight"].block == (16, 24)


def test_a_narrow_float_without_scales_is_refused(tmp_path):
    folder = folder_of(tmp_path / "cast", {"a.weight": np.ones((4, 4), F8)})
    with pytest.raises(UnpairedScale, match=r"a/weight: f8_e4m3fn .* without its scales 'a/weight_scale_inv'"):
        perparam.load_params(folder)


# Which mode.


def test_a_model_that_is_not_implemented_is_read_by_its_names_with_a_warning(tmp_path):
    folder = folder_of(tmp_path / "bert", BERT, {"model_type": "bert"})
    for read in (perparam.load_params, perparam.checkpoint_tree, perparam.infer_policy):
        with pytest.warns(CheckpointWarning, match=r"model_type 'bert' is not supported\. The parameters have the"):
            read(folder)
        read(folder, bare=True)
        with pytest.raises(UnsupportedConfig, match="model_type 'bert' is not supported"):
            read(folder, bare=False)


@pytest.mark.parametrize("use", [perparam.load_model, lambda folder: perparam.convert_checkpoint(folder, "new")])
def test_what_needs_a_model_never_reads_by_names(tmp_path, use):
    folder = folder_of(tmp_path / "bert", BERT, {"model_type": "bert"})
    with pytest.raises(UnsupportedConfig, match="model_type 'bert' is not supported"):
        use(folder)
    (folder / "config.json").unlink()
    with pytest.raises(MissingFile, match=r"config\.json"):
        use(folder)


def test_a_model_that_is_implemented_has_its_paths_unless_bare(tmp_path):
    folder = write(tmp_path / "qwen3", fields(), tensors(fields()))
    assert "layers/0/mlp/up_proj/kernel" in perparam.load_params(folder)
    found = perparam.load_params(folder, bare=True)
    assert "model/layers/0/mlp/up_proj/weight" in found
    assert "model/layers/0/mlp/up_proj/weight_scale_inv" in found


def test_a_damaged_config_is_an_error_not_a_missing_model(tmp_path):
    folder = folder_of(tmp_path / "bert", BERT)
    for text in ("{", '{"model_type": 3}'):
        (folder / "config.json").write_text(text)
        with pytest.raises(InvalidCheckpoint, match=r"config\.json"):
            perparam.load_params(folder)


def test_the_plan_says_which_names_it_has(tmp_path, capsys):
    folder = folder_of(tmp_path / "bert", BERT, {"model_type": "bert"})
    assert main(["plan", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "encoder/layer/0/output/dense/weight" in printed
    assert printed.endswith("The paths are the names in the files, since model_type 'bert' is not supported.\n")
    assert main(["plan", str(folder / "model.safetensors"), "--json"]) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)["rows"]) == len(BERT)
    assert "since a file has no config.json" in captured.err


# What is refused.


def test_two_tensors_of_one_path_are_refused(tmp_path):
    folder = folder_of(tmp_path / "x", {"a.b": np.ones(2, np.float32), "a/b": np.ones(2, np.float32)})
    with pytest.raises(InvalidCheckpoint, match=r"a\.b and a/b both have the path a/b"):
        perparam.load_params(folder)


def test_a_tensor_within_a_tensor_is_refused(tmp_path):
    folder = folder_of(tmp_path / "x", {"a": np.ones(2, np.float32), "a.b.c": np.ones(2, np.float32)})
    with pytest.raises(InvalidCheckpoint, match=r"a is a tensor, and a\.b\.c is within it"):
        perparam.checkpoint_tree(folder)


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"a": 3}', '{"a": [16]}', '{"a": [0, 16]}', '{"a": ["16", 16]}', '{"a": [1e3, 16]}'],
)  # fmt: skip
def test_damaged_blocks_in_the_metadata_are_refused(tmp_path, text):
    folder = folder_of(tmp_path / "x", {"a": np.ones(2, np.float32)}, **{"perparam.blocks": text})
    with pytest.raises(InvalidCheckpoint, match=r"perparam\.blocks in __metadata__"):
        perparam.load_params(folder)


def test_blocks_in_the_metadata_that_do_not_fit_the_scales_are_refused(tmp_path):
    kernel, scales = narrow_pair(RNG, (64, 96), (16, 24))
    arrays = {"a": kernel, "a_scale_inv": scales}
    folder = folder_of(tmp_path / "x", arrays, **{"perparam.blocks": '{"a": [64, 96]}'})
    with pytest.raises(InvalidScale, match=r"expected \(1, 1\)"):
        perparam.load_params(folder)


def test_a_folder_with_no_safetensors_file_or_several_is_refused(tmp_path):
    with pytest.raises(MissingFile, match="and no other safetensors file"):
        perparam.load_params(tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.safetensors").write_bytes(safetensors_bytes({name: np.ones(2, np.float32)}))
    with pytest.raises(MissingFile, match=r"and 2 other safetensors files\. Pass one of them"):
        perparam.load_params(tmp_path)
    write_index(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"})
    assert list(perparam.load_params(tmp_path)) == ["a", "b"]


def test_a_file_is_no_model_and_has_no_revision(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(BERT))
    with pytest.raises(MissingFile, match="bare=False asks for a model"):
        perparam.load_params(tmp_path / "a.safetensors", bare=False)
    with pytest.raises(InvalidCheckpoint, match="is a file, and has no revision"):
        perparam.load_params(tmp_path / "a.safetensors", revision="v1")


# Devices.


def test_a_mesh_needs_a_model_and_patterns_do_not(tmp_path):
    folder, mesh = folder_of(tmp_path / "bert", BERT), Mesh(np.array(jax.devices()[:1]), ("x",))
    with pytest.raises(InvalidSharding, match="a Mesh needs a model"):
        perparam.load_params(folder, sharding=mesh)
    found = perparam.load_params(folder, sharding={"weight": NamedSharding(mesh, PartitionSpec("x"))})
    assert found["encoder/layer/0/output/dense/weight"].sharding.spec == PartitionSpec("x")
