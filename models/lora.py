"""`add_lora` and `merge_lora`: low-rank adapters beside the frozen kernels of a model, and their merge into these."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx

from ..policies.errors import InvalidAdapter, UnmatchedRule, count, shown
from ..policies.formats import Format
from ..policies.patterns import GLOBS, Pattern
from ..policies.policy import Policy
from ..policies.scales import F32
from ..policies.scope import Scope
from ..policies.trees import ArrayInfo
from .adapters import Adapter
from .config import DecoderConfig
from .layers import Embedding
from .lora_layers import Draw, insert_adapters, linear_layers, peft_uniform, shapes_of
from .sharding.arrays import shardings, splits

M = TypeVar("M", bound=nnx.Module)

_PARAMETERS = ("kernel", "weight", "scale_inv", "bias", "lora_a", "lora_b")


def add_lora(
    model: M,
    rank: int,
    alpha: float,
    targets: str | Iterable[str],
    *,
    rngs: nnx.Rngs,
    rslora: bool = False,
) -> M:
    """Returns the model with a trainable low-rank adapter beside the kernel of each target; `model` is not changed.

    rank     rows of `lora_a`
    alpha    the adapter's product is scaled by alpha / rank
    targets  patterns of the paths of linear layers: "q_proj" for all of this name, "layers/**" for all in decoder
             layers, "layers/{0..3}/self_attn/{q,v}_proj"
    rngs     random keys, for `lora_a`
    rslora   scale by alpha / sqrt(rank) instead

    The result shares its arrays with `model`, and has the same outputs until it is trained. A layer has, beside its
    `kernel` and `scale_inv`, which keep their paths and bits:

      lora_a  (rank, in)   uniform between ±1/sqrt(in), as peft draws it   (experts, rank, in) for experts
      lora_b  (out, rank)  zeros                                           (experts, out, rank) for experts

    Both are `nnx.LoRAParam`s, so that these train them and nothing else:

      optimizer = nnx.Optimizer(model, optax.adamw(1e-4), wrt=nnx.LoRAParam)
      loss, gradients = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)

    The model's policy decides on their dtypes, such as by the rule `lora_a?: bf16`; without one they are float32, and
    computed in the activations' dtype. A default of `params` is a rule: under the preset "bf16" they are bfloat16, in
    which small updates are lost; write `"lora_*?": f32` before it. Layers with different ranks are targets of several
    calls.

    >>> from perparam.models import Linear
    >>> layer = add_lora(Linear(4, 3, policy="fp8_weight_only", rngs=nnx.Rngs(0)), 2, 4, "**", rngs=nnx.Rngs(1))
    >>> layer.kernel.dtype.name, layer.lora_a.shape, layer.lora_b.shape
    ('float8_e4m3fn', (2, 4), (3, 2))

    Raises:
      UnmatchedRule: a pattern that matches no linear layer and does not end with '?'.
      InvalidAdapter: other arguments, such as a rank or alpha that is not positive; a layer that has an adapter; a
        policy under which adapters would be narrow.
    """
    positive = isinstance(rank, numbers.Integral) and isinstance(alpha, numbers.Real) and rank > 0 < alpha < math.inf
    if not positive:
        raise InvalidAdapter(
            f"rank and alpha are positive numbers, and rank is an integer: found rank {shown(rank)} and alpha "
            f"{shown(alpha)}. Usual values are 8 and 16."
        )
    if not isinstance(rngs, nnx.Rngs):
        raise InvalidAdapter(f"rngs: expected random keys of NNX, found {shown(rngs)}. Write nnx.Rngs(0), for example.")
    adapter = Adapter(int(rank), float(alpha), rslora)
    return with_adapters(model, dict.fromkeys(_chosen(model, targets), adapter), peft_uniform(rngs))


def with_adapters(model: M, adapters: Mapping[str, Adapter], draw: Draw) -> M:
    """Returns the model with adapters by the path of their layer, whose arrays `draw` returns; `model` is not changed.

    Raises:
      InvalidAdapter: a layer that has an adapter.
    """
    changed = nnx.clone(model)
    layers = linear_layers(changed)
    for path in adapters:
        if (present := layers[path].adapter) is not None:
            raise InvalidAdapter(
                f"{path}: the layer has an adapter of rank {present.rank}. Merge it with merge_lora, or "
                "name other layers."
            )
    shapes = {
        f"{path}/{name}": ArrayInfo(shape, Format(F32))
        for path, adapter in adapters.items()
        for name, shape in shapes_of(layers[path], adapter).items()
    }
    sharding, config = getattr(model, "sharding", None), getattr(model, "config", None)
    policy, found = _policy(model), None
    if sharding is not None and isinstance(config, DecoderConfig):
        # Its patterns are of all parameters, and need not match any of these.
        patterns = {f"{key.removesuffix('?')}?": spec for key, spec in sharding.patterns.items()}
        sharding = dataclasses.replace(sharding, patterns=patterns)
        places, found = shardings(sharding, config, shapes), splits(sharding, config, shapes)
        draw = _placed(draw, places)
    insert_adapters(changed, adapters, Scope(policy, policy.activations, splits=found), draw)
    return changed


def _policy(model: nnx.Module) -> Policy:
    """The model's policy; one that changes nothing if it has none."""
    policy = getattr(model, "policy", None)
    return policy if isinstance(policy, Policy) else Policy()


