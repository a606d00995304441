"""`read_config`: both forms read alike, defaults of the reference, and no field that is silently ignored."""

import json
import math

import checkpoints
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perparam.loaders.families import read_config
from perparam.models import LinearScaling, Llama3Scaling, LlamaConfig, Quantization, Qwen3Config, Yarn
from perparam.policies.errors import InvalidCheckpoint, MissingFile, PerparamError, UnsupportedConfig

NEEDED = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16,
}  # fmt: skip
PUBLISHED_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def read(**changes) -> Qwen3Config:
    return read_config(NEEDED | changes)


def test_linear_rope():
    assert read(rope_scaling={"type": "linear", "factor": 2}).rope_scaling == LinearScaling(2.0)
    with pytest.raises(InvalidCheckpoint, match="linear rope: factor is missing"):
        read(rope_scaling={"rope_type": "linear"})


LLAMA = {key: value for key, value in NEEDED.items() if key != "model_type"} | {"model_type": "llama"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


class TestLlama:
    def test_biases_and_the_width_of_heads(self):
        config = read_config(LLAMA | {"mlp_bias": True, "pretraining_tp": 1, "rope_interleaved": False})
        assert isinstance(config, LlamaConfig)
        assert config.head_dim == 1024 // 16
        assert [config.use_bias(name) for name in ("q_proj", "o_proj", "up_proj")] == [False, False, True]

    def test_fields_of_published_files_that_change_nothing(self):
        plain = read_config(LLAMA)
        assert plain.max_position_embeddings == 2048
        unused = {
            "unsloth_fixed": True,
            "max_sequence_length": 2048,
            "transformers.js_config": {"dtype": {}},
            "top_p": 0.9,
        }
        assert read_config(LLAMA | unused | {"rope_parameters": {"partial_rotary_factor": 1.0}}) == plain

    def test_llama3_rope(self):
        config = read_config(LLAMA | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}})
        assert config.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"rope_scaling": LLAMA3}, "original_max_position_embeddings is missing"),
            (
                {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}},
                r"llama3 rope: expected low_freq_factor below high_freq_factor, found 4\.0 and 4\.0",
            ),
            ({"add_cross_attention": True}, "add_cross_attention = True is not implemented. Implemented: False"),
            ({"pretraining_tp": 2}, "pretraining_tp = 2 is not implemented. Implemented: 1"),
            ({"rope_interleaved": True}, "rope_interleaved = True is not implemented"),
            ({"sliding_window": 4096}, "fields that are not implemented: sliding_window = 4096"),
        ],
        ids=repr,
    )
    def test_refused(self, changes, text):
        with pytest.raises(PerparamError, match=text):
            read_config(LLAMA | changes)


# What is read.


@pytest.mark.parametrize("scaling", [None, PUBLISHED_YARN], ids=["plain", "yarn"])
def test_the_published_and_the_newer_form_give_equal_configs(scaling):
    published = read(torch_dtype="bfloat16", rope_theta=1000000, rope_scaling=scaling)
    rope = {"rope_type": "default"} | (scaling or {}) | {"rope_theta": 1000000.0}
    assert read(dtype="bfloat16", rope_parameters=rope) == published
    assert published.rope_theta == 1e6
    assert published.dtype == checkpoints.BF16


def test_a_published_config_is_read_field_by_field():
    assert read_config(checkpoints.FIELDS) == Qwen3Config(
        vocab_size=61,
        hidden_size=56,
        intermediate_size=76,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=18,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        rope_theta=5000.0,
        dtype=checkpoints.BF16,
        quantization=Quantization((16, 24)),
        eos_token_id=(59,),
        pad_token_id=60,
    )


def test_absent_fields_take_the_references_defaults():
    config = read()
    assert config.num_key_value_heads == 16
    assert config.head_dim == 128
    assert config.max_position_embeddings == 32768
    assert config.rms_norm_eps == 1e-6
    assert config.rope_theta == 10000.0
    assert config.rope_scaling is config.dtype is config.quantization is config.pad_token_id is None
    assert not config.attention_bias
    assert not config.tie_word_embeddings
    assert [config.window(layer) for layer in range(28)] == [None] * 28
    assert config.eos_token_id == ()


def test_null_is_absent():
    nothing = dict.fromkeys(
        ["head_dim", "num_key_value_heads", "rope_scaling", "rope_parameters", "quantization_config", "layer_types",
         "pad_token_id", "eos_token_id", "torch_dtype", "dtype", "sliding_window", "rope_theta", "never_heard_of"]
    )  # fmt: skip
    assert read(**nothing) == read()


