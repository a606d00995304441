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

    params     the parameters that are trained, as they are stored
    frozen     the others; None if all are trained
    gradients  `gradients(params, frozen, ids)` returns the loss (), and the gradients of `params`
    tx         the optimizer
    state      its state
    planned    what the policy's plan says of memory, in bytes; None without a policy
    """

    params: Any
    frozen: Any
    gradients: Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]
    tx: optax.GradientTransformation
    state: Any
    planned: Mapping[str, int] | None = None

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
        return Trainer(params, None, jax.value_and_grad(_stock_loss(module)), tx, tx.init(_cast(wide, state or dtype)))

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

        value_and_grad = perparam.training.value_and_grad if _has_scales(params) else jax.value_and_grad
        return _with_policy(params, None, value_and_grad(loss), policy, rounding)

    return make


def _with_policy(variables: Any, frozen: Any, gradients: Any, policy: Any, rounding: str = "nearest") -> Trainer:
    from flax import nnx

    from perparam import training

    tx = training.with_policy(adamw(), policy, rounding=rounding)
    plan = policy.explain(variables, optimizer=tx)
    planned = {
        "parameters": plan.total_bytes,
        "optimizer": plan.training.optimizer_bytes,
        "gradients": plan.training.gradient_bytes,
    }
    params = nnx.as_pure(variables) if isinstance(variables, nnx.State) else variables
    return Trainer(params, frozen, gradients, tx, tx.init(params), planned)


def _has_scales(params: Any) -> bool:
    return any(jnp.dtype(x.dtype).itemsize == 1 for x in jax.tree.leaves(params))


# perparam's Qwen3.


def qwen3(*slots: Any, with_policy: bool = True, **more: Any) -> Callable[[Size], Trainer]:
    """Returns a contender with perparam's Qwen3 under a policy of these slots.

    with_policy  whether the optimizer has the policy too; otherwise it is plain optax, with state in float32
    """

    def make(size: Size) -> Trainer:
        from flax import nnx

        import perparam

        policy = perparam.Policy(*slots, **more)
        graph, state = nnx.split(train_models.qwen3(size, policy))

        def loss(params: Any, _: Any, ids: jax.Array) -> jax.Array:
            return cross_entropy(nnx.merge(graph, params)(ids[:, :-1]), ids)

        def of_module(params: Any, _: Any, ids: jax.Array) -> tuple[jax.Array, Any]:
            value_and_grad = perparam.training.value_and_grad(lambda model: cross_entropy(model(ids[:, :-1]), ids))
            value, gradients = value_and_grad(nnx.merge(graph, params))
            return value, nnx.as_pure(gradients)

        gradients = of_module if _has_scales(state) else jax.value_and_grad(loss)
        if with_policy:
            return _with_policy(state, None, gradients, policy)
        params, tx = nnx.as_pure(state), adamw()
        return Trainer(params, None, gradients, tx, tx.init(_cast(params, jnp.float32)))

    return make


def lora(*slots: Any, **more: Any) -> Callable[[Size], Trainer]:
    """Returns a contender with adapters beside the frozen layers of perparam's Qwen3 under a policy of these slots."""

    def make(size: Size) -> Trainer:
        from flax import nnx

        import perparam
        from perparam.training import add_lora

        policy = perparam.Policy(*slots, **more)
        base = train_models.qwen3(size, policy)
        model = add_lora(base, RANK, ALPHA, "layers/**", rngs=nnx.Rngs(SEED))
        graph, adapters, frozen = nnx.split(model, nnx.LoRAParam, ...)

        def loss(params: Any, frozen: Any, ids: jax.Array) -> jax.Array:
            return cross_entropy(nnx.merge(graph, params, frozen)(ids[:, :-1]), ids)

        return _with_policy(adapters, nnx.as_pure(frozen), jax.value_and_grad(loss), perparam.Policy())

    return make


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
        return Trainer(params, None, jax.value_and_grad(_stock_loss(module)), tx, tx.init(params))

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
        drawn = jax.jit(module.init)(jax.random.key(SEED), ids)["params"]
        frozen = qwix.quantize_params(wide, drawn)  # again, with scales in bfloat16
        adapters = {path: x for path, x in traverse_util.flatten_dict(drawn).items() if "_lora_" in path[-1]}
        params = traverse_util.unflatten_dict(_cast(adapters, jnp.bfloat16))

        def loss(params: Any, frozen: Any, ids: jax.Array) -> jax.Array:
            flat = traverse_util.flatten_dict(frozen) | traverse_util.flatten_dict(params)
            return cross_entropy(module.apply({"params": traverse_util.unflatten_dict(flat)}, ids[:, :-1]), ids)

        tx = adamw()
        return Trainer(params, frozen, jax.value_and_grad(loss), tx, tx.init(_cast(params, jnp.float32)))

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
    "Qwen3, optax bf16, f32 state": qwen3("bf16", with_policy=False),
    "Qwen3, perparam bf16, f32 state": qwen3("bf16"),
    "Qwen3, perparam FP8, f32 master": qwen3(HEAD_WIDE, master="f32"),
    "Qwen3, perparam FP8, W8A8": qwen3(HEAD_WIDE, W8A8 | {"default": "bf16"}, master="f32"),
    "Qwen3, perparam FP8, W8A8, e5m2 backward": qwen3(
        HEAD_WIDE, W8A8 | {"default": "bf16"}, master="f32", backward={"lm_head/kernel": None, "kernel": "f8_e5m2"}
    ),
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
