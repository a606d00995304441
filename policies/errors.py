"""The errors of perparam.

Every message says where (the path, the file and line), what was found, what was expected and what to do.  All derive
from `PerparamError` and from the builtin that fits, so that `except ValueError` keeps working.
"""

from __future__ import annotations

_LONGEST = 8000  # characters


class PerparamError(Exception):
    """Base of every error that perparam raises on purpose.

    Whatever a message quotes, `str(error)` has no control character but the end of a line, and is no book.
    """

    def __str__(self) -> str:
        text = Exception.__str__(self)
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST // 2]}… ({len(text)} characters) …{text[-_LONGEST // 4 :]}"
        if text.isascii() and text.replace("\n", "").isprintable():
            return text
        return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def shown(value: object) -> str:
    """`value` as an error quotes it: its repr, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:150]}… ({len(text)} characters)"


def named(name: str) -> str:
    """A name as an error quotes it: without quotes where it is an ordinary one."""
    return name if name.isprintable() and 0 < len(name) <= 200 else shown(name)


class UnknownDtype(PerparamError, ValueError):
    """A dtype name that nobody knows, or a dtype that cannot stand where it was written."""


class InvalidPolicy(PerparamError, ValueError):
    """A policy that cannot be read: YAML, a pattern, a slot, a preset name."""


class UnmatchedRule(InvalidPolicy):
    """A rule that matches no parameter."""


class ShadowedRule(InvalidPolicy):
    """A rule whose every parameter is taken by the rules before it."""


class UnpairedScale(PerparamError, ValueError):
    """A narrow kernel without its scale, or a scale without its kernel."""


class InvalidScale(PerparamError, ValueError):
    """A grid of scales that does not fit its kernel, or a scale that is not a positive finite number."""


class UnsupportedCast(PerparamError, TypeError):
    """A cast that the operation asked for cannot do."""


class InvalidCheckpoint(PerparamError, ValueError):
    """Files that do not hold what their names, headers or config promise."""


class UnsupportedConfig(PerparamError, ValueError):
    """A field of a model's config that perparam does not implement."""


class MissingFile(PerparamError, FileNotFoundError):
    """A file or folder that is not there."""


class InvalidTokens(PerparamError, ValueError):
    """Token ids or a mask that the model cannot take."""


class UnknownTarget(PerparamError, ValueError):
    """A target of a matmul that nobody knows."""


class UnknownImplementation(PerparamError, KeyError):
    """An implementation of the matmul that nobody knows."""


class InvalidSharding(PerparamError, ValueError):
    """A sharding that a parameter cannot have."""


class UnsupportedExport(PerparamError, ValueError):
    """Parameters that a file format has no way to say."""


class SaveFailed(PerparamError, OSError):
    """Files that could not be written; nothing of them is left."""


class InvalidSize(PerparamError, ValueError):
    """What is no number of bytes."""


class InvalidSampling(PerparamError, ValueError):
    """A way of drawing tokens that is none: a value outside its range."""


class InvalidText(PerparamError, ValueError):
    """Text or messages of a chat that cannot be made into tokens."""


class MissingPackage(PerparamError, ImportError):
    """A package that something optional needs."""
