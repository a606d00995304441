"""Checks of a tokenizer.json before the package tokenizers reads it: which parts it has, and how large they are.

The package trusts its file: some files make it allocate gigabytes, loop for hours, or end the process. So a tokenizer
may have only the parts that the supported families use. Encoding gives at most 192 tokens for each character, and 256
more: NFC writes a character as 3, Prepend, Metaspace and ByteLevel each add one to a character, a character has 4
bytes, and ByteLevel writes a byte as 2.

    normalizer      NFC, Prepend of one character, Replace of one string by another that is not longer
    pre-tokenizer   ByteLevel, Digits, Metaspace, Punctuation, Split by a string or a pattern of `split_patterns`
    model           BPE
    post-processor  ByteLevel, TemplateProcessing
    decoder         ByteLevel, ByteFallback, Fuse, Metaspace, Replace, Strip

and a Sequence of those. `decoding` restricts the order of the decoder's steps further.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...policies.errors import named, shown
from ..fields import Fields
from .split_patterns import takes_linear_time

MOST_STEPS = 16
"""Steps of a Sequence, and pieces of a template; published ones have up to 5."""

LONGEST_STRING = 16
"""Characters of a string that a step replaces or adds; published ones have up to 4."""

LONGEST_TOKEN, MOST_ADDED, LONGEST_ADDED = 512, 1 << 16, 1 << 20
"""Characters of an added token, added tokens, and characters of all of them, of which each takes 75 bytes of memory.
Published tokenizers have up to 7,000 added tokens of up to 60 characters."""

_REMEDY = "If you trust this checkpoint, use transformers for its tokenizer."


def check_components(name: str, whole: Mapping[str, Any]) -> None:
    """Check the contents of a tokenizer.json.

    name  its path, for errors

    Raises:
      UnsupportedConfig: for a part or a size that no supported family uses.
      InvalidCheckpoint: for a field of the wrong type.
    """
    fields = Fields(name, whole)
    for key, steps in _STEPS.items():
        if whole.get(key) is not None:
            _component(fields, key, whole[key], steps)
    added = fields.get("added_tokens", list, [])
    for token in added:
        if not isinstance(token, dict):
            raise fields.invalid(f"added_tokens: expected objects, found {shown(token)}.")
    check_added(name, [(token.get("content"), token.get("id")) for token in added])
    vocabulary = _model(fields.within("model"))
    known = {**vocabulary, **{token["content"]: token["id"] for token in added}}
    _templates(fields, whole.get("post_processor"), known)


def check_added(name: str, tokens: list[tuple[Any, Any]]) -> None:
    """Check added tokens, given as (content, id).

    Raises:
      UnsupportedConfig: if they are too many or too long.
      InvalidCheckpoint: if a token is no text of at least one character, or an id no token id.
    """
    fields, total = Fields(name, {}), 0
    for content, number in tokens:
        check_token(name, "the content of an added token", content)
        if type(number) is not int or not 0 <= number < 2**31:
            raise fields.invalid(
                f"the id of the added token {shown(content)}: expected an integer from 0 to 2**31 - 1, found "
                f"{shown(number)}. Download the file again."
            )
        total += len(content)
    if len(tokens) > MOST_ADDED or total > LONGEST_ADDED:
        raise fields.unsupported(
            f"expected at most {MOST_ADDED} added tokens of {LONGEST_ADDED} characters in all, found {len(tokens)} of "
            f"{total}. {_REMEDY}"
        )


def check_token(name: str, what: str, content: Any) -> None:
    """Check the text of an added token.

    Raises:
      InvalidCheckpoint: if it is not text that UTF-8 can encode, of 1 to `LONGEST_TOKEN` characters.
    """
    fields = Fields(name, {})
    if not isinstance(content, str) or not content or len(content) > LONGEST_TOKEN:
        raise fields.invalid(
            f"{what}: expected the text of a token, of 1 to {LONGEST_TOKEN} characters, found {shown(content)}. "
            "Download the file again."
        )
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise fields.invalid(f"{what}: half of a surrogate pair in {shown(content)}. Download the file again.")


# Steps of the normalizer, pre-tokenizer, post-processor and decoder.

Check = Callable[[Fields], str | None]
"""A check of one step: what is wrong with its fields, or None."""


def _component(fields: Fields, key: str, value: Any, checks: Mapping[str, Check]) -> None:
    """Check the step `value`, or each step if it is a Sequence."""
    steps, part = [value], key
    if isinstance(value, dict) and value.get("type") == "Sequence":
        listed, part = _LISTED[key], f"{key}: step"
        steps = Fields(fields.name, value).get(listed, list, [])
        if len(steps) > MOST_STEPS:
            raise fields.unsupported(f"{key}: expected at most {MOST_STEPS} steps, found {len(steps)}. {_REMEDY}")
    for step in steps:
        if not isinstance(step, dict) or not isinstance(step.get("type"), str):
            raise fields.invalid(f"{part}: expected an object with a type, found {shown(step)}. Download it again.")
        kind = step["type"]
        if kind not in checks:
            raise fields.unsupported(
                f"{part} {named(kind)} is not implemented here. Supported are {', '.join(checks)}, and a Sequence of "
                f"those. {_REMEDY}"
            )
        if kind in _ONCE and [other for other in steps if isinstance(other, dict) and other.get("type") == kind][1:]:
            raise fields.unsupported(f"{part} {kind}: expected it once, found it again. {_REMEDY}")
        if problem := checks[kind](Fields(fields.name, step)):
            raise fields.unsupported(f"{part} {kind}: {problem}. {_REMEDY}")


_ONCE = ("ByteLevel", "Metaspace", "Prepend", "TemplateProcessing")
"""Steps that can make text longer; 16 steps of ByteLevel would make it 65,536 times as long."""


def _string(what: str, text: Any, least: int = 1) -> str | None:
    if isinstance(text, str) and least <= len(text) <= LONGEST_STRING:
        return None
    return f"{what}: expected {least} to {LONGEST_STRING} characters, found {shown(text)}"


def _nothing(_: Fields) -> None:
    return None


def _replace(step: Fields) -> str | None:
    pattern: Any = step.values.get("pattern")
    content: Any = step.values.get("content")
    text: Any = pattern.get("String") if isinstance(pattern, dict) and len(pattern) == 1 else None
    if problem := _string("pattern: String", text) or _string("content", content, 0):
        return problem
    if len(content) > len(text):
        return f"content: expected at most the {len(text)} characters of the pattern, found {shown(content)}"
    return None


def _split(step: Fields) -> str | None:
    pattern = step.values.get("pattern")
    if not isinstance(pattern, dict) or len(pattern) != 1:
        return f"pattern: expected a String or a Regex, found {shown(pattern)}"
    if "String" in pattern:
        return _string("pattern: String", pattern["String"])
    regex = pattern.get("Regex")
    if isinstance(regex, str) and takes_linear_time(regex):
        return None
    return f"pattern: the regular expression {shown(regex)} may take more than linear time"


def _character(key: str, step: Fields) -> str | None:
    text = step.values.get(key)
    return None if isinstance(text, str) and len(text) == 1 else f"{key}: expected one character, found {shown(text)}"


def _strip(step: Fields) -> str | None:
    for key in ("start", "stop"):
        if not 0 <= step.get(key, int, 0) <= LONGEST_STRING:
            return f"{key}: expected 0 to {LONGEST_STRING}, found {step.values[key]}"
    return _string("content", step.values.get("content"))


_LISTED = {
    "normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors",
    "decoder": "decoders",
}  # fmt: skip
_STEPS: dict[str, dict[str, Check]] = {
    "normalizer": {
        "NFC": _nothing,
        "Prepend": lambda step: _character("prepend", step),
        "Replace": _replace,
    },
    "pre_tokenizer": {
        "ByteLevel": _nothing,
        "Digits": _nothing,
        "Punctuation": _nothing,
        "Metaspace": lambda step: _character("replacement", step),
        "Split": _split,
    },
    "post_processor": {"ByteLevel": _nothing, "TemplateProcessing": _nothing},  # see `_templates`
    "decoder": {
        "ByteLevel": _nothing,
        "ByteFallback": _nothing,
        "Fuse": _nothing,
        "Metaspace": lambda step: _character("replacement", step),
        "Replace": _replace,
        "Strip": _strip,
    },
}


# The model, and what refers to its tokens.


def _model(model: Fields) -> Mapping[str, Any]:
    """Check the model, and return its vocabulary."""
    kind = model.get("type", str)
    if kind is None:
        raise model.invalid("the model is missing, or has no type. Download the file again.")
    if kind != "BPE":
        raise model.unsupported(f"model {named(kind)} is not implemented here. Supported is BPE. {_REMEDY}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.values.get(key):
            raise model.unsupported(f"model: {key} {shown(model.values[key])} is not implemented here. {_REMEDY}")
    vocabulary = model.get("vocab", dict, {})
    unknown = model.get("unk_token", str)
    if unknown is not None and unknown not in vocabulary:
        raise model.invalid(f"model: unk_token {shown(unknown)} is not in the vocabulary. Download the file again.")
    return vocabulary


def _templates(fields: Fields, processor: Any, known: Mapping[str, Any]) -> None:
    """Check that the templates of a post-processor name tokens of the vocabulary, and are short."""
    for step in [processor, *((processor or {}).get("processors") or [])]:
        if not step or step["type"] != "TemplateProcessing":
            continue
        template = Fields(fields.name, step)
        tokens = template.get("special_tokens", dict, {})
        for side in ("single", "pair"):
            pieces = template.get(side, list, [])
            texts = [piece for piece in pieces if isinstance(piece, dict) and "Sequence" in piece]
            if len(pieces) > MOST_STEPS or len(texts) > (2 if side == "pair" else 1):
                raise fields.unsupported(
                    f"TemplateProcessing: {side}: expected each text once, in at most {MOST_STEPS} pieces, found "
                    f"{len(texts)} texts in {len(pieces)} pieces. {_REMEDY}"
                )
            for piece in pieces:
                special = piece.get("SpecialToken") if isinstance(piece, dict) else None
                if isinstance(special, dict) and special.get("id") not in tokens:
                    raise fields.invalid(
                        f"TemplateProcessing: {side}: the token {shown(special.get('id'))} is not in special_tokens. "
                        "Download the file again."
                    )
        for name, token in tokens.items():
            if not _known(token, known):
                raise fields.invalid(
                    f"TemplateProcessing: special_tokens: {shown(name)}: expected ids and tokens of the vocabulary, "
                    f"found {shown(token)}. Download the file again."
                )


def _known(token: Any, known: Mapping[str, Any]) -> bool:
    """Return whether the token of a template is one or a few tokens of the vocabulary, with their ids."""
    contents, ids = (token.get(key) if isinstance(token, dict) else None for key in ("tokens", "ids"))
    if not (isinstance(contents, list) and isinstance(ids, list) and 0 < len(contents) == len(ids) <= MOST_STEPS):
        return False
    return all(
        isinstance(content, str) and known.get(content) == number for content, number in zip(contents, ids, strict=True)
    )
