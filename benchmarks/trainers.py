"""The contenders of `train.py`: each is a model, its parameters in their formats, and an optimizer.

Each is made in a process of its own.  What only some of them need is imported in their functions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import train_models
from train_models import SEED, Size, Stock, cross_entropy

RATE = 1e-3
RANK, ALPHA = 8, 16.0

HEAD_WIDE = {"lm_head/kernel": "bf16", "kernel": "f8_e4m3fn", "default": "bf16"}
"""FP8 kernels, except that of the head, with the rest in bfloat16."""

W8A8 = {"lm_head/kernel": None, "kernel": "f8_e4m3fn"}
"""Products of FP8 kernels and activations, except for the head."""

EIGHT_BITS = {"mu": "dynamic8", "nu": "dynamic8"}


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A training step in parts.

    params          the parameters that are trained, as they are stored
    frozen          the others, which `loss` needs; None if all are trained
    loss            `loss(params, frozen, ids)`, ()
    tx              the optimizer
    state           its state
    planned         what the policy's plan says of memory, in bytes; None without a policy
    value_and_grad  jax.value_and_grad, or perparam's
    """

    params: Any
    frozen: Any
    loss: Callable[[Any, Any, jax.Array], jax.Array]
    tx: optax.GradientTransformation
    state: Any
    planned: Mapping[str, int] | None = None
    value_and_grad: Callable[..., Any] = jax.value_and_grad

    def gradients(self, params: Any, frozen: Any, ids: jax.Array) -> tuple[jax.Array, Any]:
        """Returns the loss and the gradients of `params`."""
        return self.value_and_grad(self.loss)(params, frozen, ids)

    def update(self, params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        """Returns parameters and state after the optimizer's update."""
        updates, state = self.tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    def step(self, params: Any, state: Any, frozen: Any, ids: jax.Array) -> tuple[Any, Any, jax.Array]:
        """Returns parameters and state after a training step, and the loss before it."""
        loss, gradients = self.gradients(params, frozen, ids)
        return *self.update(params, state, gradients), loss


def adamw(**options: Any) -> optax.GradientTransformation:
    """Returns the optimizer of all contenders."""
    return optax.adamw(RATE, **options)


# optax, without perparam.


def plain(dtype: str, state: str | None = None, mu: str | None = None) -> Callable[[Size], Trainer]:
    """Returns a contender with parameters of one dtype and plain optax.

    state  the dtype of the parameters that the optimizer was initialised with, and so that of its state
    mu     optax's `mu_dtype`
    """

    def make(size: Size) -> Trainer:
        module = Stock(size)
        wide = jax.jit(module.init)(jax.random.key(SEED), train_models.batch(size)[:, :-1])["params"]
        params = _cast(wide, dtype)
        tx = adamw(mu_dtype=mu)
        return Trainer(params, None, _stock_loss(module), tx, tx.init(_cast(wide, state or dtype)))

    return make


def _cast(params: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), params)


def _stock_loss(module: Any) -> Callable[[Any, Any, jax.Array], jax.Array]:
    return lambda params, _, ids: cross_entropy(module.apply({"params": params}, ids[:, :-1]), ids)


# perparam, with Flax's own layers.


def perparam_stock(*slots: Any, rounding: str = "nearest", **more: Any) -> Callable[[Size], Trainer]:
    """Returns a contender with a policy of these slots and a model that knows nothing of policies."""

    def make(size: Size) -> Trainer:
        import perparam

        policy = perparam.Policy(*slots, **more)
        module, ids = Stock(size), train_models.batch(size)[:, :-1]
        params = perparam.init(module, policy, jax.random.key(SEED), ids)["params"]

        def loss(params: Any, _: Any, ids: jax.Array) -> jax.Array:
            return cross_entropy(perparam.apply(module, policy, {"params": params}, ids[:, :-1]), ids)

        return _with_policy(params, None, loss, policy, rounding)

    return make


