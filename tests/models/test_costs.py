"""The costs of a step on each device of a mesh: collectives, bytes and operations, counted by hand."""

import dataclasses
import itertools
import json
import math

import jax
import numpy as np
import pytest
from published import CONFIGS, PARAMETERS

from perparam.loaders import open_config
from perparam.models import expert_parallel, fsdp, fsdp_tensor_parallel, tensor_parallel
from perparam.models.sharding.costs import Collective, step_costs, touched
from perparam.models.sharding.devices import DEVICES
from perparam.models.sharding.roofline import Estimate, human_seconds
from perparam.policies import get_policy
from perparam.policies.paths import is_scale
from perparam.policies.resolved import resolve

DENSE, MIXTURE = "Qwen3-8B-FP8", "Qwen3-30B-A3B-FP8"
LAYERS, HIDDEN = 36, 4096
SPARSE_LAYERS, SPARSE_HIDDEN, EXPERTS, PER_TOKEN = 48, 2048, 128, 8


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")

    def opened(name):
        (folder / f"{name}.json").write_text(json.dumps(CONFIGS[name]))
        return open_config(folder / f"{name}.json")

    return {name: opened(name) for name in (DENSE, MIXTURE)}


def mesh(**axes):
    return jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes))


def costs(model, layout, policy=None, **step):
    return step_costs(model.config, layout, resolve(get_policy(policy), model.tree), **step)


@pytest.mark.parametrize(("kind", "factor"), [("all-reduce", 2), ("all-gather", 1), ("all-to-all", 1)])
def test_in_a_ring_a_device_sends_all_parts_but_its_own(kind, factor):
    assert Collective(kind, 4, 1000).sent == factor * 750
    assert Collective(kind, 1, 1000).sent == 0


def test_tensor_parallel_has_two_all_reduces_a_layer_and_one_for_embeddings(models):
    found = costs(models[DENSE], tensor_parallel(mesh(data=2, model=8)), rows=6, new=1, past=100)
    sizes = [each.bytes for each in found.collectives]
    assert {(each.kind, each.devices) for each in found.collectives} == {("all-reduce", 8)}
    # Three rows on each device: embeddings in bfloat16, partial sums in float32.
    assert sorted(sizes) == [3 * HIDDEN * 2, *[3 * HIDDEN * 4] * (2 * LAYERS)]
    assert found.by_kind() == {"all-reduce": (2 * LAYERS + 1, sum(sizes) * 2 * 7 / 8)}


def test_fsdp_gathers_the_stored_bytes_of_every_kernel(models):
    model = models[DENSE]
    found = costs(model, fsdp(mesh(data=8)), rows=8, new=1, past=100)
    gathers = [each for each in found.collectives if each.kind == "all-gather"]
    divided = [info for path, info in model.infos.items() if "_proj" in path or path == "lm_head/kernel"]
    assert {info.dtype.name for info in divided} == {"float8_e4m3fn", "bfloat16"}
    assert sum(each.bytes for each in gathers) == sum(info.bytes for info in divided)
    assert [each.kind for each in found.collectives if each.kind != "all-gather"] == ["all-to-all"]  # of embeddings
    # Each device multiplies with whole kernels, for its own row.
    assert found.gathered == 151936 * HIDDEN * 2
    assert found.wide == costs(model, tensor_parallel(mesh(model=1)), rows=1, new=1, past=100).wide


def test_scales_that_are_replicated_are_not_gathered(models):
    # Of 4096 columns each of 64 devices has 64, half a block.
    found = costs(models[DENSE], fsdp(mesh(data=64)), rows=64, new=1)
    kernels = [info for path, info in models[DENSE].infos.items() if "_proj" in path and not is_scale(path)]
    assert sum(each.kind == "all-gather" for each in found.collectives) == len(kernels) + 1  # and the head


