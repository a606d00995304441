"""The compiled programs of generation: narrow kernels stay narrow in them, the cache is updated in place, and a long
prompt takes no memory of its square."""

import dataclasses
import functools
import math
import re

import checkpoints
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import perparam
from perparam import Policy
from perparam.models import Linear, Qwen3, Qwen3Config, attention, cpu_attention
from perparam.models.generation import programs
from perparam.models.generation.keys import row_keys
from perparam.models.generation.sampling import GREEDY, Sampling
from perparam.policies import dequantize

pytestmark = pytest.mark.optimised

CONFIG = Qwen3Config(
    vocab_size=320, hidden_size=512, intermediate_size=768, num_hidden_layers=1, num_attention_heads=10,
    num_key_value_heads=5, head_dim=64, pad_token_id=0,
)  # fmt: skip
NARROW = Policy({"lm_head/kernel": "bf16", "kernel": "f8_e4m3fn", "default": "bf16"}, "bf16")
KERNELS = {(640, 512), (320, 512), (512, 640), (768, 512), (512, 768)} - {(CONFIG.vocab_size, CONFIG.hidden_size)}
BATCH, LENGTH, NEW = 2, 5, 8


def program(policy, linear=Linear) -> str:
    """The optimised HLO of decoding under `policy`; nothing is allocated."""
    return compiled(abstract(CONFIG, policy, linear), BATCH, LENGTH, NEW).as_text()


def abstract(config, policy, linear=Linear):
    """A model of shapes."""
    return nnx.eval_shape(lambda: Qwen3(config, policy=policy, linear=linear, rngs=nnx.Rngs(0)))


def read(model, batch, length, slots):
    """The program that reads prompts."""
    graphdef, state = nnx.split(model)
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    mask = jax.ShapeDtypeStruct(ids.shape, jnp.bool_)
    return programs.prefill.lower(graphdef, state, ids, mask, slots)


def compiled(model, batch, length, new, sampling=GREEDY):
    """The program that decodes."""
    graphdef, state = nnx.split(model)
    kind, numbers = sampling.kind, sampling.numbers(model.config.vocab_size)
    prefix = read(model, batch, length, length + new).out_info
    begin = functools.partial(programs.begin, kind, None)
    eos, keys = jnp.zeros(1, jnp.int32), row_keys(0, batch)
    begun = jax.eval_shape(begin, numbers, prefix.cache, prefix.tokens, prefix.logits, keys, eos)
    return programs.decode.lower(graphdef, kind, None, state, begun, numbers, eos, 0, new).compile()


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


@pytest.mark.slow
def test_no_wide_copy_of_a_narrow_kernel_lasts(narrow):
    assert " while(" in narrow
    assert re.search(r"f8e4m3fn\[768,512\]\S* parameter\(", narrow)
    assert wide_copies(narrow) == set()


@pytest.mark.slow
def test_no_wide_copy_lasts_where_activations_are_narrow_too():
    assert wide_copies(program("fp8_dynamic")) == set()


@pytest.mark.slow
def test_no_wide_copy_leaves_the_reading_of_prompts():
    text = read(abstract(CONFIG, NARROW), BATCH, 16, 24).compile().as_text()
    assert re.search(r"f8e4m3fn\[768,512\]\S* parameter\(", text)
    assert wide_copies(text) == set()


def test_the_check_notices_wide_kernels():
    assert wide_copies(program("bf16")) == {f"bf16[{rows},{columns}]" for rows, columns in KERNELS}


class Hoisted(Linear):
    """A projection that widens its kernel without tying it to its use."""

    def __call__(self, x):
        kernel = self.kernel[...]
        if self.scale_inv is not None:
            kernel = dequantize(kernel, self.scale_inv[...], self.kernel.block, jnp.bfloat16)
        return jnp.einsum("...i,oi->...o", x, kernel)


@pytest.mark.slow
def test_the_check_notices_kernels_that_are_widened_before_the_loop():
    assert wide_copies(program(NARROW, Hoisted))


FEW = ({"num_hidden_layers": 1}, {})


class TestAModelOfThePublishedSize:
    """Qwen3-0.6B's shape, compiled for a CPU: what it takes beside weights and cache, which a device must have free."""

    config = Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    policy = Policy({"kernel": "f8_e4m3fn", "default": "bf16"}, "bf16")

    def model(self, **changes):
        return abstract(dataclasses.replace(self.config, **changes), self.policy)

    # Small models show nearly the same of it, and so does the narrow cache at this size.
    @pytest.mark.thorough
    def test_decoding(self):
        assert temporary(compiled(self.model(), 1, 16, 8)) <= 16

    @pytest.mark.thorough
    @pytest.mark.parametrize("kv_cache", ["f8_e4m3fn", "int8"])
    def test_decoding_with_a_narrow_cache(self, kv_cache):
        """4096 slots: what is widened is widened where it is used, a layer's keys at most at a time."""
        policy = Policy({"kernel": "f8_e4m3fn", "default": "bf16"}, "bf16", kv_cache=kv_cache)
        wide = 2 * 4 * 8 * 128 * 4096 / 2**20  # keys and values of a layer in float32, as XLA's dot on a CPU takes them
        assert temporary(compiled(abstract(self.config, policy), 1, 16, 4080)) <= 16 + wide

    @pytest.mark.thorough  # as a long one shows nearly the same
    def test_prefill(self):
        assert temporary(read(self.model(), 1, 512, 768).compile()) <= 64

    @pytest.mark.thorough
    def test_a_long_prefill(self):
        """What one layer needs, with the scores of a chunk and their softmax, however many layers there are."""
        one, all_layers = (temporary(read(self.model(**few), 1, 8192, 8192 + 256).compile()) for few in FEW)
        assert one <= 16 * 64 + 4 * attention.SCORES / 2**20
        assert all_layers <= 1.05 * one