def _with_policy(params: Any, frozen: Any, loss: Any, policy: Any, rounding: str = "nearest") -> Trainer:
    from perparam import training

    tx = training.with_policy(adamw(), policy, rounding=rounding)
    plan = policy.explain(params, optimizer=tx)
    planned = {
        "parameters": plan.total_bytes,
        "optimizer": plan.training.optimizer_bytes,
        "gradients": plan.training.gradient_bytes,
    }
    gradients = training.value_and_grad if _has_scales(params) else jax.value_and_grad
    return Trainer(params, frozen, loss, tx, tx.init(params), planned, gradients)


def _has_scales(params: Any) -> bool:
    return any(jnp.dtype(x.dtype).itemsize == 1 for x in jax.tree.leaves(params))


# perparam's Qwen3.


def qwen3(*slots: Any, rounding: str = "nearest", optimizer: str = "perparam", **more: Any) -> Callable[[Size], Trainer]:
    """Returns a contender with perparam's Qwen3 under a policy of these slots.

    optimizer  "perparam", or "optax" for plain optax with state in float32
    """

    def make(size: Size) -> Trainer:
        import perparam
        from flax import nnx

        policy = perparam.Policy(*slots, **more)
        graph, state = nnx.split(train_models.qwen3(size, policy))
        params = nnx.to_pure_dict(state)
        loss = _nnx_loss(graph, state)
        if optimizer == "perparam":
            return _with_policy(params, None, loss, policy, rounding)
        tx = adamw()
        return Trainer(params, None, loss, tx, tx.init(_cast(params, jnp.float32)))

    return make


def lora(*slots: Any, **more: Any) -> Callable[[Size], Trainer]:
    """Returns a contender with adapters beside the frozen layers of perparam's Qwen3 under a policy of these slots."""

    def make(size: Size) -> Trainer:
        import perparam
        from flax import nnx
        from perparam.training import add_lora

        policy = perparam.Policy(*slots, **more)
        base = train_models.qwen3(size, policy)
        model = add_lora(base, RANK, ALPHA, "layers/**", rngs=nnx.Rngs(SEED))
        graph, adapters, frozen = nnx.split(model, nnx.LoRAParam, ...)
        params, structure = nnx.to_pure_dict(adapters), jax.tree.structure(adapters)

        def loss(params: Any, frozen: Any, ids: jax.Array) -> jax.Array:
            adapters = jax.tree.unflatten(structure, jax.tree.leaves(params))
            return cross_entropy(nnx.merge(graph, adapters, frozen)(ids[:, :-1]), ids)

        return _with_policy(params, frozen, loss, perparam.Policy())

    return make


def _nnx_loss(graph: Any, state: Any) -> Callable[[Any, Any, jax.Array], jax.Array]:
    from flax import nnx

    structure = jax.tree.structure(state)

    def loss(params: Any, _: Any, ids: jax.Array) -> jax.Array:
        model = nnx.merge(graph, jax.tree.unflatten(structure, jax.tree.leaves(params)))
        return cross_entropy(model(ids[:, :-1]), ids)

    return loss


# qwix.


def qwix_qt(values: Any, backward: Any) -> Callable[[Size], Trainer]:
    """Returns a contender with quantised training by qwix: float32 parameters, products of narrow values."""

    def make(size: Size) -> Trainer:
        import qwix

        rule = qwix.QtRule(
            module_path=r"layers_.*", op_names=("dot_general",), weight_qtype=values, act_qtype=values,
            bwd_qtype=backward,
        )  # fmt: skip
        module = Stock(size)
        params = jax.jit(module.init)(jax.random.key(SEED), train_models.batch(size)[:, :-1])["params"]
        module = qwix.quantize_model(module, qwix.QtProvider([rule]))
        tx = adamw()
        return Trainer(params, None, _stock_loss(module), tx, tx.init(params))

    return make


