"""`config_to_json`: a config that is written and read again is the same."""

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from checkpoints import BF16, fields

from perparam.loaders.families import config_to_json, read_config
from perparam.models import Quantization, Qwen3Config, Yarn

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
def test_a_config_written_as_json_is_read_back_equal(config):
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
def test_a_config_that_was_read_is_written_and_read_back_equal(changes):
    config = read_config(fields(**changes))
    assert read_config(config_to_json(config)) == config
