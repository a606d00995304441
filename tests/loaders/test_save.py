"""`save_model` and `convert_checkpoint`: what is written is what was held, bit for bit, or nothing is."""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import checkpoints
import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from checkpoints import BF16, BLOCK, CASES, F8, GOLDEN, checkpoint_name, fields, tensors, write
from flax import nnx
from helpers import bits

import perparam
from perparam import Policy, load_model, save_model
from perparam.loaders import convert_checkpoint, open_checkpoint
from perparam.loaders.families import config_to_json, read_config
from perparam.loaders.safetensors.writer import size_in_bytes
from perparam.loaders.save import shard_sizes
from perparam.models import Quantization, Qwen3Config, Yarn
from perparam.policies.errors import InvalidCheckpoint, InvalidScale, InvalidSize, SaveFailed, UnsupportedExport
from perparam.policies.resolved import resolve

TESTS = pathlib.Path(__file__).parent.parent
INDEX = "model.safetensors.index.json"
GATE = "layers/1/mlp/gate_proj"
BLOCK64 = Policy({"lm_head/kernel": None, "kernel": "f8_e4m3fn"}, "bf16", block=(64, 64))
PARTIAL = Policy({"layers/0/**/kernel": "bf16", "**/mlp/down_proj/kernel": "f32", "**/self_attn/*_proj/kernel": None})
FROM_BF16 = Policy({"layers/*/mlp/{up,down}_proj/kernel": "f8_e4m3fn", "norm/scale": "f32"}, "f32", block=(8, 40))


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    return write(tmp_path_factory.mktemp("fp8") / "checkpoint", fields(), tensors(fields()))


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    config = fields(quantization_config=None, tie_word_embeddings=True, rope_scaling=None)
    return write(tmp_path_factory.mktemp("bf16") / "checkpoint", config, tensors(config))


@pytest.fixture(scope="module")
def model(fp8):
    return load_model(fp8)


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def assert_same_tensors(found, wanted):
    """Equal names, dtypes, shapes and bytes."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert bits(found[name]) == bits(wanted[name]), name


def held(model):
    """What a model holds, as a checkpoint calls it."""
    return {checkpoint_name(path): np.asarray(array) for path, array in checkpoints.arrays(model).items()}


def as_stored(case):
    stored = checkpoints.read(GOLDEN / case)
    if config_of(GOLDEN / case)["tie_word_embeddings"]:
        stored.pop("lm_head.weight", None)
    return stored


def everything(folder):
    """The bytes of every file below a folder, those with a dot in front included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Tensors.


SHARDED = ("bf16_yarn_new_form", "fp8_mixed_unquantised", "fp8_tied_with_lm_head")


