"""The class of a module without what a transformation of the model, such as rematerialisation, has put around it."""

from __future__ import annotations

from flax import nnx


def plain_class(module: nnx.Module) -> type[nnx.Module]:
    """The class of a module, without rematerialisation.

    >>> plain_class(nnx.Dropout(0.5)).__name__
    'Dropout'
    """
    return getattr(type(module), "_plain", type(module))


def is_rematerialised(module: nnx.Module) -> bool:
    """Whether `remat` has put `jax.checkpoint` around the calls of a module."""
    return plain_class(module) is not type(module)
