"""The compiled generation program: narrow kernels stay narrow in it, and the cache is updated in place."""

import re

import checkpoints
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import perparam
from perparam import Policy, Qwen3, Qwen3Config
from perparam.models import Linear, generation
from perparam.policies.blocks import dequantize

CONFIG = Qwen3Config(
    vocab_size=320, hidden_size=512, intermediate_size=768, num_hidden_layers=1, num_attention_heads=10,
    num_key_value_heads=5, head_dim=64, pad_token_id=0,
)  # fmt: skip
NARROW = Policy({"lm_head/kernel": "bf16", "kernel": "f8_e4m3fn", "default": "bf16"}, "bf16")
KERNELS = {(640, 512), (320, 512), (512, 640), (768, 512), (512, 768)} - {(CONFIG.vocab_size, CONFIG.hidden_size)}
BATCH, LENGTH, NEW = 2, 5, 8


def program(policy, linear=Linear) -> str:
    """The optimised HLO of generating under `policy`; nothing is allocated."""
    model = nnx.eval_shape(lambda: Qwen3(CONFIG, policy=policy, linear=linear, rngs=nnx.Rngs(0)))
    return compiled(model, BATCH, LENGTH, NEW).as_text()


def compiled(model, batch, length, new):
    graphdef, state = nnx.split(model)
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    mask, eos = jax.ShapeDtypeStruct(ids.shape, jnp.bool_), jax.ShapeDtypeStruct((1,), jnp.int32)
    cache = jax.eval_shape(lambda: model.empty_cache(batch, length + new))
    return generation._generate.lower(graphdef, state, ids, mask, eos, cache, 0, new).compile()


def wide_copies(text: str) -> set[str]:
    """Arrays of a float dtype and of a kernel's shape, either way round, that are more than a passing value: loop
    carries, inputs, outputs and constants."""
    shapes = KERNELS | {shape[::-1] for shape in KERNELS}
    found = set()
    entry = text[text.index("\nENTRY ") :]
    lasting = re.findall(r"= (\(.*?\)) while\(", text)
    lasting += re.findall(r"= (\S+) constant\(", text)
    lasting += re.findall(r"= (\S+) parameter\(", entry)
    lasting += re.findall(r"ROOT \S+ = (.*?) \w+\(", entry)
    for types in lasting:
        for dtype, sides in re.findall(r"\b(f32|bf16|f16)\[([\d,]+)\]", types):
            if tuple(map(int, sides.split(","))) in shapes:
                found.add(f"{dtype}[{sides}]")
    return found


@pytest.fixture(scope="module")
def narrow():
    return program(NARROW)


def test_no_wide_copy_of_a_narrow_kernel_lasts(narrow):
    assert " while(" in narrow
    assert re.search(r"f8e4m3fn\[768,512\]\S* parameter\(", narrow)
    assert wide_copies(narrow) == set()


def test_no_wide_copy_lasts_where_activations_are_narrow_too():
    assert wide_copies(program("fp8_dynamic")) == set()


def test_the_check_notices_wide_kernels():
    assert wide_copies(program("bf16")) == {f"bf16[{rows},{columns}]" for rows, columns in KERNELS}


class Hoisted(Linear):
    """A projection that widens its kernel without tying it to its use."""

    def __call__(self, x):
        kernel = self.kernel[...]
        if self.scale_inv is not None:
            kernel = dequantize(kernel, self.scale_inv[...], self.kernel.block, jnp.bfloat16)
        return jnp.einsum("...i,oi->...o", x, kernel)


def test_the_check_notices_kernels_that_are_widened_before_the_loop():
    assert wide_copies(program(NARROW, Hoisted))


class TestAModelOfThePublishedSize:
    """Qwen3-0.6B's shape, compiled for a CPU: what it takes beside weights and cache, which a device must have free."""

    config = Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    policy = Policy({"kernel": "f8_e4m3fn", "default": "bf16"}, "bf16")

    def temporary(self, length, new):
        """MiB of temporary memory of generating `new` tokens after `length`."""
        model = nnx.eval_shape(lambda: Qwen3(self.config, policy=self.policy, rngs=nnx.Rngs(0)))
        return compiled(model, 1, length, new).memory_analysis().temp_size_in_bytes / 2**20

    @pytest.mark.slow
    def test_decoding(self):
        assert self.temporary(16, 8) <= 16

    @pytest.mark.slow
    def test_prefill(self):
        assert self.temporary(512, 1) <= 64


def test_the_cache_is_updated_in_place(narrow):
    header = narrow[: narrow.index("\n")]
    aliased = re.search(r"input_output_alias=\{(.*?)\}, entry", header).group(1).count("alias)")
    # Keys and values of a layer, positions and the counters.
    assert aliased == 2 * CONFIG.num_hidden_layers + 3


def test_a_donated_cache_leaves_no_warning_and_is_gone(tmp_path):
    config = checkpoints.fields(num_hidden_layers=1)
    model = perparam.load_model(checkpoints.write(tmp_path, config, checkpoints.tensors(config)), "f32")
    graphdef, state = nnx.split(model)
    cache, ids = model.empty_cache(1, 4), jnp.array([[1, 2]], jnp.int32)
    _, after = generation._generate(graphdef, state, ids, ids > 0, jnp.zeros(0, jnp.int32), cache, 0, 2)
    assert all(array.is_deleted() for array in (*cache.keys, *cache.values))
    assert not any(array.is_deleted() for array in (*after.keys, *after.values, *checkpoints.arrays(model).values()))