def test_a_file_is_read_as_its_mapping(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(checkpoints.FIELDS))
    assert read_config(tmp_path / "config.json") == read_config(checkpoints.FIELDS)


def test_configs_are_values():
    assert hash(read(layer_types=None)) == hash(read())
    assert read(rope_theta=1e6) != read()


CHANGES_NOTHING = {
    "architectures": ["Qwen3ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "initializer_range": 0.02,
    "transformers_version": "4.51.0", "use_cache": True, "use_qk_norm": True, "_name_or_path": "Qwen/Qwen3-0.6B-FP8",
    "hidden_act": "silu", "rope_scaling": None, "use_sliding_window": False, "max_window_layers": 28,
}  # fmt: skip


def test_fields_that_change_nothing_are_accepted():
    assert read(**CHANGES_NOTHING) == read()


@pytest.mark.parametrize(("ids", "found"), [(7, (7,)), ([7, 8], (7, 8)), ([], ()), (None, ())], ids=str)
def test_eos_is_one_id_or_several(ids, found):
    assert read(eos_token_id=ids).eos_token_id == found


# The dtype.


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "torch.bfloat16"])
def test_a_dtype_to_run_in_is_read(name):
    short = name.removeprefix("torch.")
    assert (
        read(torch_dtype=name).dtype
        == read(dtype=name).dtype
        == checkpoints.np.dtype(checkpoints.BF16 if short == "bfloat16" else short)
    )


def test_a_narrow_dtype_leaves_it_to_the_embedding():
    assert read(torch_dtype="float8_e4m3fn").dtype is None


@pytest.mark.parametrize("name", ["float64", "int32", "float33", "fp8"])
def test_a_dtype_that_nothing_runs_in_is_refused(name):
    with pytest.raises(UnsupportedConfig, match=r"config\.json: torch_dtype"):
        read(torch_dtype=name)


# Sliding windows.

FULL, SLIDING = "full_attention", "sliding_attention"


def test_layers_from_max_window_layers_on_slide():
    config = read(num_hidden_layers=4, use_sliding_window=True, sliding_window=5, max_window_layers=3)
    assert [config.window(layer) for layer in range(4)] == [None, None, None, 5]


def test_layer_types_decide_where_they_are_given():
    kinds = [SLIDING, FULL, SLIDING]
    config = read(
        num_hidden_layers=3, use_sliding_window=True, sliding_window=5, max_window_layers=0, layer_types=kinds
    )
    assert [config.window(layer) for layer in range(3)] == [5, None, 5]


def test_a_window_counts_only_with_use_sliding_window():
    config = read(num_hidden_layers=3, use_sliding_window=False, sliding_window=5, max_window_layers=0)
    assert config == read(num_hidden_layers=3)
    assert read(num_hidden_layers=3, layer_types=[FULL] * 3) == config


def test_a_window_of_null_is_no_window_as_in_the_reference():
    config = read(num_hidden_layers=2, use_sliding_window=True, sliding_window=None, max_window_layers=0)
    assert [config.window(layer) for layer in range(2)] == [None, None]


# RoPE.


def test_yarns_attention_factor_defaults_to_a_tenth_of_the_logarithm_and_one():
    yarn = read(rope_scaling=PUBLISHED_YARN).rope_scaling
    assert yarn == Yarn(4.0, 32768, pytest.approx(0.1 * math.log(4) + 1), 32.0, 1.0, True)


def test_every_setting_of_yarn_is_read():
    settings = PUBLISHED_YARN | {"attention_factor": 1.3, "beta_fast": 2.0, "beta_slow": 0.25, "truncate": False}
    assert read(rope_scaling=settings).rope_scaling == Yarn(4.0, 32768, 1.3, 2.0, 0.25, False)


def test_the_older_spelling_of_a_rope_type_is_read():
    older = {("type" if key == "rope_type" else key): value for key, value in PUBLISHED_YARN.items()}
    assert read(rope_scaling=older) == read(rope_scaling=PUBLISHED_YARN)


def test_a_theta_among_the_rope_parameters_goes_before_the_one_outside():
    assert read(rope_theta=1.0, rope_parameters={"rope_type": "default", "rope_theta": 5e6}).rope_theta == 5e6


# Quantisation.


def quantized(**changes):
    return read(quantization_config={"quant_method": "fp8"} | changes).quantization


def test_quantization_says_block_and_exceptions():
    fp8 = {
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [64, 32],
        "modules_to_not_convert": ["lm_head"],
    }
    assert quantized(**fp8) == Quantization((64, 32), ("lm_head",))
    assert quantized() == Quantization((128, 128), ())


# What is refused: by name, with the file, and with what is known.

