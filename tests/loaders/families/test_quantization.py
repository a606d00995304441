"""compressed-tensors in `quantization_config`: strategies are blocks, other values are refused by name."""

import dataclasses

import pytest
from checkpoints import fields

from perparam.loaders.families import config_to_json, read_config
from perparam.models import Quantization
from perparam.policies.errors import PerparamError


def read(**changes):
    return read_config(fields(**changes))


COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
    "kv_cache_scheme": None, "ignore": ["lm_head"], "version": "0.20.0",
}  # fmt: skip
WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "channel"}


def compressed(weights=None, activations=None, **changes):
    group = {"targets": ["Linear"], "weights": WEIGHTS | (weights or {}), "input_activations": activations}
    return read(quantization_config=COMPRESSED | {"config_groups": {"group_0": group}} | changes).quantization


class TestCompressedTensors:
    def test_strategies_are_blocks(self):
        assert compressed() == Quantization((1, -1), ("lm_head",), "compressed-tensors")
        assert compressed({"strategy": "tensor"}).block == (-1, -1)
        assert compressed({"strategy": "block", "block_structure": [128, 64]}).block == (128, 64)

    def test_older_files_mean_the_same(self):
        older = {"quantization_status": "frozen", "format": "naive-quantized", "sparsity_config": {"format": "dense"}}
        assert compressed({"zp_dtype": "torch.float8_e4m3fn"}, **older) == compressed()

    @pytest.mark.parametrize("block", [(1, -1), (-1, -1), (128, 64)])
    def test_it_is_written_as_it_was_read(self, block):
        config = dataclasses.replace(read(), quantization=Quantization(block, ("lm_head",), "compressed-tensors"))
        assert read_config(config_to_json(config)) == config

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ({"weights": {"strategy": "group", "group_size": 128}}, "weights: group_size = 128 is not implemented"),
            (
                {"weights": {"strategy": "group"}},
                "weights: strategy 'group' is not implemented. Implemented: ",
            ),
            ({"weights": {"num_bits": 4}}, "weights: num_bits = 4 is not implemented"),
            ({"weights": {"type": "int"}}, "weights: type = 'int' is not implemented"),
            ({"weights": {"symmetric": False}}, "weights: symmetric = False is not implemented"),
            ({"weights": {"strategy": "block"}}, "block_structure: expected two positive integers, found None"),
            ({"activations": {"dynamic": False}}, "input_activations: dynamic = false is not implemented, since"),
            ({"format": "pack-quantized"}, "quantization_config: format = 'pack-quantized' is not implemented"),
            ({"quantization_status": "initialized"}, "quantization_status = 'initialized' is not implemented"),
            ({"activations": {"dynamic": True, "num_bits": 4}}, "input_activations: num_bits = 4 is not implemented"),
            ({"kv_cache_scheme": {"num_bits": 8}}, "quantization_config: kv_cache_scheme = .* is not implemented"),
            ({"sparsity_config": {"format": "sparse"}}, "quantization_config: sparsity_config = .* is not implemented"),
            ({"config_groups": {}}, "quantization_config: 0 config_groups are not implemented"),
            ({"ignore": [3]}, "ignore: expected names of modules"),
        ],
        ids=repr,
    )
    def test_refused(self, arguments, text):
        with pytest.raises(PerparamError, match=text):
            compressed(**arguments)