@pytest.mark.parametrize("limit", ["5GB", 6000, 1])
@pytest.mark.parametrize("case", SHARDED)
def test_one_file_or_many_hold_the_same_bit_for_bit(case, limit, tmp_path):
    target = tmp_path / "saved"
    assert save_model(load_model(GOLDEN / case), target, max_shard_size=limit) == target
    wanted = as_stored(case)
    assert_same_tensors(checkpoints.read(target), wanted)
    files = sorted(path.name for path in target.glob("*.safetensors"))
    if limit == "5GB":
        assert files == ["model.safetensors"]
        assert not (target / INDEX).exists()
        return
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    index = json.loads((target / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in wanted.values())
    assert index["weight_map"].keys() == wanted.keys()
    for file in files:
        with safetensors.safe_open(target / file, framework="np") as opened:
            names = set(opened.keys())
            assert opened.metadata() == {"format": "pt"}
        assert names == {name for name, where in index["weight_map"].items() if where == file}
        groups = {name.removesuffix("_scale_inv") for name in names}
        assert all(f"{name}_scale_inv" in names for name in groups if f"{name}_scale_inv" in wanted)
        assert sum(wanted[name].nbytes for name in names) <= limit or len(groups) == 1
    if limit == 1:
        assert len(files) == sum(not name.endswith("_scale_inv") for name in wanted)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_that_is_loaded_and_saved_is_the_same_bit_for_bit(case, tmp_path):
    model = load_model(GOLDEN / case)
    again = load_model(save_model(model, tmp_path / "saved", max_shard_size=9000))
    assert_same_tensors(checkpoints.read(tmp_path / "saved"), as_stored(case))
    ours, theirs = (dataclasses.asdict(each.config) for each in (again, model))
    for found in (ours, theirs):
        found.pop("source")
        if found["quantization"]:
            # Those that are not converted are said anew, in the order of the model.
            found["quantization"].pop("not_converted")
    assert ours == theirs
    assert (again.activations, again.output) == (model.activations, model.output)


# A model is its config, its dtypes and its tensors, and those are compared for all: one is enough for the quick run.
@pytest.mark.parametrize(
    "case", [case if case == "bf16_yarn_new_form" else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_what_was_saved_gives_the_same_logits_bit_for_bit(case, tmp_path):
    model = load_model(GOLDEN / case)
    again = load_model(save_model(model, tmp_path / "saved", max_shard_size=9000))
    ids = np.load(GOLDEN / case / "expected.npz")["input_ids"][:1]
    assert bits(checkpoints.logits(again, ids)) == bits(checkpoints.logits(model, ids))


def test_tensors_begin_at_multiples_of_their_size(model, tmp_path):
    save_model(model, tmp_path / "saved", {"params": {"scale": "f32", "embedding": "f16"}})
    data = (tmp_path / "saved" / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    sizes = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1}
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == set(sizes)
    for name, entry in header.items():
        assert name == "__metadata__" or (8 + length + entry["data_offsets"][0]) % sizes[entry["dtype"]] == 0


def test_parameters_of_several_slabs_are_whole(fp8, bf16, tmp_path, monkeypatch):
    monkeypatch.setattr("perparam.loaders.slabs.COPY_BYTES", 300)
    monkeypatch.setattr("perparam.loaders.slabs.CONVERT_ELEMENTS", 600)
    save_model(load_model(fp8), tmp_path / "kept")
    assert_same_tensors(checkpoints.read(tmp_path / "kept"), checkpoints.read(fp8))
    model = load_model(bf16)
    policy = Policy({"**/{gate,up}_proj/kernel": "f8_e4m3fn", "**/down_proj/kernel": "f32"}, block=(12, 10))
    save_model(model, tmp_path / "changed", policy)
    assert_same_tensors(checkpoints.read(tmp_path / "changed"), held(model.with_policy(policy)))


def test_a_model_made_of_numpy_arrays_is_saved(fp8, tmp_path):
    model = load_model(fp8)
    model.norm.scale.set_value(np.asarray(model.norm.scale[...]))
    save_model(model, tmp_path / "saved")
    assert_same_tensors(checkpoints.read(tmp_path / "saved"), checkpoints.read(fp8))


def test_a_model_that_was_never_in_a_file_is_saved(model, tmp_path):
    fresh = perparam.models.Qwen3(
        dataclasses.replace(model.config, num_hidden_layers=1, source=None, quantization=None), rngs=nnx.Rngs(0)
    )
    save_model(fresh, tmp_path / "saved")
    assert sorted(os.listdir(tmp_path / "saved")) == ["config.json", "model.safetensors", "policy.yaml"]
    again = load_model(tmp_path / "saved", tmp_path / "saved" / "policy.yaml")
    assert_same_tensors(held(again), held(fresh))
    assert (again.config, again.activations) == (fresh.config, fresh.activations)


# Sizes of shards.


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("5GB", 5 * 10**9), ("512MiB", 512 * 2**20), ("1.5KB", 1500), ("2 tib", 2 * 2**40), ("123", 123), (123, 123),
        (10**18 + 1, 10**18 + 1),
    ],
)  # fmt: skip
def test_sizes_are_read(size, expected):
    assert size_in_bytes(size) == expected


@pytest.mark.parametrize(
    "size",
    ["", "5XB", "GB", "-1GB", "0", "0.0001KB", "5GB5", "nan", "infGB", "1e9", "٣GB", 0, -1, True, 1.5, None, b"5GB"],
    ids=repr,
)
def test_what_is_no_size_is_refused_before_anything_is_written(model, tmp_path, size):
    with pytest.raises(InvalidSize, match="expected a number of bytes or text such as '5GB'"):
        save_model(model, tmp_path / "saved", max_shard_size=size)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["9" * 400, "9" * 400 + "GB", "9" * 5000, 10**400, 10**5000], ids=lambda _: "huge")
def test_a_size_beyond_all_floats_is_read_or_refused(size):
    with contextlib.suppress(InvalidSize):
        assert size_in_bytes(size) >= 10**300


def test_the_sizes_of_shards_are_known_before_they_are_written(fp8, tmp_path):
    for policy in (None, BLOCK64):
        checkpoint = open_checkpoint(fp8)
        sizes = shard_sizes(checkpoint, resolve(perparam.get_policy(policy), checkpoint.tree), "12KB")
        convert_checkpoint(fp8, tmp_path / "saved", policy, max_shard_size="12KB")
        for file, size in sizes.items():
            data = (tmp_path / "saved" / file).read_bytes()
            assert len(data) - 8 - int.from_bytes(data[:8], "little") == size
        assert len(sizes) == len(list((tmp_path / "saved").glob("*.safetensors")))


