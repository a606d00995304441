"""The files of a tokenizer, checked against each other: `tokenizer.json` has the tokens, others say what they are for.

They are read as transformers reads them: `chat_template.jinja` goes before the template in tokenizer_config.json, and
special_tokens_map.json and added_tokens.json count where tokenizer_config.json has no `added_tokens_decoder`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...models.config_json import token_ids
from ...models.json_file import read_json
from ...policies.errors import InvalidCheckpoint, MissingFile, UnsupportedConfig, named, shown
from ..checkpoint import GENERATION

if TYPE_CHECKING:  # imported where it is used: it takes a fifteenth of a second
    import tokenizers

WHOLE, CONFIG, SPECIAL, ADDED, TEMPLATE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)

LARGEST = 64 << 20
"""Bytes of a tokenizer.json: that of Qwen3, of 151,669 tokens, has 11 MB, and a vocabulary of 262,145 takes 33 MB."""

LARGEST_TEMPLATE = 1 << 20
"""Bytes; published ones have up to 30,000."""

_ROLES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclasses.dataclass(frozen=True)
class Files:
    """What a tokenizer's files say.

    folder     where they are
    backend    the tokens
    tokens     special tokens by what they are for, such as "eos_token"
    eos_ids    what ends an answer
    pad_id     what pads, or None
    around     ids before and after a text; None leaves it to the backend
    templates  chat templates by name, with the file each is of
    """

    folder: pathlib.Path
    backend: tokenizers.Tokenizer
    tokens: dict[str, str]
    eos_ids: tuple[int, ...]
    pad_id: int | None
    around: tuple[tuple[int, ...], tuple[int, ...]] | None
    templates: dict[str, tuple[str, str]]


def read_files(folder: pathlib.Path) -> Files:
    """The tokenizer in `folder`.

    Raises:
      MissingFile: where there is no tokenizer.json.
      InvalidCheckpoint: for files that cannot be read, or disagree.
      UnsupportedConfig: for a tokenizer that is not a byte-level one.
    """
    backend = _backend(folder / WHOLE)
    config, generation = _optional(folder / CONFIG), _optional(folder / GENERATION)
    if "added_tokens_decoder" not in config:
        config = {**config, **_optional(folder / SPECIAL)}
    tokens = {role: _content(folder, role, config[role]) for role in _ROLES if config.get(role) is not None}
    _add(folder, backend, config, tokens)
    ids = {role: token_ids(str(folder), role, backend.token_to_id(token)) for role, token in tokens.items()}
    eos, pad = (
        token_ids(str(folder / GENERATION), f"{role}_id", generation.get(f"{role}_id")) or ids.get(role, ())
        for role in ("eos_token", "pad_token")
    )
    return Files(
        folder=folder,
        backend=backend,
        tokens=tokens,
        eos_ids=eos,
        pad_id=pad[0] if pad else None,
        around=_around(folder, config, ids),
        templates=_templates(folder, config),
    )


def _optional(path: pathlib.Path) -> Mapping[str, Any]:
    return read_json(path) if path.exists() else {}


def _bytes_of(path: pathlib.Path, largest: int) -> bytes:
    try:
        if not path.is_file():  # a pipe would be waited for
            raise InvalidCheckpoint(f"{path}: this is no file. Fetch it again.")
        with open(path, "rb") as file:
            data = file.read(largest + 1)
    except OSError as error:
        raise InvalidCheckpoint(f"{path}: cannot be read: {error}.") from error
    if len(data) > largest:
        raise InvalidCheckpoint(f"{path}: more than {largest >> 20} MiB. Fetch it again.")
    return data


def _backend(path: pathlib.Path) -> tokenizers.Tokenizer:
    import tokenizers

    if not path.exists():
        raise MissingFile(
            f"{path}: there is no such file, and it is what is read of a tokenizer, not vocab.json and merges.txt. "
            "Fetch it, or write it with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    data = _bytes_of(path, LARGEST)
    try:
        backend = tokenizers.Tokenizer.from_buffer(data)
        declared = [(token["content"], token["id"]) for token in json.loads(data).get("added_tokens") or ()]
    except BaseException as error:
        # A panic in Rust is no Exception, and has no public name.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InvalidCheckpoint(f"{path}: not readable as a tokenizer: {error}. Fetch it again.") from error
    # tokenizers numbers added tokens in turn, and only logs where the file says otherwise.
    for content, number in declared:
        _same_id(path, backend, content, number)
    if (kind := type(backend.decoder).__name__) != "ByteLevel":
        raise UnsupportedConfig(f"{path}: decoder {kind} is not implemented. That of Qwen3 is ByteLevel.")
    # Texts are never cut or filled up unasked, as in transformers.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _same_id(path: pathlib.Path, backend: tokenizers.Tokenizer, content: str, number: int) -> None:
    if (found := backend.token_to_id(content)) != number:
        raise InvalidCheckpoint(
            f"{path}: {named(content)} is token {number}, but {WHOLE} makes it {found}. Fetch both again."
        )


def _content(folder: pathlib.Path, key: str, token: Any) -> str:
    """The text of a special token, which may be written as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) or not text:
        raise InvalidCheckpoint(f"{folder / CONFIG}: {key}: expected a token's text, found {shown(token)}.")
    return text


