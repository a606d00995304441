"""The exceptions of perparam.

Every message says where the problem is (the path, or the file and line), the current value, the expected value and the
remedy.  Every class derives from `PerparamError` and from a builtin exception, so that `except ValueError` keeps
working.
"""

from __future__ import annotations

_MAX_CHARACTERS = 8000


class PerparamError(Exception):
    """Base class of the exceptions of perparam.

    `str(error)` escapes every control character except newlines, and truncates a message of more than 8,000 characters,
    since messages quote text from files that are not trusted.
    """

    def __str__(self) -> str:
        text = Exception.__str__(self)
        if len(text) > _MAX_CHARACTERS:
            text = f"{text[: _MAX_CHARACTERS // 2]}… ({len(text)} characters) …{text[-_MAX_CHARACTERS // 4 :]}"
        return "\n".join(map(printable, text.split("\n")))


def printable(text: str) -> str:
    """Returns `text` with every character that is not printable escaped, such as those that a terminal obeys."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: object) -> str:
    """Returns the repr of `value` for an error message, truncated to 150 characters if it has more than 200."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:150]}… ({len(text)} characters)"


def named(name: str) -> str:
    """Returns `name` for an error message, with quotes only if it is empty, long or not printable."""
    return name if name.isprintable() and 0 < len(name) <= 200 else shown(name)


def count(number: int, noun: str) -> str:
    """Returns `number` and `noun`, with a plural s where it is needed: 1 parameter, 2 parameters."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


class UnknownDtype(PerparamError, ValueError):
    """A name is not the name of a dtype, or a dtype is not allowed in this place."""


class InvalidPolicy(PerparamError, ValueError):
    """A policy is not valid: its YAML, a pattern, a slot, a block or the name of a preset."""


class UnmatchedRule(InvalidPolicy):
    """A rule matches no parameter."""


class ShadowedRule(InvalidPolicy):
    """A rule has no effect: earlier rules match every parameter that it matches."""


class UnpairedScale(PerparamError, ValueError):
    """A narrow parameter has no scales, or scales have no narrow parameter."""


class InvalidScale(PerparamError, ValueError):
    """The grid of scales does not fit the kernel, or a scale is not a positive finite number."""


class UnsupportedCast(PerparamError, TypeError):
    """An operation does not support a cast, or the dtypes, shapes or container of its arguments."""


class InvalidGradients(PerparamError, ValueError):
    """Gradients, or the state of an optimizer, do not fit the parameters."""


class InvalidCheckpoint(PerparamError, ValueError):
    """The files of a checkpoint are damaged, incomplete or inconsistent."""


class UnsupportedConfig(PerparamError, ValueError):
    """The config of a model has a field or value that perparam does not implement."""


class MissingFile(PerparamError, FileNotFoundError):
    """A file or folder does not exist."""


class UnsupportedTask(PerparamError, TypeError):
    """A function needs another head than the model has."""


class InvalidTokens(PerparamError, ValueError):
    """Token ids or an attention mask are not valid for the model."""


class UnknownTarget(PerparamError, ValueError):
    """A name is not the name of a compilation target."""


class UnknownImplementation(PerparamError, KeyError):
    """A name is not the name of an implementation of the matmul."""


class InvalidSharding(PerparamError, ValueError):
    """A parameter cannot have the requested sharding."""


class UnsupportedExport(PerparamError, ValueError):
    """A file format cannot represent the parameters."""


class SaveFailed(PerparamError, OSError):
    """Files could not be written; the incomplete files were removed."""


class InvalidSize(PerparamError, ValueError):
    """A size is not a number of bytes."""


class InvalidSampling(PerparamError, ValueError):
    """A sampling parameter is out of range."""


class InvalidText(PerparamError, ValueError):
    """Text or chat messages cannot be tokenised."""


class MissingPackage(PerparamError, ImportError):
    """An optional dependency is not installed."""
