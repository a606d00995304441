"""The emulator's own test: a kernel without one of its waits, arrivals or fences is found to be faulty.

What is not found is harmless, and listed with the reason.
"""

import jax.numpy as jnp
import pytest
from deletions import ANY, EITHER, TWINS, Case, compile_kernel
from hopper_operands import columns_products, grouped_products, rows_product, wide_rows, widened_product
from matmuls import FP8

from perparam.policies.matmul import hopper_quantize

pytestmark = [pytest.mark.cuda, pytest.mark.optimised]

PARTS = "the next part of a kernel is widened in other registers of PTX, and the last wait is for all parts"

HARMLESS = {
    ("expect", "sync", "load"): "a phase ends only when all threads have arrived, with all bytes they expect",
    ("init fence", "sync", "sync"): TWINS,
    ("sync", "sync", "sync"): TWINS,
    ("sync", "sync", "expect"): TWINS,
    ("sync", "sync", "write"): TWINS,
    ("store wait", "sync", "sync"): TWINS,
    ("wgmma fence", "wgmma fence", "wgmma"): TWINS,
    ("read", "wgmma fence", "wgmma fence"): TWINS,
    ("wgmma commit", "wgmma wait", "read"): PARTS,
    ("wgmma", "wgmma commit", "wgmma wait", "read"): PARTS,
    ("wait", "wgmma fence", "read"): "another stands before the product, after the operand is in registers",
    ("write", "sync", "proxy fence"): EITHER,
    ("proxy fence", "sync", "store"): EITHER,
    ("store commit", "sync", "write"): "of a block with one tile: nobody has used the memory of results before",
    ("read", "sync", "write"): "what is written lies apart from what was read",
    ("write", "sync", "sync"): "what is written next lies apart from what was written",
    ("arrive", "store commit", ANY): "no store is in the group, or one that was committed before",
    ("store", "store commit", "end"): "in a loop: the commit of the next step contains the store",
    ("store", "store commit", "store wait"): "in a loop: the commit at the end of the step contains the store",
    ("store", "store commit", "store"): "the group of the next store contains this one",
    ("store wait", "sync", "end"): "the last instruction",
    ("load", "wait", "wait"): "the next waits are for later steps, which end after this one",
    ("wait", "wait", "wait"): "the end of a pipeline: later steps end after this one, or nothing is copied any more",
    ("cluster wait", "sync", "sync"): TWINS,
    ("read", "proxy fence", "sync"): "in a step that writes nothing: only the meeting of the threads matters",
    ("wgmma commit", "proxy fence", "sync"): "in a step that writes nothing: only the meeting of the threads matters",
}
"""Deletions that may leave a right program, and why: the second instruction between its neighbours of `KINDS`."""

HARMLESS_ALONE = {
    ("wait", "wait", "end"): "the end of a pipeline: nothing is copied any more",
    ("wait", "wait", "store wait"): "the end of a pipeline: nothing is copied any more",
    ("wait", "wait", "arrive"): "the end of a pipeline, whose other warpgroups follow: nothing is copied any more",
}
"""The same for a thread block without a partner, whose last arrivals would otherwise come after its end."""


CASES = {
    "rows": lambda: rows_product(128, 256, 640, "bfloat16", processors=1),
    "rows, clusters": lambda: rows_product(256, 256, 640, "bfloat16", processors=2),
    "columns W8A16": lambda: columns_products(64, [128 * 100], 128 * 8),
    "columns W8A16, split": lambda: columns_products(8, [128], 512, "float16"),
    "columns W8A8": lambda: columns_products(64, [128 * 100], 128 * 10, FP8),
    "widened": lambda: widened_product(136, 256, 640, result="bfloat16", processors=1),
    "widened, clusters": lambda: widened_product(136, 256, 640, result="bfloat16", processors=2),
    "groups W8A16": lambda: grouped_products((5, 0, 7), [256], 640, result="bfloat16", processors=1),
    "groups W8A8": lambda: grouped_products((5, 0, 7), [256], 640, FP8, "bfloat16", processors=1),
    "quantisation": lambda: hopper_quantize.quantize(jnp.asarray(wide_rows(64, 128, "bfloat16"))),
}


@pytest.fixture(scope="module", params=list(CASES))
def case(request, compiler) -> Case:
    kernel, arrays = compile_kernel(CASES[request.param])
    return Case(kernel, arrays, HARMLESS if "multicast" in kernel.text else HARMLESS | HARMLESS_ALONE)


def test_each_deletion_is_caught_or_harmless(case):
    case.assert_each_deletion_is_caught_or_harmless()


def test_twins_are_caught_together(case):
    case.assert_twins_are_caught_together()


def test_all_instructions_of_a_kind_are_needed(case):
    case.assert_all_of_a_kind_are_needed()