def _add(folder: pathlib.Path, backend: tokenizers.Tokenizer, config: Mapping[str, Any], roles: dict[str, str]) -> None:
    """Adds the tokens that tokenizer.json lacks, or has as ordinary ones, under the ids that the files say."""
    from tokenizers import AddedToken

    more = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    if not isinstance(more, list):
        raise InvalidCheckpoint(f"{folder / CONFIG}: additional_special_tokens: expected a list, found {shown(more)}.")
    special = [*roles.values(), *(_content(folder, "additional_special_tokens", token) for token in more)]
    path, declared = _declared(folder, config, special)
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    for number, token in declared:
        if repr(token) not in known:
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        _same_id(path, backend, token.content, number)
    contents = {token.content for token in backend.get_added_tokens_decoder().values()}
    for content in dict.fromkeys(special):
        if backend.token_to_id(content) is None:
            raise InvalidCheckpoint(f"{folder / CONFIG}: {named(content)} is no token of {WHOLE}. Fetch both again.")
        if content not in contents:
            backend.add_special_tokens([AddedToken(content, special=True)])


def _declared(
    folder: pathlib.Path, config: Mapping[str, Any], special: list[str]
) -> tuple[pathlib.Path, list[tuple[int, tokenizers.AddedToken]]]:
    """The file that declares added tokens, and they with their ids, in the order of those."""
    from tokenizers import AddedToken

    path, given = folder / CONFIG, config.get("added_tokens_decoder")
    if given is None:
        path = folder / ADDED
        given = {
            number: {"content": content, "special": content in special, "normalized": content not in special}
            for content, number in _optional(path).items()
        }
    try:
        found = [
            (int(number), AddedToken(entry["content"], **{flag: entry[flag] for flag in _FLAGS if flag in entry}))
            for number, entry in given.items()
        ]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise InvalidCheckpoint(f"{path}: added tokens: not readable: {error!r}. Fetch the file again.") from error
    return path, sorted(found, key=lambda one: one[0])


def _around(
    folder: pathlib.Path, config: Mapping[str, Any], ids: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Where the config says what to add to a text, that and no more is added."""
    says = [config.get("add_bos_token"), config.get("add_eos_token")]
    for add in says:
        if not (add is None or isinstance(add, bool)):
            raise InvalidCheckpoint(
                f"{folder / CONFIG}: add_bos_token, add_eos_token: expected true or false, found {shown(add)}."
            )
    if says == [None, None]:
        return None
    return (ids.get("bos_token", ()) if says[0] else (), ids.get("eos_token", ()) if says[1] else ())


def _templates(folder: pathlib.Path, config: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    if (path := folder / TEMPLATE).exists():
        try:
            return {"default": (_bytes_of(path, LARGEST_TEMPLATE).decode(), str(path))}
        except UnicodeDecodeError as error:
            raise InvalidCheckpoint(f"{path}: not UTF-8: {error}. Fetch it again.") from error
    path, given = folder / CONFIG, config.get("chat_template")
    if given is None:
        return {}
    listed = given if isinstance(given, list) else [{"name": "default", "template": given}]
    for entry in listed:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("name", "template")):
            raise InvalidCheckpoint(
                f"{path}: chat_template: expected text, or a list of name and template, found {shown(given)}."
            )
        if len(entry["template"]) > LARGEST_TEMPLATE:
            raise InvalidCheckpoint(f"{path}: chat_template: more than {LARGEST_TEMPLATE >> 20} MiB. Fetch it again.")
    return {entry["name"]: (entry["template"], str(path)) for entry in listed}
