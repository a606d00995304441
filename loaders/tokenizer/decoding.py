"""Text of token ids as they come, a character that is split over tokens held back until it is whole."""

from __future__ import annotations

import codecs
import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ...policies.errors import InvalidTokens, shown

if TYPE_CHECKING:  # imported where it is used: it takes a fifteenth of a second
    import tokenizers


class DecodeStream:
    """Decodes ids as they come: all that `add` and `flush` return is together what `Tokenizer.decode` returns."""

    def __init__(self, backend: tokenizers.Tokenizer, skip_special_tokens: bool = True):
        self._backend = backend
        self._left_out = {
            token.content
            for token in backend.get_added_tokens_decoder().values()
            if token.special and skip_special_tokens
        }
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, ids: Iterable[int]) -> str:
        """The text that is certain with these ids; a character of which bytes are missing waits for them.

        Raises:
          InvalidTokens: for what are no ids.
        """
        tokens = map(self._backend.id_to_token, checked_ids(ids))
        return self._decoder.decode(
            b"".join(_bytes(token) for token in tokens if token and token not in self._left_out)
        )

    def flush(self) -> str:
        """U+FFFD for a character that stayed incomplete, or ""; the stream is as new then."""
        return self._decoder.decode(b"", final=True)


# The byte-level alphabet of GPT-2: a byte that prints is its Latin-1 character, the others follow from U+0100 on.
_PRINTED = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_BYTES = {chr(byte): byte for byte in _PRINTED} | {
    chr(0x100 + index): byte for index, byte in enumerate(sorted(set(range(256)) - set(_PRINTED)))
}


def _bytes(token: str) -> bytes:
    try:
        return bytes(map(_BYTES.__getitem__, token))
    except KeyError:  # an added token is written as it reads
        return token.encode()


def checked_ids(ids: Any) -> list[int]:
    try:
        checked = list(map(operator.index, ids.tolist() if hasattr(ids, "tolist") else ids))
    except TypeError as error:
        raise InvalidTokens(f"expected the token ids of one text, found {shown(ids)}.") from error
    if wrong := [one for one in checked if not 0 <= one < 2**32]:  # what tokenizers holds
        raise InvalidTokens(f"expected token ids from 0 on, found {shown(wrong[0])}.")
    return checked
