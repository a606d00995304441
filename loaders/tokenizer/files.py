"""Reader for the files of a tokenizer: `tokenizer.json` holds the tokens, the other files say what they are used for.

The files have the same precedence as in transformers: `chat_template.jinja` overrides the template in
tokenizer_config.json; special_tokens_map.json and added_tokens.json are read only if tokenizer_config.json has no
`added_tokens_decoder`; `add_bos_token` and `add_eos_token` do not change the post-processor of tokenizer.json.

tokenizer.json is used as it is, which is what `PreTrainedTokenizerFast` does. Some other classes of transformers 5,
which `AutoTokenizer` picks by `tokenizer_class`, replace its pre-tokenizer by their own: LlamaTokenizer then adds no
space to a text that begins with one, nor after a special token, and GPT2Tokenizer does not split numbers into digits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ...policies.errors import InvalidCheckpoint, MissingFile, PerparamError, named, shown
from ..fields import token_ids
from ..json_file import parse_object, read_json
from ..layout import GENERATION
from .components import check_added, check_components, check_token
from .decoding import decoding_steps

if TYPE_CHECKING:  # imported on first use, since the import takes 65 ms
    import tokenizers

WHOLE, CONFIG, SPECIAL, ADDED, TEMPLATE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)

LARGEST = 64 << 20
"""The largest tokenizer.json in bytes: Qwen3's, with 151,669 tokens, has 11 MB; 262,145 tokens take 33 MB."""

MOST_ENTRIES = 1 << 21
"""The most objects, lists, keys and values of a tokenizer.json; Llama 3's, with 280,147 merges, has 1.1 million."""

LARGEST_TEMPLATE = 1 << 16
"""The largest chat template in bytes, which jinja2 parses in half a second; published ones have up to 30,000."""

_ROLES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclasses.dataclass(frozen=True)
class Files:
    """Contents of a tokenizer's files.

    folder     the folder that holds the files
    backend    the Hugging Face tokenizer that tokenizer.json describes
    tokens     special tokens by role, such as "eos_token"
    special    all tokens that decoding can skip; one that any file declares as special stays so
    eos_ids    ids that end an answer
    pad_id     id of the padding token, or None
    bos_id     id of the BOS token if `add_bos_token` is true, else None
    templates  chat templates by name, each with the path of its file
    """

    folder: pathlib.Path
    backend: tokenizers.Tokenizer
    tokens: dict[str, str]
    special: frozenset[str]
    eos_ids: tuple[int, ...]
    pad_id: int | None
    bos_id: int | None
    templates: dict[str, tuple[str, str]]


def read_files(folder: pathlib.Path) -> Files:
    """Read the tokenizer files in `folder` and check them against each other.

    Raises:
      MissingFile: if there is no tokenizer.json.
      InvalidCheckpoint: if a file cannot be read, or two files disagree.
      UnsupportedConfig: if a part of tokenizer.json is not implemented.
    """
    backend, special = _backend(folder / WHOLE)
    config, generation = _optional(folder / CONFIG), _optional(folder / GENERATION)
    if "added_tokens_decoder" not in config:
        config = {**config, **_optional(folder / SPECIAL)}
    backend.encode_special_tokens = bool(config.get("split_special_tokens"))
    tokens = {role: _content(folder, role, config[role]) for role in _ROLES if config.get(role) is not None}
    special |= _add(folder, backend, config, tokens)
    ids = {role: token_ids(str(folder), role, backend.token_to_id(token)) for role, token in tokens.items()}
    eos, pad = (
        token_ids(str(folder / GENERATION), f"{role}_id", generation.get(f"{role}_id")) or ids.get(role, ())
        for role in ("eos_token", "pad_token")
    )
    return Files(
        folder=folder,
        backend=backend,
        tokens=tokens,
        special=frozenset(special),
        eos_ids=eos,
        pad_id=pad[0] if pad else None,
        bos_id=_bos_id(folder, config, ids),
        templates=_templates(folder, config),
    )


