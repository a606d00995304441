"""The cross-entropy of a head whose outputs are computed in slices, with a derivative of its own.

The derivative computes the logits of each slice again, and with them the gradients of the slice's rows, which are
written once into the gradient of the head.  Automatic differentiation of the loop would add an array of the size of the
whole head for each slice, in the head's dtype.  Over a mesh, each device has some rows of the head for some tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from ..policies.errors import InvalidGradients
from ..policies.matmul.sharded import WHOLE, array_specs, local, over_devices, spec
from ..policies.matmul.shards import vary
from ..policies.scaled_array import ScaledArray
from .head_slices import Arrays, Head, Kernel, Layout, Logits, rows, with_rows

IGNORED = -100
"""The label of tokens without a loss, as in PyTorch and transformers."""


def head_losses(
    logits: Logits,
    hidden: jax.Array,
    head: Head,
    labels: jax.Array,
    size_of: Callable[[int, int], int],
    layout: Layout | None = None,
) -> jax.Array:
    """Returns the cross-entropy of each label, of the shape of `labels`, float32, from slices of logits.

    hidden   (..., features)
    labels   (...)            the loss is 0 for -100, and NaN for other labels outside the vocabulary
    size_of  the size of a slice, for a number of outputs and the number of rows of a block of scales
    layout   None: on one device, or as XLA divides it

    It has derivatives in reverse mode. Those of a head with a proxy cannot be differentiated again.
    """
    arrays, stored = head.divided()
    slices = _Slices(logits, head.kernel.shape, size_of, layout)
    losses: jax.Array = _with_derivative(slices)(hidden, arrays, stored, labels)
    return losses


def _with_derivative(slices: _Slices) -> Callable[..., jax.Array]:
    """Returns the function of hidden states, arrays, a narrow kernel and labels that returns the losses."""

    @jax.custom_vjp
    def losses(hidden: jax.Array, arrays: Arrays, stored: Kernel | None, labels: jax.Array) -> jax.Array:
        return slices.forward(hidden, _with_empty_proxy(arrays), stored, labels)[0]

    def forward(*arguments: Any) -> Any:
        values = jax.tree.map(lambda x: x.value, arguments, is_leaf=_is_primal)
        hidden, arrays, stored, labels = values
        _, perturbed, _, _ = jax.tree.map(lambda x: x.perturbed, arguments, is_leaf=_is_primal)
        # The names are part of the tree, not leaves.
        trained = {key: {name: () for name, flag in each.items() if flag} for key, each in perturbed.items()}
        residuals = hidden, _with_empty_proxy(arrays), stored, labels
        run = functools.partial(_once, slices.forward) if "proxy" in arrays["rows"] else slices.forward
        result, *sums = run(*residuals)
        return result, (*residuals, *sums, trained)

    def backward(residuals: Any, gradient: Any) -> Any:
        *values, trained = residuals
        if isinstance(gradient, SymbolicZero):
            gradient = jnp.zeros(gradient.shape, gradient.dtype)
        arrays = values[1]
        run = functools.partial(slices.backward, {key: tuple(names) for key, names in trained.items()})
        dx, gradients = _once(run, *values, gradient) if "proxy" in arrays["rows"] else run(*values, gradient)
        return dx, {key: {name: gradients[key].get(name) for name in arrays[key]} for key in arrays}, None, None

    losses.defvjp(forward, backward, symbolic_zeros=True)
    return losses


def _is_primal(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")


def _with_empty_proxy(arrays: Arrays) -> Arrays:
    """Returns the arrays with a proxy that has its dtype and no columns, since its values are never read."""
    rows = {name: x[:, :0] if name == "proxy" else x for name, x in arrays["rows"].items()}
    return {**arrays, "rows": rows}


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _once(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns `function(*arguments)`, which has no derivative."""
    return function(*arguments)


@_once.defjvp
def _once_jvp(function: Callable[..., Any], primals: Any, tangents: Any) -> Any:
    raise InvalidGradients(
        "chunked cross-entropy: its derivatives with a narrow head that is trained cannot be differentiated again, "
        "since they do not depend on the proxy. Dequantize the head first, which makes a plain one."
    )


