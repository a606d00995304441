"""Hostile policies: each would take minutes or the whole memory if it were expanded, and is refused in a second."""

import time

import numpy as np
import pytest

from perparam import Policy
from perparam.policies import InvalidPolicy, UnknownDtype

SECONDS = 1
"""Of the processor."""

LAUGHS = "\n".join(
    [
        'a0: &a0 ["lol", "lol"]',
        *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 40)),
        "params: *a39",
    ]
)
HOSTILE = {
    "billion laughs": LAUGHS,
    "billion laughs as rules": "params: &a {a: f32}\n" + LAUGHS.replace("params", "compute"),
    "a list deep in lists": "params: " + "[" * 100_000,
    "a map deep in maps": "{a: " * 100_000,
    "a sequence deep in sequences": "- " * 100_000,
    "a map that holds itself": "params: &self\n  kernel: *self\n",
    "the root as its own slot": "&self\nparams: *self\n",
    "too long": "#" * (2 << 20),
    "braces without end": 'params: {"' + "{a,b}" * 1_000 + '": f32}',
    "billion laughs as a block": "block: [&a0 [x,x,x,x,x,x,x,x,x,x], "
    + ", ".join(f"&a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9))
    + "]",
    "a deep list": "block: [" + "[" * 300 + "]" * 300 + ", 4]",
    "a version that is no number": "%YAML 1." + "9" * 5000 + "\n---\n{}",
    "no such character": 'a: "\\U00110000"',
    "a character beyond all": 'a: "\\UFFFFFFFF"',
    "an open map and spaces": "{" + " " * 50_000,
    "a long list": "[" + "x," * 30_000 + "]",
    "a million characters": "x" * 1_000_000,
    "more patterns than a policy needs": "params:\n" + "".join(f'  "**/*{i}*/*": f32\n' for i in range(300)),
    "python": "params: !!python/object/apply:os.system ['echo hello']",
    "deep where the scanner looks ahead": "params:\n  ? " + "{" * 50_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_cost_much_is_refused_at_once(name):
    for _ in range(3):  # Python's collector may come by, and has much to look at after other tests
        start = time.process_time()
        with pytest.raises((InvalidPolicy, UnknownDtype)) as caught:
            Policy.loads(HOSTILE[name])
        if (took := time.process_time() - start) < SECONDS:
            break
    assert took < SECONDS
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("params:\n  a: " + "[" * 20 + "]" * 20, "p.yaml:2: nested more than 16 deep. A policy is a short map"),
        ("params:\n  a: [" + "x," * 9000 + "]", "p.yaml:2: more than 8192 keys and values. A policy is a short map"),
    ],
)
def test_more_nodes_and_deeper_ones_than_a_policy_needs_are_named(text, message):
    with pytest.raises(InvalidPolicy, match=message):
        Policy.loads(text, "p.yaml")


def test_rules_that_name_paths_in_full_may_be_many():
    paths = [f"layers/{i}/mlp/up_proj/kernel" for i in range(1000)]
    policy = Policy.loads("params:\n" + "".join(f"  {path}: bf16\n" for path in paths))
    tree = {path: np.zeros((2, 2), np.float32) for path in paths}
    start = time.process_time()
    assert policy.explain(tree).total_bytes == 8000
    assert time.process_time() - start < 1