def _optional(path: pathlib.Path) -> Mapping[str, Any]:
    return read_json(path) if path.exists() else {}


def _bytes_of(path: pathlib.Path, largest: int) -> bytes:
    """Return the contents of a file of at most `largest` bytes."""
    try:
        if not path.is_file():  # reading a pipe would block
            raise InvalidCheckpoint(f"{path}: expected a regular file. Download it again.")
        with open(path, "rb") as file:
            data = file.read(largest + 1)
    except OSError as error:
        raise InvalidCheckpoint(f"{path}: cannot be read: {error}.") from error
    if len(data) > largest:
        raise InvalidCheckpoint(f"{path}: larger than the limit of {largest >> 10} KiB. Download it again.")
    return data


def _backend(path: pathlib.Path) -> tuple[tokenizers.Tokenizer, set[str]]:
    """Return the tokenizer that a tokenizer.json describes, and the tokens that it declares as special ones."""
    import tokenizers

    if not path.exists():
        raise MissingFile(
            f"{path}: this file does not exist. perparam reads tokenizers only from tokenizer.json, not from "
            "vocab.json, merges.txt or tokenizer.model. Download it, or write it with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    data = _bytes_of(path, LARGEST)
    try:
        if data.count(b",") > MOST_ENTRIES:
            raise ValueError(f"more than {MOST_ENTRIES} entries of JSON")
        whole = parse_object(data, LARGEST, MOST_ENTRIES)
    except ValueError as error:
        raise InvalidCheckpoint(f"{path}: not readable as a tokenizer: {error}. Download it again.") from error
    check_components(str(path), whole)
    added = whole.get("added_tokens") or []
    with rust_errors(f"{path}: not readable as a tokenizer"):
        backend = tokenizers.Tokenizer.from_buffer(data)
    # tokenizers numbers added tokens consecutively, and only logs a warning if the file gives another id.
    for token in added:
        _same_id(path, backend, token["content"], token["id"])
    decoding_steps(backend, str(path))  # refuses unknown decoders
    # Texts are neither truncated nor padded by default, as in transformers.
    backend.no_truncation()
    backend.no_padding()
    return backend, {token["content"] for token in added if token.get("special")}


@contextlib.contextmanager
def rust_errors(what: str) -> Iterator[None]:
    """Turn an exception or a panic of the package tokenizers into an error that begins with `what`."""
    try:
        yield
    except BaseException as error:
        # A panic is a subclass of BaseException that has no public name.
        if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise InvalidCheckpoint(f"{what}: {error}. Download it again.") from error


def _same_id(path: pathlib.Path, backend: tokenizers.Tokenizer, content: str, number: int) -> None:
    """Check that a token that `path` declares has the same id in the tokenizer."""
    if (found := backend.token_to_id(content)) != number:
        raise InvalidCheckpoint(
            f"{path}: {named(content)} is declared as token {number}, but its id in {WHOLE} is {found}. "
            "Download both again."
        )


def _content(folder: pathlib.Path, key: str, token: Any) -> str:
    """Return the text of a special token, which a config writes as a string or as an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    check_token(str(folder / CONFIG), key, text)
    return str(text)


def _add(
    folder: pathlib.Path, backend: tokenizers.Tokenizer, config: Mapping[str, Any], roles: dict[str, str]
) -> set[str]:
    """Add the tokens that tokenizer.json lacks, with the ids that the files give, and return the special ones."""
    from tokenizers import AddedToken

    more = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    if not isinstance(more, list):
        raise InvalidCheckpoint(
            f"{folder / CONFIG}: additional_special_tokens: expected a list of tokens, found {shown(more)}. "
            "Download the file again."
        )
    special = [*roles.values(), *(_content(folder, "additional_special_tokens", token) for token in more)]
    check_added(str(folder / CONFIG), [(content, 0) for content in special])
    path, declared = _declared(folder, config, special)
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    with rust_errors(f"{path}: the added tokens cannot be used"):
        backend.add_tokens([token for _, token in declared if repr(token) not in known])
    for number, token in declared:
        _same_id(path, backend, token.content, number)
    contents = {token.content for token in backend.get_added_tokens_decoder().values()}
    for content in special:
        if backend.token_to_id(content) is None:
            raise InvalidCheckpoint(
                f"{folder / CONFIG}: the special token {named(content)} is not in {WHOLE}. Download both again."
            )
    ordinary = [content for content in dict.fromkeys(special) if content not in contents]
    backend.add_special_tokens([AddedToken(content, special=True) for content in ordinary])
    return {*ordinary, *(token.content for _, token in declared if token.special)}


def _declared(
    folder: pathlib.Path, config: Mapping[str, Any], special: list[str]
) -> tuple[pathlib.Path, list[tuple[int, tokenizers.AddedToken]]]:
    """Return the path of the file that declares added tokens, and the tokens with their ids, sorted by id."""
    from tokenizers import AddedToken

    path, given = folder / CONFIG, config.get("added_tokens_decoder")
    if given is None:
        path = folder / ADDED
        given = {
            number: {"content": content, "special": content in special, "normalized": content not in special}
            for content, number in _ids(path).items()
        }
    try:
        tokens = {int(number): entry for number, entry in given.items()}
        check_added(str(path), [(entry["content"], number) for number, entry in tokens.items()])
        found = [
            (number, AddedToken(entry["content"], **{flag: entry[flag] for flag in _FLAGS if flag in entry}))
            for number, entry in tokens.items()
        ]
    except PerparamError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise InvalidCheckpoint(
            f"{path}: the added tokens cannot be read: {shown(error)}. Download the file again."
        ) from error
    return path, sorted(found, key=lambda one: one[0])


def _ids(path: pathlib.Path) -> Mapping[str, int]:
    """Return the contents of an added_tokens.json, which maps tokens to their ids."""
    ids = _optional(path)
    check_added(str(path), list(ids.items()))
    if len(set(ids.values())) != len(ids):
        raise InvalidCheckpoint(f"{path}: two tokens have the same id. Download the file again.")
    return ids


def _bos_id(folder: pathlib.Path, config: Mapping[str, Any], ids: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return the id of the BOS token if `add_bos_token` asks for one, else None."""
    wanted = config.get("add_bos_token")
    if not (wanted is None or isinstance(wanted, bool)):
        raise InvalidCheckpoint(
            f"{folder / CONFIG}: add_bos_token: expected true or false, found {shown(wanted)}. Correct the file."
        )
    return ids["bos_token"][0] if wanted and "bos_token" in ids else None


def _templates(folder: pathlib.Path, config: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the chat templates by name, each with the path of its file."""
    if (path := folder / TEMPLATE).exists():
        try:
            return {"default": (_bytes_of(path, LARGEST_TEMPLATE).decode(), str(path))}
        except UnicodeDecodeError as error:
            raise InvalidCheckpoint(f"{path}: not UTF-8: {error}. Download it again.") from error
    path, given = folder / CONFIG, config.get("chat_template")
    if given is None:
        return {}
    listed = given if isinstance(given, list) else [{"name": "default", "template": given}]
    for entry in listed:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("name", "template")):
            raise InvalidCheckpoint(
                f"{path}: chat_template: expected a string, or a list of objects with name and template, found "
                f"{shown(given)}. Download the file again."
            )
        if len(entry["template"]) > LARGEST_TEMPLATE:
            raise InvalidCheckpoint(
                f"{path}: chat_template: larger than the limit of {LARGEST_TEMPLATE >> 10} KiB. Download it again."
            )
    return {entry["name"]: (entry["template"], str(path)) for entry in listed}