@dataclasses.dataclass(frozen=True)
class _Slices:
    """The loops over the slices of a head.

    shape  of the kernel, on all devices together
    """

    logits: Logits
    shape: tuple[int, ...]
    size_of: Callable[[int, int], int]
    layout: Layout | None

    def forward(self, hidden: jax.Array, arrays: Arrays, stored: Kernel | None, labels: jax.Array) -> Any:
        """Returns the losses, and for the derivative the largest logit and the sum of exponentials of each token."""
        tokens = self._tokens_spec(labels)
        specs = self._tokens_spec(hidden), self._array_specs(arrays), self._stored_spec(stored), tokens
        result: Any = self._over_devices(self._forward, specs, (tokens,) * 3)(hidden, arrays, stored, labels)
        return result

    def backward(self, trained: dict[str, tuple[str, ...]], *residuals: Any) -> tuple[jax.Array, Arrays]:
        """Returns the gradients of the hidden states and of the arrays of these names."""
        hidden, arrays, stored, labels, *_ = residuals
        tokens, of_hidden, of_arrays = self._tokens_spec(labels), self._tokens_spec(hidden), self._array_specs(arrays)
        specs = of_hidden, of_arrays, self._stored_spec(stored), *(tokens,) * 4
        gradients = {key: {name: of_arrays[key][name] for name in names} for key, names in trained.items()}
        if "proxy" in trained["rows"]:
            # The proxy has no columns here, but its gradient has those of the kernel.
            gradients["rows"]["proxy"] = self._kernel_spec()
        run = functools.partial(self._backward, trained)
        result: tuple[jax.Array, Arrays] = self._over_devices(run, specs, (of_hidden, gradients))(*residuals)
        return result

    # What one device computes.

    def _forward(self, hidden: jax.Array, arrays: Arrays, stored: Kernel | None, labels: jax.Array) -> Any:
        x, flat = self._tokens(hidden, labels)
        stored, count = self._mine(stored)

        def add(size: int, carry: Any, start: ArrayLike) -> Any:
            peak, total, own = carry
            part = self._logits(x, *self._slice(arrays, stored, start, size)).astype(jnp.float32)
            # Any number would do in place of the maximum, so its derivative is 0.
            highest = jax.lax.stop_gradient(jnp.maximum(peak, part.max(axis=-1)))
            total = total * jnp.exp(peak - highest) + jnp.exp(part - highest[:, None]).sum(axis=-1)
            return highest, total, own + jnp.where(_is_own(flat, start, size), part, 0).sum(axis=-1)

        # Finite, so that a first slice of -inf is no NaN.
        carry = tuple(jnp.full(flat.shape, value, jnp.float32) for value in (jnp.finfo(jnp.float32).min, 0, 0))
        peak, total, own = self._loop(add, vary(carry, x), count, stored)
        if self.layout is not None and (names := self.layout.rows.kept):
            highest = jax.lax.pmax(jax.lax.stop_gradient(peak), names)
            total, own = jax.lax.psum((total * jnp.exp(peak - highest), own), names)
            peak = highest
        labels = labels.astype(jnp.int32)
        peak, total, own = (each.reshape(labels.shape) for each in (peak, total, own))
        inside = (labels >= 0) & (labels < self.shape[0])
        losses = jnp.where(inside, peak + jnp.log(total) - own, jnp.where(labels == IGNORED, 0, jnp.nan))
        return losses, peak, total

    def _backward(
        self,
        trained: dict[str, tuple[str, ...]],
        hidden: jax.Array,
        arrays: Arrays,
        stored: Kernel | None,
        labels: jax.Array,
        peak: jax.Array,
        total: jax.Array,
        gradient: jax.Array,
    ) -> tuple[jax.Array, Arrays]:
        x, flat = self._tokens(hidden, labels)
        peak, total, gradient = (each.reshape(-1, 1) for each in (peak, total, gradient))
        gradient = jnp.where(labels.reshape(-1, 1) == IGNORED, 0, gradient)
        stored, count = self._mine(stored)
        whole = {name: vary(arrays["whole"][name], x) for name in trained["whole"]}

        def add(size: int, carry: Any, start: ArrayLike) -> Any:
            dx, dwhole, drows = carry
            part, kernel = self._slice(arrays, stored, start, size)
            rows = {name: part["rows"][name] for name in trained["rows"]}

            def logits(x: jax.Array, rows: Any, whole: Any) -> jax.Array:
                changed = {"rows": {**part["rows"], **rows}, "whole": {**part["whole"], **whole}}
                return self._logits(x, changed, kernel)

            y, pull = jax.vjp(logits, x, rows, whole)
            softmax = jnp.exp(y.astype(jnp.float32) - peak) / total
            d = gradient * (softmax - _is_own(flat, start, size).astype(jnp.float32))
            dx_part, drows_part, dwhole_part = pull(d.astype(y.dtype))
            drows = {name: with_rows(array, drows_part[name], start) for name, array in drows.items()}
            dx = dx + dx_part.astype(jnp.float32)
            return dx, jax.tree.map(lambda a, b: a + b.astype(jnp.float32), dwhole, dwhole_part), drows

        def zeros(name: str) -> jax.Array:
            array = arrays["rows"][name]
            if name != "proxy":
                return vary(jnp.zeros(array.shape, array.dtype), array)
            assert isinstance(stored, ScaledArray)
            return vary(jnp.zeros(stored.shape, array.dtype), stored.values)

        of_tokens = vary(jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), (x, whole)), x)
        dx, dwhole, drows = self._loop(
            add, (*of_tokens, {name: zeros(name) for name in trained["rows"]}), count, stored
        )
        if self.layout is not None:
            dx = jax.lax.psum(dx, self.layout.rows.kept) if self.layout.rows.kept else dx
            dwhole = jax.lax.psum(dwhole, self.layout.names) if self.layout.names else dwhole
        dwhole = {name: array.astype(arrays["whole"][name].dtype) for name, array in dwhole.items()}
        return dx.astype(hidden.dtype).reshape(hidden.shape), {"rows": drows, "whole": dwhole}

    def _logits(self, x: jax.Array, arrays: Arrays, stored: Kernel | None) -> jax.Array:
        """Logits of a slice, whose columns the device may have to gather."""
        head = Head.combined(arrays, stored)
        if self.layout is not None and self.layout.columns.gathered:
            shape = head.kernel.shape[0], self.shape[1]
            head = dataclasses.replace(head, kernel=local(head.kernel, (WHOLE, self.layout.columns), shape))
        return self.logits(x, head)

    def _slice(
        self, arrays: Arrays, stored: Kernel | None, start: ArrayLike, size: int
    ) -> tuple[Arrays, Kernel | None]:
        """The arrays of a slice; in place of a proxy, zeros."""
        others = {name: x for name, x in arrays["rows"].items() if name != "proxy"}
        sliced = {name: rows(x, start, size) for name, x in others.items()}
        kernel = None if stored is None else rows(stored, start, size)
        if "proxy" in arrays["rows"]:
            assert isinstance(kernel, ScaledArray)
            sliced["proxy"] = vary(jnp.zeros(kernel.shape, arrays["rows"]["proxy"].dtype), kernel.values)
        return {"rows": sliced, "whole": arrays["whole"]}, kernel

    def _loop(self, add: Callable[..., Any], carry: Any, count: int, stored: Kernel | None) -> Any:
        """The carry after all slices of the device's `count` outputs."""
        size = self.size_of(count, stored.block[0] if isinstance(stored, ScaledArray) else 1)
        number, rest = divmod(count, size)
        starts = size * jnp.arange(number, dtype=jnp.int32)
        carry, _ = jax.lax.scan(lambda carry, start: (add(size, carry, start), None), carry, starts)
        return add(rest, carry, number * size) if rest else carry

    def _tokens(self, hidden: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Hidden states (n, features), and labels (n,) int32 that count from the device's first output."""
        x, flat = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).astype(jnp.int32)
        if self.layout is None:
            return x, flat
        if names := self.layout.rows.kept:
            flat = flat - jax.lax.axis_index(names) * (self.shape[0] // self.layout.rows.count)
        missing = tuple(name for name in self.layout.names if name not in jax.typeof(x).manual_axis_type.varying)
        return jax.lax.pcast(x, missing, to="varying") if missing else x, flat

    def _mine(self, stored: Kernel | None) -> tuple[Kernel | None, int]:
        """The device's rows of a narrow kernel, and the number of rows that it has of any."""
        if self.layout is None:
            return stored, self.shape[0]
        rows = self.layout.rows
        return None if stored is None else local(stored, (rows, WHOLE), self.shape), self.shape[0] // rows.count

    # How the arrays are divided.

    def _over_devices(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        return function if self.layout is None else over_devices(self.layout.split, function, in_specs, out_specs)

    def _tokens_spec(self, array: jax.Array) -> Any:
        return None if self.layout is None else spec(self.layout.batch, *((),) * (array.ndim - 1))

    def _kernel_spec(self) -> Any:
        return None if self.layout is None else spec(self.layout.rows.kept, self.layout.columns.gathered)

    def _array_specs(self, arrays: Arrays) -> Any:
        kept = () if self.layout is None else self.layout.rows.kept
        by_row = {name: self._kernel_spec() if name == "kernel" else spec(kept) for name in arrays["rows"]}
        return {"rows": by_row, "whole": {name: spec() for name in arrays["whole"]}}

    def _stored_spec(self, stored: Kernel | None) -> Any:
        if self.layout is None or stored is None:
            return None
        return array_specs(stored, (self.layout.rows, self.layout.columns))


def _is_own(flat: jax.Array, start: ArrayLike, size: int) -> jax.Array:
    """(n, size) bool, whether an output is that of the token's label."""
    return flat[:, None] - jnp.asarray(start, jnp.int32) == jnp.arange(size, dtype=jnp.int32)