def test_a_batch_that_does_not_divide_leaves_kernels_where_they_are(models):
    found = costs(models[DENSE], fsdp(mesh(data=8)), rows=3, new=1)
    kinds = found.by_kind()
    # Columns are summed: q, k, v, gate, up and the head. The stream is made whole after o, down and the lookup.
    assert {kind: number for kind, (number, _) in kinds.items()} == {
        "all-reduce": 5 * LAYERS + 1, "all-gather": 2 * LAYERS + 1,
    }  # fmt: skip
    assert found.gathered == 0


def test_both_reduce_and_gather(models):
    found = costs(models[DENSE], fsdp_tensor_parallel(mesh(data=2, model=4)), rows=2, new=1)
    reduces = [each for each in found.collectives if each.kind == "all-reduce"]
    gathers = [each for each in found.collectives if each.kind == "all-gather"]
    assert (len(reduces), {each.devices for each in reduces}) == (2 * LAYERS + 1, {4})
    assert {each.devices for each in gathers} == {2}
    up = models[DENSE].infos["layers/0/mlp/up_proj/kernel"]
    assert up.bytes / 4 in {each.bytes for each in gathers}  # of a device's quarter


def test_tokens_travel_to_experts_and_back(models):
    found = costs(models[MIXTURE], expert_parallel(mesh(data=2, model=8)), rows=32, new=5)
    assert {(each.kind, each.devices) for each in found.collectives} == {("all-to-all", 8)}
    # Two rows of five tokens on each device, in bfloat16.
    assert {each.bytes for each in found.collectives} == {10 * PER_TOKEN * SPARSE_HIDDEN * 2}
    assert len(found.collectives) == 2 * SPARSE_LAYERS


def test_experts_of_a_batch_that_does_not_divide_add_their_results(models):
    found = costs(models[MIXTURE], expert_parallel(mesh(model=8)), rows=3, new=1)
    assert {(each.kind, each.devices, each.bytes) for each in found.collectives} == {
        ("all-reduce", 8, 3 * SPARSE_HIDDEN * 4)
    }
    assert len(found.collectives) == SPARSE_LAYERS


@pytest.mark.parametrize("layout", [tensor_parallel, expert_parallel])
def test_the_devices_share_the_work_on_experts(models, layout):
    model, alone = models[MIXTURE], tensor_parallel(mesh(model=1))
    width = CONFIGS[MIXTURE]["moe_intermediate_size"]
    experts = 2 * 8 * PER_TOKEN * 3 * width * SPARSE_HIDDEN * SPARSE_LAYERS  # of 8 tokens
    rest = costs(model, alone, rows=8, new=1).wide - experts
    shared = costs(model, layout(mesh(model=8)), rows=8, new=1).wide
    assert rest > 0
    assert experts / 8 < shared <= experts / 8 + rest


@pytest.mark.parametrize(("experts", "per_token", "tokens"), [(4, 2, 2), (5, 1, 3), (3, 3, 1)])
def test_the_experts_that_tokens_choose_are_counted_as_all_choices_have_them(experts, per_token, tokens):
    choices = list(itertools.combinations(range(experts), per_token))
    unions = [len(set().union(*chosen)) for chosen in itertools.product(choices, repeat=tokens)]
    assert touched(experts, per_token, tokens) == pytest.approx(np.mean(unions) / experts)


def test_reading_takes_the_experts_that_are_chosen(models):
    model, alone = models[MIXTURE], tensor_parallel(mesh(model=1))
    experts = sum(info.bytes for path, info in model.infos.items() if "/experts/" in path)
    one, many = (costs(model, alone, rows=rows, new=1).read for rows in (1, 100_000))
    table = model.infos["embed_tokens/embedding"].bytes
    others = sum(info.bytes for info in model.infos.values()) - experts - table
    assert one == pytest.approx(others + experts * PER_TOKEN / EXPERTS + SPARSE_HIDDEN * 2 + kv(1))
    assert many == pytest.approx(others + experts + 100_000 * (SPARSE_HIDDEN * 2 + kv(1)))


