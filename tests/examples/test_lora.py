"""The example of LoRA: its loss falls, and the merged model is about as good."""

import re

import jax
import pytest

from perparam.examples import lora


@pytest.mark.thorough
def test_the_example_trains_saves_and_merges(capsys):
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies by Python numbers
        lora.main(steps=25)
    text = capsys.readouterr().out
    first, last = map(float, re.search(r"loss ([\d.]+) to ([\d.]+)", text).groups())
    assert last < 0.8 * first
    adapters, merged = (float(each) for each in re.findall(r"held-out loss ([\d.]+)", text))
    assert adapters < 0.8 * first
    assert abs(merged - adapters) < 0.2 * (first - adapters)  # FP8 keeps the adapter but for its noise
    assert "saved: adapter_config.json adapter_model.safetensors" in text
    assert "layers merged; the largest error is" in text
