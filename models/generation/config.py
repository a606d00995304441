"""Settings of a generation, as one value."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ...policies.errors import InvalidSampling, InvalidTokens, shown
from ..config import DecoderConfig
from .sampling import GREEDY, Sampling


@dataclasses.dataclass(frozen=True, eq=False)  # arrays among the fields have no single truth value
class GenerationConfig:
    """Settings of a generation.

    max_new_tokens        tokens to generate for each row at most
    eos_token_id          an id or several that end a row; None: those of the model's config; (): nothing ends a row
    sampling              how tokens are drawn; by default the most likely one is taken
    key                   an integer or a JAX key, or one for each row: a row with its own key gets the same answer in
                          any batch
    num_return_sequences  answers to each prompt
    logprobs              number of most likely tokens to return at each place, with their log-probabilities, besides
                          that of the drawn token; None: no log-probabilities at all

    Raises:
      InvalidTokens: a count that is not an integer or is out of range.
      InvalidSampling: `sampling` is not a `Sampling`.
    """

    max_new_tokens: int = 20
    _: dataclasses.KW_ONLY
    eos_token_id: ArrayLike | None = None
    sampling: Sampling = GREEDY
    key: Any = 0
    num_return_sequences: int = 1
    logprobs: int | None = None

    def __post_init__(self) -> None:
        checked_count("max_new_tokens", self.max_new_tokens, 0)
        checked_count("num_return_sequences", self.num_return_sequences, 1)
        if not isinstance(self.sampling, Sampling):
            raise InvalidSampling(f"sampling: expected a Sampling, found {shown(self.sampling)}.")
        if self.logprobs is not None:
            checked_count("logprobs", self.logprobs, 0)

    def end_ids(self, config: DecoderConfig) -> np.ndarray:
        """The ids that end a row, (count,) int32.

        Raises:
          InvalidTokens: ids that are not integers in range.
        """
        try:
            ids = np.atleast_1d(np.asarray(config.eos_token_id if self.eos_token_id is None else self.eos_token_id))
        except ValueError:  # rows of different length
            ids = np.full(1, np.nan)
        integers = ids.size == 0 or np.issubdtype(ids.dtype, np.integer)
        if ids.ndim != 1 or not integers or not ((ids >= 0) & (ids < 2**31)).all():
            raise InvalidTokens(f"eos_token_id: expected a token id or several, found {self.eos_token_id!r}.")
        return ids.astype(np.int32)

    def pad_id(self, config: DecoderConfig) -> int:
        """The id that fills a row after its end: the config's, or else the first id that ends a row, or else 0."""
        if config.pad_token_id is not None:
            return config.pad_token_id
        ends = self.end_ids(config)
        return int(ends[0]) if ends.size else 0


def checked_count(name: str, value: Any, least: int, most: int = 2**30) -> int:
    """`value` as an integer from `least` to `most`.

    Raises:
      InvalidTokens: any other value.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= most:
        too_large = isinstance(value, (int, np.integer)) and value > most
        limits = f"from {least} to {most}" if too_large else f"of {least} or more"
        raise InvalidTokens(f"{name}: expected an integer {limits}, found {value!r}.")
    return int(value)