def kv(tokens):
    """Bytes of the cache of the mixture: keys and values of 4 heads of 128 in bfloat16."""
    return tokens * SPARSE_LAYERS * 2 * 4 * 128 * 2


def test_a_token_takes_two_operations_a_parameter_and_attention(models):
    found = costs(models[DENSE], tensor_parallel(mesh(model=1)), rows=3, new=1, past=9)
    vectors = sum(math.prod(info.shape) for info in models[DENSE].infos.values() if len(info.shape) == 1)
    matrices = PARAMETERS[DENSE] - vectors - 151936 * HIDDEN  # the table of embeddings is not multiplied
    attention = 4 * 10 * HIDDEN * LAYERS  # 32 heads of 128
    assert found.wide == 3 * (2 * matrices + attention)
    assert found.fp8 == 0


def test_operations_in_fp8_are_those_that_the_policy_computes_so(models):
    found = costs(models[DENSE], tensor_parallel(mesh(model=1)), "fp8_dynamic", rows=1, new=1)
    head, attention = 2 * 151936 * HIDDEN, 4 * HIDDEN * LAYERS
    assert found.wide == head + attention
    wide = costs(models[DENSE], tensor_parallel(mesh(model=1)), rows=1, new=1).wide
    assert found.fp8 == wide - found.wide


def test_a_window_bounds_what_attention_sees(models):
    model = models[DENSE]
    windows = (None, *[4] * (LAYERS - 1))
    near = dataclasses.replace(model, config=dataclasses.replace(model.config, windows=windows))
    far, seen = (costs(each, tensor_parallel(mesh(model=1)), rows=1, new=1, past=99).wide for each in (model, near))
    assert far - seen == 4 * HIDDEN * (LAYERS - 1) * (100 - 4)


def test_a_prompt_sees_half_of_itself(models):
    alone = tensor_parallel(mesh(model=1))
    prompt = costs(models[DENSE], alone, rows=1, new=4).wide
    tokens = [costs(models[DENSE], alone, rows=1, new=1, past=past).wide for past in range(4)]
    head = 2 * 151936 * HIDDEN
    assert prompt == sum(tokens) - 3 * head  # only the last token has logits


@pytest.mark.parametrize(("model", "heads"), [(4, 4), (8, 8), (16, 8)])
def test_the_cache_is_read_by_heads_which_more_devices_share(models, model, heads):
    def read(rows):
        layout = tensor_parallel(mesh(model=model))
        past = [costs(models[DENSE], layout, rows=rows, new=1, past=past).read for past in (0, 1000)]
        return past[1] - past[0]

    assert read(2) == 2 * 1000 * LAYERS * 2 * 8 * 128 * 2 / heads


def test_the_longer_of_memory_and_compute_counts_then_sending(models):
    found = costs(models[DENSE], tensor_parallel(mesh(model=2)), rows=1, new=1)
    device = dataclasses.replace(DEVICES[0], bandwidth=found.read, bf16=found.wide / 3, links=found.sent / 2)
    assert Estimate.of(found, device) == Estimate(memory=1, compute=3, links=2)
    assert (Estimate(1, 3, 2).seconds, Estimate(1, 3, 2).bound) == (5, "compute")
    assert (Estimate(1, 0.5, 2).seconds, Estimate(1, 0.5, 2).bound) == (3, "links")
    assert Estimate(4, 0.5, 2).bound == "memory"
    eight = dataclasses.replace(found, wide=0, fp8=device.fp8)
    assert Estimate.of(eight, device).compute == 1


def test_every_device_has_a_source():
    assert len({device.name for device in DEVICES}) == len(DEVICES) == 6
    assert all(device.source.startswith("https://") for device in DEVICES)


@pytest.mark.parametrize(("seconds", "text"), [(1.5, "1.50 s"), (0.0123, "12.3 ms"), (5e-7, "0.50 µs"), (120, "120 s")])
def test_times_have_three_digits(seconds, text):
    assert human_seconds(seconds) == text