def temporary(program):
    """MiB of temporary memory."""
    return program.memory_analysis().temp_size_in_bytes / 2**20


@pytest.mark.slow
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("window", [None, 512])
def test_a_long_prompt_takes_no_memory_of_its_square(monkeypatch, window, native):
    if not native:
        monkeypatch.setattr(cpu_attention, "refuses", lambda *_: "for another device")
    tokens, heads = 4096, CONFIG.num_attention_heads
    config = dataclasses.replace(CONFIG, windows=(window,))
    program = read(abstract(config, NARROW), 1, tokens, tokens + 256).compile()
    square = heads * tokens * tokens * 4
    assert square > 8 * attention.SCORES
    assert program.memory_analysis().temp_size_in_bytes < square / 2
    assert not any(elements >= square / 4 for elements in sizes(program.as_text()))


def sizes(text):
    """Elements of all arrays in a program."""
    shapes = set(re.findall(r"\b(?:f32|bf16|f16|s32|pred)\[([\d,]+)\]", text))
    return {math.prod(map(int, shape.split(","))) for shape in shapes}


def test_the_check_notices_the_square(monkeypatch):
    monkeypatch.setattr(attention, "SCORES", 2**40)
    monkeypatch.setattr(cpu_attention, "refuses", lambda *_: "for another device")
    text = read(abstract(CONFIG, NARROW), 1, 1024, 1024).as_text()
    assert max(shape_sizes(text)) >= CONFIG.num_attention_heads * 1024 * 1024


def shape_sizes(text):
    """Elements of all arrays in a program as it is before XLA."""
    return [math.prod(map(int, shape.split("x")[:-1])) for shape in re.findall(r"tensor<((?:\d+x)+f32)>", text)]


def test_the_cache_is_updated_in_place(narrow):
    header = narrow[: narrow.index("\n")]
    aliased = re.search(r"input_output_alias=\{(.*?)\}, entry", header).group(1).count("alias)")
    # Keys and values of a layer, positions and the counters.
    # And beside the cache the last token, all tokens, what is done, lengths, the count and keys.
    assert aliased == 2 * CONFIG.num_hidden_layers + 3 + 6


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache", ["f8_e4m3fn", "int8"])
def test_a_narrow_cache_and_its_scales_are_updated_in_place(kv_cache):
    text = program(Policy(NARROW.params, NARROW.compute, kv_cache=kv_cache))
    aliased = re.search(r"input_output_alias=\{(.*?)\}, entry", text[: text.index("\n")]).group(1).count("alias)")
    assert aliased == 4 * CONFIG.num_hidden_layers + 3 + 6


@pytest.mark.parametrize(
    ("kv_cache", "name"),
    [
        ("f8_e4m3fn", "u8"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("int8", "s8"), ("bf16", "bf16"))),
    ],
)
def test_a_step_converts_no_whole_cache(kv_cache, name):
    """One token is written: nothing of the cache's size is converted to its dtype again, or copied."""
    text = program(Policy(NARROW.params, NARROW.compute, kv_cache=kv_cache))
    slots, heads, width = LENGTH + NEW, CONFIG.num_key_value_heads, CONFIG.head_dim
    shapes = rf"\[{BATCH},{heads},(?:{width},{slots}|{slots},{width})\]"
    assert re.search(rf"{name}{shapes}", text)
    assert re.findall(rf"= ({name}{shapes})\S* (convert|copy)\(", text) == []


@pytest.mark.slow
def test_drawing_needs_no_sort_of_the_vocabulary_unless_asked():
    model = abstract(CONFIG, NARROW)
    assert " sort(" not in compiled(model, BATCH, LENGTH, NEW, Sampling(min_p=0.1)).as_text()
    assert " sort(" in compiled(model, BATCH, LENGTH, NEW, Sampling(top_p=0.9)).as_text()


@pytest.mark.slow
def test_a_donated_cache_leaves_no_warning_and_is_gone(tmp_path):
    config = checkpoints.fields(num_hidden_layers=1)
    model = perparam.load_model(checkpoints.write(tmp_path, config, checkpoints.tensors(config)), "f32")
    graphdef, params = nnx.split(model)
    kind, numbers, eos = GREEDY.kind, GREEDY.numbers(model.config.vocab_size), jnp.zeros(0, jnp.int32)
    prefix = perparam.generation.prefill(model, [[1, 2]])
    state = programs.begin(
        kind, None, numbers, prefix.cache, prefix.tokens, prefix.logits, row_keys(0, 1), eos
    )  # fmt: skip
    assert all(array.is_deleted() for array in (*prefix.cache.keys, *prefix.cache.values))
    after = programs.decode(graphdef, kind, None, params, state, numbers, eos, 0, 2)
    assert all(array.is_deleted() for array in (*state.cache.keys, *state.cache.values))
    kept = (*after.cache.keys, *after.cache.values, *checkpoints.arrays(model).values())
    assert not any(array.is_deleted() for array in kept)
