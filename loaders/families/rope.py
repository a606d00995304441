"""The rope settings of a config.json: `rope_theta` with `rope_scaling`, or `rope_parameters` in newer files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ...models.rope import LinearScaling, Llama3Scaling, RopeScaling, Yarn
from ...policies.errors import UnsupportedExport, named, shown
from ..fields import Fields

LARGEST = 1e12
"""The largest base and factor; published bases are up to 1e7, and every result stays within float32."""

_COMMON = frozenset({"rope_type", "type", "rope_theta"})


def read_rope(config: Fields, longest: int) -> tuple[float, RopeScaling | None]:
    """The base of the rotary embeddings, and their scaling rule.

    longest  the model's `max_position_embeddings`

    Raises:
      UnsupportedConfig: a rope type or setting that is not implemented.
      InvalidCheckpoint: a number out of range.
    """
    values = {**config.within("rope_parameters").values, **config.within("rope_scaling").values}
    settings = Fields(config.name, values)
    # Where transformers wrote both, it reads the inner one.
    theta = settings.positive("rope_theta", config.positive("rope_theta", 10000.0))
    if theta > LARGEST:
        raise config.invalid(f"rope_theta: expected at most {LARGEST:g}, found {theta}.")
    kind = settings.get("rope_type", str, settings.get("type", str, "default"))
    if kind not in _TYPES:
        listed = ", ".join(map(repr, _TYPES))
        raise config.unsupported(f"rope type {shown(kind)} is not implemented. Implemented: {listed}.")
    known, read = _TYPES[kind]
    accepted = _COMMON | known | ({"partial_rotary_factor"} if values.get("partial_rotary_factor") == 1 else set())
    if unknown := sorted(key for key, value in values.items() if key not in accepted and value is not None):
        raise config.unsupported(f"rope settings that are not implemented: {', '.join(map(named, unknown))}.")
    return theta, read(settings, longest, theta)


def rope_to_json(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The `rope_scaling` field of a scaling rule; None for unscaled embeddings.

    Raises:
      UnsupportedExport: a scaling rule that is not implemented here.
    """
    if scaling is None:
        return None
    if type(scaling) not in _WRITERS:
        raise UnsupportedExport(f"{type(scaling).__name__}: config.json has no settings for this scaling of RoPE.")
    return _WRITERS[type(scaling)](scaling)


def _factor(settings: Fields, kind: str, default: float | None = None) -> float:
    if default is None and settings.get("factor", float) is None:
        raise settings.invalid(f"{kind} rope: factor is missing.")
    factor = settings.positive("factor", default or 1.0)
    if not 1 <= factor <= LARGEST:
        raise settings.invalid(f"{kind} rope: expected a factor from 1 to {LARGEST:g}, found {factor}.")
    return factor


def _no_scaling(settings: Fields, longest: int, theta: float) -> None:
    return None


def _yarn(settings: Fields, longest: int, theta: float) -> Yarn:
    original = settings.size("original_max_position_embeddings", longest)
    factor = _factor(settings, "yarn", longest / original)
    if theta <= 1:
        raise settings.invalid(f"yarn rope: expected a rope_theta above 1, found {theta}.")
    mscale, mscale_all = settings.get("mscale", float, 0.0), settings.get("mscale_all_dim", float, 0.0)
    if mscale < 0 or mscale_all < 0:
        raise settings.invalid(f"yarn rope: expected positive mscale, found {mscale} and {mscale_all}.")

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    # transformers reads 0 as absent.
    nonzero = Fields(settings.name, {key: value for key, value in settings.values.items() if value != 0})
    inferred = magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1.0)
    return Yarn(
        factor,
        original,
        settings.positive("attention_factor", inferred),
        nonzero.positive("beta_fast", 32.0),
        nonzero.positive("beta_slow", 1.0),
        settings.get("truncate", bool, True),
    )


def _linear(settings: Fields, longest: int, theta: float) -> LinearScaling:
    return LinearScaling(_factor(settings, "linear"))


def _linear_to_json(linear: LinearScaling) -> dict[str, Any]:
    return {"rope_type": "linear", "factor": linear.factor}


def _llama3(settings: Fields, longest: int, theta: float) -> Llama3Scaling:
    low, high = settings.positive("low_freq_factor", 1.0), settings.positive("high_freq_factor", 4.0)
    if low >= high:
        raise settings.invalid(f"llama3 rope: expected low_freq_factor below high_freq_factor, found {low} and {high}.")
    original = settings.size("original_max_position_embeddings")
    return Llama3Scaling(_factor(settings, "llama3"), low, high, original)


def _llama3_to_json(llama3: Llama3Scaling) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": llama3.factor,
        "low_freq_factor": llama3.low_freq_factor,
        "high_freq_factor": llama3.high_freq_factor,
        "original_max_position_embeddings": llama3.original_length,
    }


def _yarn_to_json(yarn: Yarn) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_length,
        "attention_factor": yarn.attention_factor,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "truncate": yarn.truncate,
    }


_YARN = frozenset(
    """
    attention_factor beta_fast beta_slow factor mscale mscale_all_dim original_max_position_embeddings truncate
    """.split()
)

_LLAMA3 = frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"})

_TYPES: Mapping[str, tuple[frozenset[str], Callable[[Fields, int, float], RopeScaling | None]]] = {
    "default": (frozenset(), _no_scaling),
    "linear": (frozenset({"factor"}), _linear),
    "llama3": (_LLAMA3, _llama3),
    "yarn": (_YARN, _yarn),
}
"""Implemented rope types: the settings of each, and its reader."""

_WRITERS: Mapping[type, Callable[[Any], dict[str, Any]]] = {
    LinearScaling: _linear_to_json,
    Llama3Scaling: _llama3_to_json,
    Yarn: _yarn_to_json,
}
