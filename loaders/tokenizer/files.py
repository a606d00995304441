"""Reader for the files of a tokenizer: `tokenizer.json` holds the tokens, the other files say what they are used for.

The files have the same precedence as in transformers: `chat_template.jinja` overrides the template in
tokenizer_config.json; special_tokens_map.json and added_tokens.json are read only if tokenizer_config.json has no
`added_tokens_decoder`; `add_bos_token` and `add_eos_token` do not change the post-processor of tokenizer.json.

tokenizer.json is used as it is, which is what `PreTrainedTokenizerFast` does. Some other classes of transformers 5,
which `AutoTokenizer` picks by `tokenizer_class`, replace its pre-tokenizer by their own: LlamaTokenizer then adds no
space to a text that begins with one, nor after a special token, and GPT2Tokenizer does not split numbers into digits.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...policies.errors import InvalidCheckpoint, MissingFile, UnsupportedConfig, named, shown
from ..fields import token_ids
from ..json_file import read_json
from ..layout import GENERATION
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

LARGEST_TEMPLATE = 1 << 20
"""The largest chat template in bytes; published ones have up to 30,000."""

_ROLES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclasses.dataclass(frozen=True)
class Files:
    """Contents of a tokenizer's files.

    folder     the folder that holds the files
    backend    the Hugging Face tokenizer that tokenizer.json describes
    tokens     special tokens by role, such as "eos_token"
    eos_ids    ids that end an answer
    pad_id     id of the padding token, or None
    bos_id     id of the BOS token if `add_bos_token` is true, else None
    templates  chat templates by name, each with the path of its file
    """

    folder: pathlib.Path
    backend: tokenizers.Tokenizer
    tokens: dict[str, str]
    eos_ids: tuple[int, ...]
    pad_id: int | None
    bos_id: int | None
    templates: dict[str, tuple[str, str]]


def read_files(folder: pathlib.Path) -> Files:
    """Read the tokenizer files in `folder` and check them against each other.

    Raises:
      MissingFile: if there is no tokenizer.json.
      InvalidCheckpoint: if a file cannot be read, or two files disagree.
      UnsupportedConfig: if the decoder or an option in tokenizer_config.json is not implemented.
    """
    backend = _backend(folder / WHOLE)
    config, generation = _optional(folder / CONFIG), _optional(folder / GENERATION)
    if "added_tokens_decoder" not in config:
        config = {**config, **_optional(folder / SPECIAL)}
    _refuse_cleanup(folder, backend, config)
    backend.encode_special_tokens = bool(config.get("split_special_tokens"))
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
        raise InvalidCheckpoint(f"{path}: larger than the limit of {largest >> 20} MiB. Download it again.")
    return data


def _backend(path: pathlib.Path) -> tokenizers.Tokenizer:
    """Return the tokenizer that a tokenizer.json describes."""
    import tokenizers

    if not path.exists():
        raise MissingFile(
            f"{path}: this file does not exist. perparam reads tokenizers only from tokenizer.json, not from "
            "vocab.json, merges.txt or tokenizer.model. Download it, or write it with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    data = _bytes_of(path, LARGEST)
    try:
        backend = tokenizers.Tokenizer.from_buffer(data)
        declared = [(token["content"], token["id"]) for token in json.loads(data).get("added_tokens") or ()]
    except BaseException as error:
        if not failed_in_rust(error):
            raise
        raise InvalidCheckpoint(f"{path}: not readable as a tokenizer: {error}. Download it again.") from error
    # tokenizers numbers added tokens consecutively, and only logs a warning if the file gives another id.
    for content, number in declared:
        _same_id(path, backend, content, number)
    decoding_steps(backend, str(path))  # refuses unknown decoders
    # Texts are neither truncated nor padded by default, as in transformers.
    backend.no_truncation()
    backend.no_padding()
    return backend


def failed_in_rust(error: BaseException) -> bool:
    """Return whether the package tokenizers raised `error`, as an exception or as a Rust panic."""
    # A panic is a subclass of BaseException that has no public name.
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _same_id(path: pathlib.Path, backend: tokenizers.Tokenizer, content: str, number: int) -> None:
    """Check that a token that `path` declares has the same id in the tokenizer."""
    if (found := backend.token_to_id(content)) != number:
        raise InvalidCheckpoint(
            f"{path}: {named(content)} is declared as token {number}, but its id in {WHOLE} is {found}. "
            "Download both again."
        )


def _refuse_cleanup(folder: pathlib.Path, backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Refuse the option that makes transformers remove spaces before punctuation; it has no effect on BPE models."""
    kind = type(backend.model).__name__
    if config.get("clean_up_tokenization_spaces") and kind != "BPE":
        raise UnsupportedConfig(
            f"{folder / CONFIG}: clean_up_tokenization_spaces is not implemented for {kind} models. Set it to false, "
            "and decoded text keeps the spaces before punctuation."
        )


def _content(folder: pathlib.Path, key: str, token: Any) -> str:
    """Return the text of a special token, which a config writes as a string or as an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) or not text:
        raise InvalidCheckpoint(
            f"{folder / CONFIG}: {key}: expected the text of a token, found {shown(token)}. Download the file again."
        )
    return text


def _add(folder: pathlib.Path, backend: tokenizers.Tokenizer, config: Mapping[str, Any], roles: dict[str, str]) -> None:
    """Add the special tokens that tokenizer.json lacks, or has as ordinary tokens, with the ids that the files give."""
    from tokenizers import AddedToken

    more = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    if not isinstance(more, list):
        raise InvalidCheckpoint(
            f"{folder / CONFIG}: additional_special_tokens: expected a list of tokens, found {shown(more)}. "
            "Download the file again."
        )
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
            raise InvalidCheckpoint(
                f"{folder / CONFIG}: the special token {named(content)} is not in {WHOLE}. Download both again."
            )
        if content not in contents:
            backend.add_special_tokens([AddedToken(content, special=True)])


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
            for content, number in _optional(path).items()
        }
    try:
        found = [
            (int(number), AddedToken(entry["content"], **{flag: entry[flag] for flag in _FLAGS if flag in entry}))
            for number, entry in given.items()
        ]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise InvalidCheckpoint(
            f"{path}: the added tokens cannot be read: {error!r}. Download the file again."
        ) from error
    return path, sorted(found, key=lambda one: one[0])


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
                f"{path}: chat_template: larger than the limit of {LARGEST_TEMPLATE >> 20} MiB. Download it again."
            )
    return {entry["name"]: (entry["template"], str(path)) for entry in listed}