def _placed(draw: Draw, places: Mapping[str, Any]) -> Draw:
    """`draw`, whose arrays have these shardings, by path."""
    return lambda path, shape: jax.device_put(draw(path, shape), places[path])


def _chosen(model: nnx.Module, targets: str | Iterable[str]) -> list[str]:
    """The paths of the linear layers that any of the patterns matches, in the model's order."""
    if isinstance(targets, Mapping) or not isinstance(targets, Iterable):
        raise InvalidAdapter(
            f'targets: expected patterns of the paths of linear layers, found {shown(targets)}. Write "q_proj", for '
            "example; layers with different ranks are targets of several calls."
        )
    texts = [targets] if isinstance(targets, str) else list(targets)
    patterns = {text: Pattern.of(text.removesuffix("?")) for text in texts}
    paths = list(linear_layers(model))
    for text, pattern in patterns.items():
        if not text.endswith("?") and not any(map(pattern.matches, paths)):
            raise UnmatchedRule(_unmatched(model, text, pattern, paths))
    chosen = [path for path in paths if any(pattern.matches(path) for pattern in patterns.values())]
    if not chosen:
        raise UnmatchedRule(f"targets: none of {shown(texts)} matches a linear layer, such as {paths[:1]}. Add one.")
    return chosen


def _unmatched(model: nnx.Module, text: str, pattern: Pattern, paths: Sequence[str]) -> str:
    """The message of the error for a pattern that matches no linear layer."""
    if not paths:
        return (
            f"{text!r} (targets): {type(model).__name__} has no linear layers of perparam, such as "
            "perparam.models.Linear, and only these can have adapters. Build it from them."
        )
    message = f"{text!r} (targets) matches none of {count(len(paths), 'linear layer')}."
    others = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model) if path}
    matched = {path: type(module).__name__ for path, module in others.items() if pattern.matches(path)}
    last = text.removesuffix("?").rpartition("/")[2]
    if any(pattern.matches(f"{path}/kernel") for path in paths) or last in _PARAMETERS:
        name = last if last in _PARAMETERS else "kernel"
        return f"{message} Targets are layers, not their parameters: write the pattern without '/{name}'."
    if text == "all-linear":
        return f"{message} Targets are patterns of the paths of layers: write '**' for all."
    if ".*" in text:
        return f"{message} {GLOBS} A name such as 'q_proj' is of all layers that have it."
    dotted = text.replace(".", "/")
    if "." in text and any(f"/{path}".endswith(f"/{dotted}") for path in paths):
        return f"{message} Paths have '/' between names: write '**/{dotted}'."
    if inside := [path for path in paths if any(pattern.matches(path.rsplit("/", i)[0]) for i in (1, 2))]:
        return f"{message} It matches modules with linear layers in them, such as {inside[0]}: add '/**'."
    tied = isinstance(others.get("embed_tokens"), Embedding) and getattr(model, "lm_head", None) is None
    if text.strip("*/?") == "lm_head" and tied:
        return (
            f"{message} The head of this model is its embedding, and only linear layers can have adapters. Remove the "
            "pattern."
        )
    if matched:
        path, kind = next(iter(matched.items()))
        return f"{message} {path} is of class {kind}, and only linear layers can have adapters. Remove the pattern."
    near = difflib.get_close_matches(text.replace("*", "0"), paths, n=1, cutoff=0.0)
    named = difflib.get_close_matches(text, {path.rpartition("/")[2]: 0 for path in paths}, n=1, cutoff=0.0)
    nearest = (named if pattern.bare else near) or ["none"]
    return (
        f"{message}\n  nearest: {nearest[0]}\n"
        "  Correct the pattern, remove it, or end it with '?' if it may match nothing."
    )
