"""The kernels of a decoding step without one of their waits, arrivals or fences are found to be faulty.

What is not found is harmless, and listed with the reason.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from attention_operands import EPS, attention, rotation
from deletions import ANY, EITHER, TWINS, Case, compile_kernel
from helpers import dtype

from perparam.models.decoding import hopper_attention, hopper_combine, hopper_gate, hopper_norm, hopper_rotate

pytestmark = [pytest.mark.cuda, pytest.mark.optimised]

BF16 = dtype("bfloat16")

HALVES = "the product with the other half of the columns follows, in other registers, and its wait is for both"

ATTENTION = {
    ("init fence", "sync", "sync"): "the threads meet again before they use a barrier",
    ("sync", "sync", "write"): TWINS,
    ("write", "sync", "sync"): TWINS,
    ("store wait", "sync", "sync"): TWINS,
    ("wgmma fence", "wgmma fence", "wgmma"): TWINS,
    ("wait", "wgmma fence", "wgmma fence"): TWINS,
    ("sync", "wgmma fence", "wgmma fence"): TWINS,
    ("wgmma wait", "wgmma fence", "wgmma fence"): TWINS,
    ("write", "sync", "proxy fence"): EITHER,
    ("proxy fence", "sync", ANY): EITHER,
    ("expect", "sync", "load"): "nobody has read the memory, or only a product for which all wait; or see `REUSE`",
    ("wgmma", "wgmma commit", "wgmma wait", "wgmma fence"): HALVES,
    ("wgmma commit", "wgmma wait", "wgmma fence"): HALVES,
    ("read", "sync", "write"): "each thread writes where it alone has read",
    ("load", "sync", "write"): "nobody has used the memory of the statistics before",
    ("store wait", "sync", "read"): "the threads met after they wrote the statistics",
}

REUSE = ("read", "expect", "sync", "load", "expect", "sync", "load")
"""The threads meet before keys are copied to memory again, and once more before positions are, which they have read."""

NORM = {
    ("init", "init fence", "sync"): "the meetings of the threads order the initialisation, and no copy arrives",
    ("init fence", "sync", "sync"): TWINS,
    ("sync", "sync", "write"): TWINS,
}


def normal(*shape, of=BF16):
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape).astype(of))


def attend(heads: int, kv: int, d: int):
    """Sums of four tiles, the last of which is masked; with more than 16 heads, several warps have some."""
    q, cache, *rest, length = attention(heads=heads, kv=kv, d=d, slots=256, length=200)
    operands = q, cache.keys, cache.values, *rest, length.reshape(1)
    return hopper_attention.partial_sums(*operands, parts=1, window=None, interpret=None)


def combine(narrow: bool):
    sums, statistics = normal(1, 3, 4, 1, 128, of=np.float32), normal(1, 3, 2, 4, 1, of=np.float32)
    settings = {"rows": 8, "slots": 256, "dtype": BF16, "narrow": narrow, "interpret": None}
    return hopper_combine.combine(sums, abs(statistics), jnp.asarray([200], jnp.int32), **settings)


def norm(hidden: int):
    operands = normal(8, hidden), normal(1, 8, hidden), normal(hidden)
    return hopper_norm.add_and_norm(*operands, eps=EPS, narrow=True)


CASES = {
    "attention": (lambda: attend(20, 1, 128), ATTENTION, frozenset()),
    "norm of a row": (lambda: norm(1024), NORM, frozenset({"init fence"})),
    "norm of four rows": (lambda: norm(640), NORM, frozenset({"init fence"})),
}

APART = {
    "combination": lambda: combine(False),
    "combination, quantised": lambda: combine(True),
    "rotation": lambda: hopper_rotate.rotate_and_store(*rotation(), eps=EPS),
    "gate": lambda: hopper_gate.gate(normal(1, 8, 512), dtype=BF16, narrow=True),
}
"""Kernels without anything in shared memory: each thread writes what it computes from registers of its own warp."""


@pytest.fixture(scope="module", params=list(CASES))
def case(request, compiler) -> Case:
    run, harmless, unneeded = CASES[request.param]
    return Case(*compile_kernel(run), harmless, unneeded)


def test_each_deletion_is_caught_or_harmless(case):
    case.assert_each_deletion_is_caught_or_harmless()


def test_twins_are_caught_together(case):
    case.assert_twins_are_caught_together()


def test_all_instructions_of_a_kind_are_needed(case):
    case.assert_all_of_a_kind_are_needed()


def test_the_threads_meet_before_they_copy_to_memory_that_they_have_read(compiler):
    run, *settings = CASES["attention"]
    case = Case(*compile_kernel(run), *settings)
    (positions,) = (positions for positions, names in case.neighbours(7) if names == REUSE)
    assert case.caught(positions[2], positions[5])


@pytest.mark.parametrize("run", APART.values(), ids=list(APART))
def test_threads_that_share_nothing_need_no_order(run, compiler):
    case = Case(*compile_kernel(run), {})
    assert {name for _, name in case.ordered} <= {"init fence", "sync", "end"}
    assert not case.caught(*case.positions("init fence"), *case.positions("sync"))
