"""Scopes: a policy relative to the path of one module, which looks up the formats of its parameters by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from .errors import InvalidPolicy
from .formats import Format
from .matmul.sharded import Split
from .rules import PolicyRules


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """The storage format of one parameter of a module, and the formats in which it is multiplied.

    storage   format in which the parameter is stored; None: in its own dtype
    compute   format for arithmetic; None: a narrow parameter as stored, another in the activations' dtype
    backward  format of the products that give gradients; None: not narrow
    """

    storage: Format | None = None
    compute: Format | None = None
    backward: Format | None = None

    @property
    def compute_dtype(self) -> np.dtype | None:
        """The dtype of the values of `compute`, or None."""
        return None if self.compute is None else self.compute.values


@dataclasses.dataclass(frozen=True)
class Scope:
    """A policy relative to the path of one module: `scope.at("attention").spec("kernel")`.

    A module takes an argument `policy`, a Policy or a Scope, converts it to a Scope with `policy.at()`, passes
    `scope.at(name)` to its submodules, and stores the `ParamSpec`s of its own parameters.

    policy       the whole policy
    activations  the dtype of activations; None: the dtype of the inputs
    prefix       the module's path
    stored       specs of the parameters by path, for a module that is rebuilt around stored variables; None for a new
                 module, whose parameters will be initialised
    splits       how parameters and their activations are divided over a mesh, by path; None for one device, and where
                 XLA is to decide
    """

    policy: PolicyRules
    activations: np.dtype | None
    prefix: tuple[str, ...] = ()
    stored: Mapping[str, ParamSpec] | None = dataclasses.field(default=None, hash=False)
    splits: Mapping[str, Split] | None = dataclasses.field(default=None, hash=False)

    def at(self, *names: str | int) -> Scope:
        """Returns the scope of a submodule."""
        return dataclasses.replace(self, prefix=(*self.prefix, *map(str, names)))

    def path(self, name: str) -> str:
        """Returns the path of the module's own parameter `name`."""
        return "/".join((*self.prefix, name))

    def spec(self, name: str) -> ParamSpec:
        """Returns the formats of the module's own parameter `name`.

        Raises:
          InvalidPolicy: for a parameter that is not among the stored parameters.
        """
        path = self.path(name)
        if self.stored is None:
            compute, backward = (self.policy.slot(name).format(path) for name in ("compute", "backward"))
            return ParamSpec(self.policy.storage(path), compute, backward)
        if path not in self.stored:
            raise InvalidPolicy(
                f"{path}: the module has this parameter, but it is not among the stored variables. "
                "Pass the variables of the same module."
            )
        return self.stored[path]

    def split(self, name: str) -> Split | None:
        """Returns how the module's own parameter `name` is divided over a mesh, or None."""
        return None if self.splits is None else self.splits.get(self.path(name))