# config.json.

_sizes = st.integers(1, 4096)
_positive = st.floats(1e-12, 1e12, allow_nan=False)


@st.composite
def configs(draw):
    kv_heads, layers = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    window = draw(st.none() | st.integers(1, 2**31 - 1))
    yarn = st.builds(
        Yarn, st.floats(1, 1e6), _sizes, _positive, beta_fast=_positive, beta_slow=_positive, truncate=st.booleans()
    )
    names = st.sampled_from(["lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"])
    ids = st.integers(0, 2**31 - 1)
    return Qwen3Config(
        vocab_size=draw(_sizes),
        hidden_size=draw(_sizes),
        intermediate_size=draw(_sizes),
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * draw(st.integers(1, 4)),
        num_key_value_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 128)),
        max_position_embeddings=draw(_sizes),
        rms_norm_eps=draw(_positive),
        rope_theta=draw(st.floats(1.5, 1e12)),
        rope_scaling=draw(st.none() | yarn),
        attention_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        windows=draw(st.just(()) | st.tuples(*[st.sampled_from([None, window])] * layers).filter(any)),
        dtype=draw(st.sampled_from([None, np.dtype(np.float32), np.dtype(np.float16), BF16])),
        quantization=draw(
            st.none() | st.builds(Quantization, st.tuples(_sizes, _sizes), st.lists(names, unique=True).map(tuple))
        ),
        eos_token_id=draw(st.lists(ids, max_size=3).map(tuple)),
        pad_token_id=draw(st.none() | ids),
    )


@hypothesis.settings(max_examples=40)
@hypothesis.given(configs())
def test_a_config_is_what_its_json_says(config):
    written = json.loads(json.dumps(config_to_json(config)))
    assert read_config(written) == config


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 9},
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        {"eos_token_id": None}, {"eos_token_id": [3, 1, 2]}, {"torch_dtype": "float8_e4m3fn"},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 2.0, "mscale_all_dim": 1.0}},
        {"rope_scaling": {"type": "yarn", "factor": 2}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "rope_theta": None},
    ],
    ids=repr,
)  # fmt: skip
def test_a_config_that_was_read_is_written_as_the_same(changes):
    config = read_config(fields(**changes))
    assert read_config(config_to_json(config)) == config


