"""The options of sampling; their defaults are the values in generation_config.json."""

from __future__ import annotations

import argparse
import dataclasses

from ..loaders import sampling_defaults
from ..models import CausalLM, Sampling

_SAMPLING = {
    "temperature": (float, "divide the logits by X; 0: take the most likely token"),
    "top-p": (float, "keep the most likely tokens that together have probability X; 1: all"),
    "min-p": (float, "keep tokens at least X times as likely as the most likely one; 0: all"),
    "top-k": (int, "keep the X most likely tokens; 0: all"),
    "repetition-penalty": (float, "penalty for tokens that are in the prompt or the answer; 1: none"),
}


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds `--seed` and the options of sampling."""
    group = parser.add_argument_group("sampling", "The defaults are the values in generation_config.json.")
    for option, (kind, meaning) in _SAMPLING.items():
        group.add_argument(f"--{option}", type=kind, metavar="X", help=meaning)
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of random numbers; default: 0")


def sampling(options: argparse.Namespace, model: CausalLM) -> Sampling:
    """The sampling that the checkpoint recommends, with the changes of the command line."""
    source = model.config.source
    names = [option.replace("-", "_") for option in _SAMPLING]
    changes = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    defaults = Sampling(temperature=0.0) if source is None else sampling_defaults(source.parent)
    if defaults.temperature == 0 and "temperature" not in changes and {"top_p", "min_p", "top_k"} & changes.keys():
        changes["temperature"] = 1.0  # these options have no effect on greedy decoding
    return dataclasses.replace(defaults, **changes)