def qwix_lora(values: Any) -> Callable[[Size], Trainer]:
    """Returns a contender with qwix' adapters over frozen kernels of narrow values, the rest in bfloat16."""

    def make(size: Size) -> Trainer:
        import qwix
        from flax import traverse_util

        rule = qwix.LoraRule(
            module_path=r"layers_.*", op_names=("dot_general",), weight_qtype=values, tile_size=128, rank=RANK,
            alpha=ALPHA,
        )  # fmt: skip
        ids = train_models.batch(size)[:, :-1]
        wide = _cast(jax.jit(Stock(size).init)(jax.random.key(SEED), ids)["params"], jnp.bfloat16)
        module = qwix.apply_lora_to_model(Stock(size), qwix.LoraProvider([rule]))
        drawn = jax.jit(module.init)(jax.random.key(SEED), ids)["params"]  # kernels are quantised again below, from bfloat16
        frozen = qwix.quantize_params(wide, drawn)
        adapters = {path: x for path, x in traverse_util.flatten_dict(drawn).items() if "_lora_" in path[-1]}
        params = traverse_util.unflatten_dict(_cast(adapters, jnp.bfloat16))

        def loss(params: Any, frozen: Any, ids: jax.Array) -> jax.Array:
            flat = traverse_util.flatten_dict(frozen) | traverse_util.flatten_dict(params)
            return cross_entropy(module.apply({"params": traverse_util.unflatten_dict(flat)}, ids[:, :-1]), ids)

        tx = adamw()
        return Trainer(params, frozen, loss, tx, tx.init(_cast(params, jnp.float32)))

    return make


CONTENDERS: dict[str, Callable[[Size], Trainer]] = {
    "optax f32": plain("float32"),
    "optax bf16, mu_dtype=f32": plain("bfloat16", mu="float32"),
    "optax bf16, f32 state": plain("bfloat16", state="float32"),
    "perparam f32": perparam_stock("f32"),
    "perparam bf16, f32 state": perparam_stock("bf16"),
    "perparam bf16, f32 master": perparam_stock("bf16", master="f32"),
    "perparam bf16, stochastic": perparam_stock("bf16", rounding="stochastic"),
    "perparam bf16, stochastic, 8-bit state": perparam_stock("bf16", opt_state=EIGHT_BITS, rounding="stochastic"),
    "perparam FP8, f32 master": perparam_stock(HEAD_WIDE, "bf16", master="f32"),
    "perparam FP8, stochastic, 8-bit state": perparam_stock(
        HEAD_WIDE, "bf16", opt_state=EIGHT_BITS, rounding="stochastic"
    ),
    "perparam f32, W8A8": perparam_stock("f32", W8A8 | {"default": "f32"}),
    "qwix QT fp8": qwix_qt("float8_e4m3fn", "float8_e5m2"),
    "qwix QT int8": qwix_qt("int8", "int8"),
    "qwix QLoRA nf4": qwix_lora("nf4"),
    "qwix QLoRA int8": qwix_lora("int8"),
    "qwix QLoRA fp8": qwix_lora("float8_e4m3fn"),
    "Qwen3, optax bf16, f32 state": qwen3("bf16", optimizer="optax"),
    "Qwen3, perparam bf16, f32 state": qwen3("bf16"),
    "Qwen3, perparam FP8, f32 master": qwen3(HEAD_WIDE, master="f32"),
    "Qwen3, perparam FP8, W8A8": qwen3(HEAD_WIDE, W8A8 | {"default": "bf16"}, master="f32"),
    "Qwen3, perparam LoRA over bf16": lora("bf16"),
    "Qwen3, perparam LoRA over FP8": lora(HEAD_WIDE),
}
"""By name; the names of those with perparam's Qwen3 begin with it. All have the optimizer `adamw`."""

BASELINES = {"": "optax bf16, f32 state", "Qwen3": "Qwen3, optax bf16, f32 state"}
"""By the first word of a contender's name: the contender by whose times its own are divided."""


def versions() -> dict[str, str]:
    """Returns the versions of the packages that contenders need, as far as they are installed."""
    found = {}
    for name in ("flax", "optax", "qwix"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