UNSUPPORTED = {
    "model_type": ({"model_type": "qwen2_moe"}, "model_type 'qwen2_moe' is not supported"),
    "no model_type": (
        {"model_type": None},
        "model_type None is not supported. Supported: .*Qwen3MoeForCausalLM, and …M",
    ),
    "another family": (
        {"model_type": "gemma", "architectures": ["GemmaForCausalLM"]},
        r"GemmaForCausalLM \(model_type 'gemma'\) is not supported",
    ),
    "an architecture of another name": (
        {"architectures": ["MyQwen3ForCausalLM"]},
        r'MyQwen3ForCausalLM .* is not supp.* Set architectures to \["Qwen3ForCausalLM"\] if it is one\.',
    ),
    "an architecture": ({"architectures": ["Qwen3ForQuestionAnswering"]}, "Qwen3ForQuestionAnswering .* is not supp"),
    "an unknown field": ({"logit_scale": 2.0}, "fields that are not implemented: logit_scale = 2.0"),
    "two unknown fields": ({"b": 1, "a": 0}, r"not implemented: a = 0, b = 1\. Remove them if they change nothing"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not implemented. Implemented: 'silu'"),
    "no q and k norm": ({"use_qk_norm": False}, "use_qk_norm = False is not implemented"),
    "rope type": (
        {"rope_scaling": {"rope_type": "longrope"}},
        "rope type 'longrope' is not implemented. Implemented: 'default'",
    ),
    "older rope type": (
        {"rope_scaling": {"type": "longrope", "factor": 2.0}},
        "rope type 'longrope' is not implemented",
    ),
    "newer rope type": ({"rope_parameters": {"rope_type": "dynamic"}}, "rope type 'dynamic' is not implemented"),
    "rope setting": ({"rope_scaling": PUBLISHED_YARN | {"warp": 1}}, "rope settings that are not implemented: warp"),
    "yarn without its type": ({"rope_scaling": {"factor": 4.0}}, "rope settings that are not implemented: factor"),
    "rope a layer type": ({"rope_parameters": {FULL: {"rope_theta": 1.0}}}, f"not implemented: {FULL}"),
    "layer type": ({"layer_types": ["chunked"] * 28}, "layer_types: 'chunked' is not implemented"),
    "quant_method": ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq' is not implemented"),
    "no quant_method": ({"quantization_config": {}}, "quant_method None is not implemented. Implemented: 'fp8'"),
}
for field, value in {"activation_scheme": "static", "fmt": "e5m2", "scale_fmt": "ue8m0", "weights": [1]}.items():
    UNSUPPORTED[field] = (
        {"quantization_config": {"quant_method": "fp8", field: value}},
        rf"quantization_config: {field} = .* is not implemented",
    )


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, what):
    changes, match = UNSUPPORTED[what]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(NEEDED | changes))
    with pytest.raises(UnsupportedConfig, match=match) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert isinstance(caught.value, ValueError)