def test_windows_that_differ_are_refused_and_nothing_is_written(fp8, tmp_path):
    model = load_model(fp8)
    model.config = dataclasses.replace(model.config, windows=(3, 5))
    with pytest.raises(UnsupportedExport, match=r"sliding windows of \[3, 5\] tokens"):
        save_model(model, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_fields_that_change_nothing_here_are_kept_for_others(tmp_path):
    config = fields(bos_token_id=3, initializer_range=0.5, id2label={"0": "x"}, use_cache=False)
    save_model(load_model(write(tmp_path / "source", config, tensors(config))), tmp_path / "saved")
    written = config_of(tmp_path / "saved")
    for name in ("bos_token_id", "initializer_range", "id2label", "use_cache", "architectures", "model_type"):
        assert written[name] == config[name]


# Policies.


@pytest.mark.parametrize(
    ("source", "policy"),
    [
        ("fp8", "f32"), ("fp8", BLOCK64), ("fp8", PARTIAL), ("fp8", "fp8_dynamic"),
        ("fp8", {"params": {"scale_inv": "f32"}, "compute": "bf16"}),
        ("bf16", "fp8_weight_only"), ("bf16", FROM_BF16), ("bf16", None),
    ],
    ids=str,
)  # fmt: skip
def test_a_policy_is_applied_on_the_way(request, source, policy, tmp_path):
    source = request.getfixturevalue(source)
    model, policy = load_model(source), perparam.get_policy(policy)
    target = save_model(model, tmp_path / "saved", policy)
    stored, wanted = checkpoints.read(target), model.with_policy(policy)
    assert_same_tensors(stored, held(wanted))

    written = config_of(target)
    kernels = {name: stored[name].dtype for name in stored if name.endswith("_proj.weight") or name == "lm_head.weight"}
    plain = {name.removesuffix(".weight") for name, dtype in kernels.items() if dtype != F8}
    if len(plain) == len(kernels):
        assert "quantization_config" not in written
    else:
        quantization = written["quantization_config"]
        block = policy.block or (BLOCK if source == request.getfixturevalue("fp8") else (128, 128))
        assert quantization["weight_block_size"] == list(block)
        # A tied head too: transformers would make one that takes scales.
        assert sorted(quantization["modules_to_not_convert"]) == sorted(plain | {"lm_head"})
        assert {key: quantization[key] for key in ("quant_method", "fmt", "activation_scheme")} == {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        }  # fmt: skip
    dtype = policy.activations or BF16
    assert written["torch_dtype"] == dtype.name

    if policy != Policy():
        assert Policy.load(target / "policy.yaml") == policy
    again = load_model(target, target / "policy.yaml")
    assert_same_tensors(held(again), stored)
    assert (again.activations, again.output) == (wanted.activations, wanted.output)


def test_quantised_kernels_are_what_quantize_makes(bf16, tmp_path):
    before = checkpoints.read(bf16)
    after = checkpoints.read(save_model(load_model(bf16), tmp_path / "saved", FROM_BF16))
    for name, kernel in before.items():
        if re.search(r"(up|down)_proj", name):
            narrow, scales = perparam.quantize(kernel, "f8_e4m3fn", (8, 40))
            assert bits(after[name]) == bits(narrow)
            assert bits(after[f"{name}_scale_inv"]) == bits(scales)
        elif name != "model.norm.weight":
            assert bits(after[name]) == bits(kernel)


def test_dequantised_kernels_are_what_dequantize_makes(fp8, tmp_path):
    before = checkpoints.read(fp8)
    after = checkpoints.read(convert_checkpoint(fp8, tmp_path / "saved", "f32"))
    for name in [name for name in before if f"{name}_scale_inv" in before]:
        assert bits(after[name]) == bits(perparam.dequantize(before[name], before[f"{name}_scale_inv"], BLOCK))


CONVERSIONS = [
    ("fp8", None), ("fp8", "f32"), ("fp8", BLOCK64), ("fp8", PARTIAL), ("fp8", "fp8_weight_only"),
    ("bf16", "fp8_weight_only"), ("bf16", FROM_BF16), ("bf16", "f16"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "policy"), CONVERSIONS, ids=str)
def test_converting_is_loading_and_saving(request, source, policy, tmp_path):
    source = request.getfixturevalue(source)
    loaded = save_model(load_model(source, policy), tmp_path / "loaded", max_shard_size="9KB")
    assert convert_checkpoint(source, tmp_path / "converted", policy, max_shard_size="9KB") == tmp_path / "converted"
    assert_same_tensors(checkpoints.read(tmp_path / "converted"), checkpoints.read(loaded))
    configs = [config_of(folder) for folder in (tmp_path / "converted", loaded)]
    for config in configs:  # in the order of the files, and in the model's
        config.get("quantization_config", {}).get("modules_to_not_convert", []).sort()
    assert configs[0] == configs[1]
    if policy is not None:
        assert (tmp_path / "converted" / "policy.yaml").read_bytes() == (loaded / "policy.yaml").read_bytes()


def test_the_policy_of_a_model_is_saved_with_it(fp8, tmp_path):
    save_model(load_model(fp8, PARTIAL), tmp_path / "saved")
    assert Policy.load(tmp_path / "saved" / "policy.yaml") == PARTIAL


@pytest.mark.parametrize(
    "rules",
    [
        {"kernel": "bf16", "scale_inv": "f32"},
        {"**/mlp/*/kernel": "f32", "**/mlp/*/scale_inv": "f32", "**/self_attn/*/scale_inv": "f32"},
    ],
    ids=["all", "some"],
)
def test_the_policy_loads_what_it_saved_where_it_dissolved_the_scales_it_names(fp8, rules, tmp_path):
    policy = Policy(rules, "bf16")
    model = load_model(fp8, policy)
    saved = [
        save_model(model, tmp_path / "model"),
        save_model(load_model(fp8), tmp_path / "way", policy),
        convert_checkpoint(fp8, tmp_path / "converted", policy),
    ]
    for folder in saved:
        again = load_model(folder, folder / "policy.yaml")
        assert_same_tensors(held(again), held(model))
        assert again.activations == BF16


def test_without_a_policy_the_one_that_is_written_keeps_everything(fp8, tmp_path):
    folder = save_model(load_model(fp8), tmp_path / "saved")
    plan = Policy.load(folder / "policy.yaml").explain(perparam.checkpoint_tree(folder))
    assert {row.change for row in plan.rows} == {"kept"}


def test_a_policy_beside_the_tensors_is_not_read_unless_it_is_named(model, tmp_path):
    folder = save_model(model, tmp_path / "saved")
    (folder / "policy.yaml").write_bytes(b"\xff{{{ nothing: of the kind")
    assert_same_tensors(held(load_model(folder)), held(model))
    convert_checkpoint(folder, tmp_path / "again")
    with pytest.raises(perparam.PerparamError, match=r"policy\.yaml"):
        load_model(folder, folder / "policy.yaml")


# What belongs to a model beside its tensors.

TOKENIZER = {
    "tokenizer.json": b'{"a": 1}', "tokenizer_config.json": b"{}\n", "special_tokens_map.json": b"{ }",
    "added_tokens.json": b'{"b": 2}', "vocab.json": b"{}", "merges.txt": "a b\nc ö\n".encode(),
    "chat_template.jinja": b"{{ x }}",
}  # fmt: skip


@pytest.mark.parametrize("linked", [False, True], ids=["files", "links"])
@pytest.mark.parametrize("convert", [False, True], ids=["saved", "converted"])
def test_the_tokenizer_and_the_generation_config_are_carried_over(tmp_path, linked, convert):
    source = write(tmp_path / "source", fields(), tensors(fields()))
    generation = json.dumps({"eos_token_id": [7, 59], "pad_token_id": 3, "temperature": 0.6}).encode()
    for name, content in {**TOKENIZER, "generation_config.json": generation}.items():
        (source / name).write_bytes(content)
    (source / "README.md").write_text("not ours")
    if linked:  # as the hub's cache has them
        blobs = tmp_path / "blobs"
        blobs.mkdir()
        for i, path in enumerate(sorted(source.iterdir())):
            path.rename(blobs / str(i))
            path.symlink_to(f"../blobs/{i}")
        (tmp_path / "link").symlink_to(source)
        source = tmp_path / "link"
    target = tmp_path / "saved"
    convert_checkpoint(source, target) if convert else save_model(load_model(source), target)
    assert {name: (target / name).read_bytes() for name in TOKENIZER} == TOKENIZER
    assert (target / "generation_config.json").read_bytes() == generation
    assert not (target / "README.md").exists()
    assert not any(path.is_symlink() for path in target.iterdir())
    assert config_of(target)["eos_token_id"] == [7, 59]
    again = load_model(target).config
    assert (again.eos_token_id, again.pad_token_id) == ((7, 59), 3)


def test_a_source_that_is_gone_is_no_fault(tmp_path):
    source = write(tmp_path / "source", fields(), tensors(fields()), generation_config={"eos_token_id": [7, 59]})
    model = load_model(source)
    shutil.rmtree(source)
    target = save_model(model, tmp_path / "saved")
    assert load_model(target).config.eos_token_id == (7, 59)
    assert sorted(os.listdir(target)) == ["config.json", "model.safetensors", "policy.yaml"]


def test_a_source_is_found_again_from_another_working_directory(tmp_path, monkeypatch):
    write(tmp_path / "source", fields(), tensors(fields()), tokenizer={"a": 1})
    monkeypatch.chdir(tmp_path)
    model = load_model("source")
    (tmp_path / "elsewhere" / "source").mkdir(parents=True)
    (tmp_path / "elsewhere" / "source" / "vocab.json").write_text("another's")
    monkeypatch.chdir(tmp_path / "elsewhere")
    save_model(model, "saved")
    assert json.loads((tmp_path / "elsewhere" / "saved" / "tokenizer.json").read_text()) == {"a": 1}
    assert not (tmp_path / "elsewhere" / "saved" / "vocab.json").exists()


def test_ids_that_were_changed_since_are_those_that_are_saved(tmp_path):
    source = write(
        tmp_path / "source", fields(), tensors(fields()), generation_config={"eos_token_id": [7, 59], "top_k": 20}
    )
    model = load_model(source)
    model.config = dataclasses.replace(model.config, eos_token_id=(5,), pad_token_id=4)
    target = save_model(model, tmp_path / "saved")
    again = load_model(target).config
    assert (again.eos_token_id, again.pad_token_id) == ((5,), 4)
    assert json.loads((target / "generation_config.json").read_text())["top_k"] == 20


# What the layout cannot say.


def broken(fp8, name):
    """A model that no checkpoint can hold."""
    model = load_model(fp8)
    if name == "e5m2":
        return load_model(fp8, {"params": {"layers/*/mlp/*/kernel": "f8_e5m2", "kernel": None}})
    if name == "int8":
        return load_model(fp8, {"params": {"layers/*/mlp/*/kernel": "int8", "kernel": None}})
    if name == "e8m0 scales":
        return load_model(fp8, {"params": {"**/mlp/*/kernel": "mxfp8", "kernel": None}})
    if name == "whole axes":
        return load_model(fp8, {"params": {"kernel": {"dtype": "f8_e4m3fn", "block": [16, -1]}}})
    if name == "embedding":
        return load_model(fp8, {"params": {"embedding": "f8_e4m3fn"}})
    if name == "blocks":
        return load_model(fp8, Policy({"lm_head/kernel": "f8_e4m3fn"}, block=(32, 32)))
    if name == "larger":
        embedding = model.embed_tokens.embedding
        embedding.set_value(jnp.concatenate([embedding[...], embedding[...]]))
    if name == "missing":
        del model.layers[1].mlp.up_proj.kernel
        del model.layers[1].mlp.up_proj.scale_inv
    if name == "more":
        model.layers[0].mlp.up_proj.lora_a = nnx.Param(jnp.zeros((3, 4)))
    return model


REFUSALS = {
    "e5m2": r"layers/0/mlp/.*: f8_e5m2 is not supported in this layout",
    "int8": r"layers/0/mlp/.*: (int8|i8) is not supported in this layout",
    "e8m0 scales": r"layers/0/mlp/.*/scale_inv: f8_e8m0fnu is not supported in this layout",
    "whole axes": r"kernels in blocks of \[16, -1\], -1 for a whole axis: no quantization_config can describe that",
    "embedding": r"embed_tokens/embedding: f8_e4m3fn, but in this layout only kernels are quantised",
    "blocks": r"kernels in blocks of \[\(16, 24\), \(32, 32\)\]: config.json can have only one",
    "more": r"no name for 1 parameter: layers/0/mlp/up_proj/lora_a",
    "larger": r"embed_tokens/embedding",
    "missing": r"layers/1/mlp/up_proj/kernel",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_parameters_that_the_layout_cannot_say_are_refused_and_nothing_is_written(fp8, name, tmp_path):
    with pytest.raises(UnsupportedExport, match=REFUSALS[name]):
        save_model(broken(fp8, name), tmp_path / "above" / "saved")
    assert not list(tmp_path.iterdir())


def test_a_policy_can_make_them_fit(fp8, tmp_path):
    for name in ("e5m2", "embedding", "blocks"):
        save_model(broken(fp8, name), tmp_path / name, "bf16")
        assert {array.dtype for array in checkpoints.read(tmp_path / name).values()} == {BF16}


@pytest.mark.parametrize(
    "policy",
    [{"params": {"embedding": "f8_e4m3fn"}}, {"params": {"**/mlp/*/kernel": "f8_e5m2"}}],
    ids=["embedding", "e5m2"],
)
def test_converting_refuses_them_too(fp8, policy, tmp_path):
    with pytest.raises(UnsupportedExport, match=r"is not supported in this layout|only kernels are quantised"):
        convert_checkpoint(fp8, tmp_path / "saved", policy)
    assert not list(tmp_path.iterdir())


def test_a_linear_with_more_parameters_is_refused(model, tmp_path):
    class Lora(perparam.models.layers.Linear):
        def __init__(self, in_features, out_features, *, rngs, **more):
            super().__init__(in_features, out_features, rngs=rngs, **more)
            self.lora_a = nnx.Param(jnp.zeros((in_features, 2)))

    config = dataclasses.replace(model.config, num_hidden_layers=1)
    with pytest.raises(UnsupportedExport, match=r"no name for 8 parameters: .*lora_a"):
        save_model(perparam.models.Qwen3(config, linear=Lora, rngs=nnx.Rngs(0)), tmp_path / "saved")
    assert not list(tmp_path.iterdir())


# Where it may be saved.


def test_a_folder_that_holds_something_else_is_kept(model, tmp_path):
    target = save_model(model, tmp_path / "saved")
    (target / "notes.txt").write_text("mine")
    before = everything(tmp_path)
    with pytest.raises(SaveFailed, match=r"contains notes\.txt, which saving would delete\. Choose another folder"):
        save_model(model, target, "bf16")
    with pytest.raises(SaveFailed, match=r"contains notes\.txt"):
        convert_checkpoint(model.config.source.parent, target)
    assert everything(tmp_path) == before


def test_a_folder_under_a_name_of_ours_is_kept(model, tmp_path):
    target = tmp_path / "saved"
    (target / "config.json").mkdir(parents=True)
    (target / "config.json" / "precious").write_text("mine")
    with pytest.raises(SaveFailed, match=r"config\.json"):
        save_model(model, target)
    assert everything(tmp_path) == {"saved/config.json/precious": b"mine"}


def test_a_file_in_the_way_is_kept(model, tmp_path):
    (tmp_path / "saved").write_text("mine")
    for target in (tmp_path / "saved", tmp_path / "saved" / "below"):
        with pytest.raises(SaveFailed, match="cannot be written"):
            save_model(model, target)
    assert everything(tmp_path) == {"saved": b"mine"}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_that_may_not_be_written_to_is_refused(model, tmp_path):
    (tmp_path / "parent").mkdir(mode=0o555)
    with pytest.raises(SaveFailed, match="Permission denied"):
        save_model(model, tmp_path / "parent" / "saved")


def test_a_checkpoint_is_not_converted_into_its_own_folder(tmp_path):
    source = write(tmp_path / "source", fields(), tensors(fields()))
    (tmp_path / "link").symlink_to(source)
    before = everything(source)
    for target in (source, tmp_path / "link", f"{source}/../source/"):
        with pytest.raises(InvalidCheckpoint, match="cannot be converted into its own folder"):
            convert_checkpoint(source, target, "bf16")
    assert everything(source) == before


def test_a_model_is_saved_over_its_own_source(tmp_path):
    source = write(tmp_path / "source", fields(), tensors(fields()), shards=3, tokenizer={"a": 1})
    model = load_model(source)
    wanted = held(model.with_policy("bf16"))
    save_model(model, source, "bf16")
    assert sorted(os.listdir(source)) == ["config.json", "model.safetensors", "policy.yaml", "tokenizer.json"]
    assert_same_tensors(checkpoints.read(source), wanted)
    save_model(model, source, max_shard_size="9KB")
    assert_same_tensors(checkpoints.read(source), held(model))
    assert (source / "tokenizer.json").exists()
    assert not (source / "model.safetensors").exists()
    assert os.listdir(tmp_path) == ["source"]


def test_links_empty_folders_and_folders_that_are_not_there_yet_are_targets(model, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real", target_is_directory=True)
    (tmp_path / "dangling").symlink_to("later", target_is_directory=True)
    for name in ("empty", "link", "link", "dangling", "one/two/three"):
        save_model(model, str(tmp_path / name))
        assert_same_tensors(checkpoints.read(tmp_path / name), held(model))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "dangling").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["dangling", "empty", "later", "link", "one", "real"]
    assert os.listdir(tmp_path / "one" / "two") == ["three"]


@pytest.mark.parametrize("name", ["n" * 255, "字" * 85, "with space", "ö{}'\"%s"], ids=["long", "wide", "space", "odd"])
def test_any_name_that_the_file_system_takes_will_do(model, tmp_path, name):
    save_model(model, tmp_path / name)
    assert os.listdir(tmp_path) == [name]


def test_the_working_directory_is_a_target(model, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_model(model, ".")
    assert_same_tensors(checkpoints.read(tmp_path / "here"), held(model))


# A disk that is full.


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync", "late pwrite"])
@pytest.mark.parametrize("there", [False, True], ids=["new", "old"])
def test_a_full_disk_leaves_the_folder_as_it_was(model, tmp_path, monkeypatch, call, there):
    target = tmp_path / "saved"
    if there:
        save_model(model, target, "bf16")
    before = everything(tmp_path)
    failing = no_space
    if call == "late pwrite":
        count, pwrite = iter(range(1000)), os.pwrite

        def failing(*arguments):
            return no_space() if next(count) > 20 else pwrite(*arguments)

    if not hasattr(os, call.split()[-1]):
        pytest.skip("not on this system")
    monkeypatch.setattr(os, call.split()[-1], failing)
    with pytest.raises(SaveFailed, match=r"cannot be written: .*No space left.* Nothing was changed\. Free disk space"):
        save_model(model, target)
    assert everything(tmp_path) == before
    assert os.listdir(tmp_path) == ["saved"] * there


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_file_system_that_cannot_reserve_will_do(model, tmp_path, monkeypatch, error):
    def refuse(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    assert_same_tensors(checkpoints.read(save_model(model, tmp_path / "saved")), held(model))


def test_writing_in_pieces_is_no_fault(model, tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, place: pwrite(file, memoryview(data)[:100], place))
    assert_same_tensors(checkpoints.read(save_model(model, tmp_path / "saved")), held(model))


LIMITED = """
import os, pathlib, resource, signal, sys
import perparam
from perparam.policies.errors import SaveFailed

folder = pathlib.Path(sys.argv[1])
model = perparam.load_model(folder / "source")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    perparam.save_model(model, folder / "saved")
except SaveFailed as error:
    print("refused:", error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_a_limit_on_the_size_of_files_is_a_full_disk(tmp_path):
    write(tmp_path / "source", fields(), tensors(fields()))
    save_model(load_model(tmp_path / "source"), tmp_path / "saved", "bf16")
    before = everything(tmp_path)
    run = python(LIMITED, tmp_path)
    assert "refused:" in run.stdout
    assert "File too large" in run.stdout
    assert everything(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["saved", "source"]


def python(code, *arguments, **environment):
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path} | environment
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    return run


# What fails on the way.


def damaged(tmp_path, source):
    """A folder whose last kernel but one is no weight, so that others are under way when it is met."""
    config = fields(quantization_config=None) if source == "weights" else fields()
    made = tensors(config)
    if source == "weights":
        made[checkpoint_name(f"{GATE}/kernel")][7, 50] = np.inf
    else:
        made[checkpoint_name(f"{GATE}/scale_inv")][1, 1] = np.nan
    return write(tmp_path / "source", config, made)


@pytest.mark.parametrize("there", [False, True], ids=["new", "old"])
@pytest.mark.parametrize(
    ("source", "policy"), [("weights", "fp8_weight_only"), ("scales", None), ("scales", "bf16"), ("scales", BLOCK64)]
)
def test_damaged_weights_leave_nothing(model, tmp_path, source, policy, there):
    source = damaged(tmp_path, source)
    target = tmp_path / "above" / "saved"
    if there:
        save_model(model, target)
    before = everything(tmp_path)
    with pytest.raises(InvalidScale, match=GATE):
        convert_checkpoint(source, target, policy)
    assert everything(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["above", "source"][not there :]
    assert not there or os.listdir(tmp_path / "above") == ["saved"]


def test_weights_that_became_infinite_are_refused(bf16, tmp_path):
    model = load_model(bf16)
    kernel = model.layers[1].mlp.gate_proj.kernel
    kernel.set_value(kernel[...].at[3, 3].set(jnp.inf))
    with pytest.raises(InvalidScale, match=rf"{GATE}/kernel: the weights of a block hold NaN or infinity"):
        save_model(model, tmp_path / "saved", "fp8_weight_only")
    assert not list(tmp_path.iterdir())
    save_model(model, tmp_path / "saved")  # plain weights may be anything
    assert np.isinf(checkpoints.read(tmp_path / "saved")[checkpoint_name(f"{GATE}/kernel")][3, 3])


def test_a_source_that_is_cut_short_meanwhile_is_refused(tmp_path, monkeypatch):
    source = write(tmp_path / "source", fields(), tensors(fields()))
    checkpoint = open_checkpoint(source)
    monkeypatch.setattr("perparam.loaders.save.open_checkpoint", lambda _: checkpoint)
    with open(source / "model.safetensors", "r+b") as file:
        file.truncate(50_000)
    with pytest.raises(InvalidCheckpoint, match=re.escape(str(source))):
        convert_checkpoint(source, tmp_path / "saved")
    assert os.listdir(tmp_path) == ["source"]


# Several devices.

OVER_DEVICES = """
import pathlib, sys
import checkpoints, jax, numpy as np
import perparam
from perparam.loaders import slabs

slabs.COPY_BYTES, slabs.CONVERT_ELEMENTS = 2048, 4096  # several slabs, cut otherwise than the devices' slices
folder = pathlib.Path(sys.argv[1])
config = checkpoints.fields(
    hidden_size=64, intermediate_size=96, num_attention_heads=8, num_key_value_heads=8, head_dim=16, vocab_size=64,
    quantization_config={"quant_method": "fp8", "weight_block_size": [4, 16]},
)
checkpoints.write(folder / "source", config, checkpoints.tensors(config))
axes = (jax.sharding.AxisType.Auto,)
requantised = perparam.Policy({"lm_head/kernel": None, "kernel": "f8_e4m3fn"}, block=(24, 24))
whole = perparam.load_model(folder / "source")
model = perparam.load_model(folder / "source", sharding=jax.make_mesh((8,), ("x",), axis_types=axes))
assert len(model.layers[0].mlp.up_proj.kernel[...].devices()) == 8
for name, policy in {"kept": None, "requantised": requantised}.items():
    perparam.save_model(whole, folder / f"{name} whole", policy, max_shard_size="20KB")
    perparam.save_model(model, folder / f"{name} cut", policy, max_shard_size="20KB")
"""


def test_a_model_over_several_devices_is_saved_as_one_on_one_device(tmp_path):
    python(OVER_DEVICES, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert_same_tensors(checkpoints.read(tmp_path / "kept cut"), checkpoints.read(tmp_path / "source"))
    for name in ("kept", "requantised"):
        assert everything(tmp_path / f"{name} cut") == everything(tmp_path / f"{name} whole")


def test_saving_shows_its_progress_where_it_is_asked_to(model, tmp_path, capsys):
    save_model(model, tmp_path / "silent")
    assert capsys.readouterr().err == ""
    save_model(model, tmp_path / "told", progress=True)
    assert "saving told: 100%" in capsys.readouterr().err
