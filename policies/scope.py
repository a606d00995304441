"""What a module sees of a policy: its own parameters, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from .errors import InvalidPolicy
from .formats import Format
from .rules import PolicyRules


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """What a policy resolved to for one parameter of a module.

    storage  format as stored; None: as it comes
    compute  format in which it enters arithmetic; None: narrow as stored, plain in the activations' dtype
    """

    storage: Format | None = None
    compute: Format | None = None

    @property
    def compute_dtype(self) -> np.dtype | None:
        """The dtype of `compute`."""
        return None if self.compute is None else self.compute.values


@dataclasses.dataclass(frozen=True)
class Scope:
    """A policy as one module sees it: `scope.at("attention").spec("kernel")`.

    Modules take `policy=`, which is a Policy or a Scope, turn it into a Scope with `policy.at()`, hand `scope.at(name)`
    to their submodules and keep the `ParamSpec`s of their own parameters.

    policy       the whole policy
    activations  the dtype of activations; None: that of the inputs
    prefix       the module's path
    stored       specs of parameters that exist already, by path; None: parameters are yet to be drawn
    """

    policy: PolicyRules
    activations: np.dtype | None
    prefix: tuple[str, ...] = ()
    stored: Mapping[str, ParamSpec] | None = dataclasses.field(default=None, hash=False)

    def at(self, *names: str | int) -> Scope:
        """The scope of a submodule."""
        return dataclasses.replace(self, prefix=(*self.prefix, *map(str, names)))

    def path(self, name: str) -> str:
        """The path of the module's own parameter `name`."""
        return "/".join((*self.prefix, name))

    def spec(self, name: str) -> ParamSpec:
        """What the policy says of the module's own parameter `name`.

        Raises:
          InvalidPolicy: for a parameter that is not among the stored ones.
        """
        path = self.path(name)
        if self.stored is None:
            return ParamSpec(self.policy.storage(path), self.policy.compute.format(path))
        if path not in self.stored:
            raise InvalidPolicy(
                f"{path}: the module asks for a parameter that is not among the {len(self.stored)} stored ones. "
                "Give the variables of the same module."
            )
        return self.stored[path]
