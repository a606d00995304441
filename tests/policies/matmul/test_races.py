"""Pallas' race detector, which runs with every interpreted kernel: it finds races that are planted in the kernels."""

import jax
import pytest
from hopper_operands import columns_products, rows_product, wide_rows
from interpreter import has_race, interpreted, required
from jax.experimental.pallas import mosaic_gpu as plgpu
from matmuls import FP8

from perparam.policies.matmul import hopper_quantize, warpgroup

pytestmark = required

follows_stores = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the detector of JAX 0.10 knows nothing of copies from shared memory"
)


@pytest.fixture
def launches():
    with interpreted() as launches:
        yield launches
        assert not launches, "each test asks for races"


def quantise():
    return hopper_quantize.quantize(wide_rows(64, 256, "bfloat16"))


def rows():
    return rows_product(128, 256, 640, processors=1).y


def columns():
    return columns_products(136, [128], 768, FP8, processors=1)[0].y


def columns_of_bytes():
    return columns_products(8, [128], 14 * 128, processors=1)[0].y


def plant(monkeypatch, module, name, planted):
    """Replaces a function by `planted(original)`."""
    monkeypatch.setattr(module, name, planted(getattr(module, name)))


def races(launches, run) -> bool:
    jax.block_until_ready(run())
    assert launches
    return has_race(launches)


def released_before_use(pipeline):
    """A pipeline whose slots are copied to again while they are read."""

    def planted(step, *, in_specs, **settings):
        def early(index, *refs):
            operands, barriers, carry = (refs[i : i + len(in_specs)] for i in (0, len(in_specs), 2 * len(in_specs)))
            for barrier in barriers:
                plgpu.barrier_arrive(barrier)
            return step(index, *operands, *carry)

        return pipeline(early, in_specs=in_specs, manual_consumed_barriers=True, **settings)

    return planted


def never(function):
    return lambda *_, **__: None


def only_at_the_end(wait):
    """Leaves out the waits between two stores, after which the memory of the first is written again."""
    return lambda n, wait_read_only=False: None if wait_read_only else wait(n)


def test_a_copy_that_is_not_awaited(monkeypatch, launches):
    assert not races(launches, quantise)
    plant(monkeypatch, plgpu, "barrier_wait", never)
    assert races(launches, quantise)


@pytest.mark.slow
@pytest.mark.parametrize("run", [rows, columns, columns_of_bytes], ids=lambda run: run.__name__)
def test_operands_that_are_overwritten_while_they_are_read(monkeypatch, launches, run):
    plant(monkeypatch, warpgroup, "pipeline", released_before_use)
    assert races(launches, run)


@follows_stores
@pytest.mark.slow
@pytest.mark.parametrize("run", [quantise, rows, columns], ids=lambda run: run.__name__)
def test_results_that_are_stored_without_a_fence(monkeypatch, launches, run):
    plant(monkeypatch, plgpu, "commit_smem", never)
    assert races(launches, run)


@follows_stores
@pytest.mark.slow
def test_results_that_are_overwritten_while_they_are_stored(monkeypatch, launches):
    plant(monkeypatch, plgpu, "wait_smem_to_gmem", only_at_the_end)
    assert races(launches, rows)
