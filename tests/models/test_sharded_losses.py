"""`next_token_loss` over several devices: the loss and gradients of one device, without a whole head on any."""

import json

import pytest
from devices import run_on_devices

LOSS_ERROR = 2e-6
"""Of models in float32, whose sums of up to 768 products, over two layers, are in another order."""

BFLOAT16_ERROR = 2.0**-8
"""Of gradients of the bfloat16 embedding and head, each partial sum of which is rounded once on every device."""

FLOAT32_ERROR = 1e-4
"""Of float32 gradients, whose sums are in another order forward and back."""

NAMES = (
    "both", "tensor parallel", "FSDP", "narrow, both", "narrow, tensor parallel", "LoRA, both",
    "a batch that is not divided",
)  # fmt: skip


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "checkpoint"
    text = run_on_devices(8, "models/sharded_losses.py", folder, *NAMES, timeout=900)
    return {line["name"]: line for line in map(json.loads, text.splitlines())}


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_one_device_and_no_head_is_gathered(lines, name):
    line = lines[name]
    assert "raised" not in line, line["raised"]
    assert line["loss"] <= LOSS_ERROR
    narrow = name.startswith(("narrow", "LoRA"))
    assert line["gradient"] <= (FLOAT32_ERROR if narrow else BFLOAT16_ERROR)
    assert line["divided"] == (name != "a batch that is not divided")
    if line["divided"]:
        assert line["placed"]
        assert line["gathers"] == []
        assert (line["slices"] > 0) == ("tensor parallel" not in name)