CLASSES = {"architectures": ["Qwen3ForSequenceClassification"]}
WRONG = {
    "two classes of one id": ({**CLASSES, "label2id": {"a": 0, "b": 0}}, "label2id: expected one name for each id"),
    "a size that is missing": ({"hidden_size": None}, "hidden_size is missing"),
    "a size that is text": ({"hidden_size": "1024"}, "hidden_size: expected int, found '1024'"),
    "a size that is a fraction": ({"vocab_size": 10.5}, "vocab_size: expected int, found 10.5"),
    "a size that is a boolean": ({"num_hidden_layers": True}, "num_hidden_layers: expected int, found True"),
    "a size that is zero": ({"num_attention_heads": 0}, r"num_attention_heads: expected a positive integer.*, found 0"),
    "a size that is negative": ({"head_dim": -2}, r"head_dim: expected a positive integer.*, found -2"),
    "an odd head": ({"head_dim": 9}, "head_dim 9 is odd"),
    "heads that do not divide": (
        {"num_key_value_heads": 3},
        "16 attention heads do not divide among 3 key-value heads",
    ),
    "an epsilon that is text": ({"rms_norm_eps": "1e-6"}, "rms_norm_eps: expected float, found '1e-6'"),
    "an epsilon that is nothing": ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    "a theta that is zero": ({"rope_theta": 0}, "rope_theta: expected a positive number, found 0"),
    "a theta that is nothing": ({"rope_theta": float("nan")}, r"rope_theta: expected a .* number, found nan"),
    "a theta beyond all floats": ({"rope_theta": 10**400}, "rope_theta"),
    "a flag that is a number": ({"tie_word_embeddings": 1}, "tie_word_embeddings: expected bool, found 1"),
    "a flag that is text": ({"attention_bias": "false"}, "attention_bias: expected bool, found 'false'"),
    "rope settings that are text": ({"rope_scaling": "yarn"}, "rope_scaling: expected dict, found 'yarn'"),
    "a yarn that does not stretch": ({"rope_scaling": PUBLISHED_YARN | {"factor": 0.5}}, r"yarn rope: .*factor.* 0\.5"),
    "a yarn of no length": (
        {"rope_scaling": PUBLISHED_YARN | {"original_max_position_embeddings": 0}},
        r"original_max_position_embeddings: expected a positive integer.*, found 0",
    ),
    "a list of layers too short": ({"layer_types": [FULL]}, "layer_types names 1 layers, num_hidden_layers is 28"),
    "sliding layers without use_sliding_window": (
        {"layer_types": [SLIDING] * 28},
        "layer_types has sliding layers, but",
    ),
    "a window of nothing": ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window: expected a positive"),
    "a dtype that is a number": ({"torch_dtype": 16}, "torch_dtype: expected str, found 16"),
    "ids that are text": ({"eos_token_id": "</s>"}, "eos_token_id: expected token ids, found '</s>'"),
    "a list of ids with text": ({"eos_token_id": [1, "2"]}, "eos_token_id: expected token ids"),
    "an id that is negative": ({"eos_token_id": [1, -1]}, "eos_token_id: expected token ids"),
    "more layers than any model": ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected at most"),
    "a size beyond all integers": ({"vocab_size": 10**30}, "vocab_size: expected a positive integer"),
    "an epsilon that is negative": ({"rms_norm_eps": -1e-6}, "rms_norm_eps: expected a positive number, found -1e-06"),
    "a pad that is text": ({"pad_token_id": "0"}, "pad_token_id: expected token ids, found '0'"),
    "architectures that are text": ({"architectures": "Qwen3ForCausalLM"}, "architectures: expected list, found 'Qw"),
    "a label without a name": (CLASSES | {"id2label": {"0": "a", "2": "b"}}, "id2label: expected a name .* 0 to 1"),
    "a label that is a list": (CLASSES | {"id2label": {"0": []}}, r"id2label: expected a name .*, found {'0': \[\]}"),
    "no label": (CLASSES | {"id2label": {}}, "id2label: expected a name for each of the ids 0 to 0"),
    "labels that contradict": (CLASSES | {"id2label": {"0": "a"}, "num_labels": 2}, "id2label: expected a name"),
    "more labels than any model": (CLASSES | {"num_labels": 10**9}, "num_labels: expected at most 100000"),
    "quantisation that is text": ({"quantization_config": "fp8"}, "quantization_config: expected dict, found 'fp8'"),
}
for field, value in {"weight_block_size": [128], "modules_to_not_convert": [1]}.items():
    WRONG[field] = ({"quantization_config": {"quant_method": "fp8", field: value}}, rf"{field}: expected .*, found \[")
for value in ([128, 0], [128, "128"], [128, True], 128, [128.0, 128.0]):
    WRONG[f"block {value}"] = ({"quantization_config": {"quant_method": "fp8", "weight_block_size": value}}, "found")


@pytest.mark.parametrize("what", WRONG)
def test_a_field_of_the_wrong_kind_is_refused(tmp_path, what):
    changes, match = WRONG[what]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(NEEDED | changes))
    with pytest.raises(InvalidCheckpoint, match=match) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe{}", b"[" * 100_000], ids=["empty", "cut", "no UTF-8", "deep"]
)
def test_what_is_no_json_is_refused(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InvalidCheckpoint, match=r"config\.json: not valid JSON: .* Download the file again"):
        read_config(path)


def test_json_that_is_no_object_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("[1]")
    with pytest.raises(InvalidCheckpoint, match="expected a JSON object, found list"):
        read_config(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(MissingFile, match=r"config\.json: there is no such file"):
        read_config(tmp_path / "config.json")


_keys = sorted(set(checkpoints.FIELDS) | {"rope_parameters", "layer_types", "dtype", "use_qk_norm", "other"})
_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 300), st.just(10**400), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["rope_type", "factor", "rope_theta", "quant_method", "fmt", "weight_block_size", "x"]),
            st.one_of(st.sampled_from(["yarn", "fp8"]), inner),
            max_size=4,
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=400)  # it compiles nothing: a millisecond each
@given(key=st.sampled_from(_keys), value=_values)
def test_whatever_stands_in_a_field_the_error_is_ours(key, value):
    try:
        config = read_config({**checkpoints.FIELDS, key: value})
    except PerparamError as error:
        assert str(error).startswith("config.json: ")  # noqa: PT017
    else:
        assert isinstance(config, Qwen3Config)
        assert np.isfinite(config.rope_theta)
        hash(config)
