"""The tokenizer of a checkpoint: text to token ids, ids to text, and chat messages to a prompt.

It runs on the packages tokenizers and jinja2, 12 MB installed, and executes no Python code of the checkpoint.
transformers uses the same two packages, adds 58 MB with its other dependencies (5.23, bytecode not counted), and can
import code from checkpoints.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from ...policies.errors import InvalidCheckpoint, InvalidText, InvalidTokens, named, shown
from ..hub import local_folder
from .decoding import DecodeStream, checked_ids
from .files import WHOLE, Files, read_files, rust_errors

if TYPE_CHECKING:  # imported on first use: jinja2 takes 50 ms to import
    import tokenizers

    from .chat_template import ChatTemplate

_THINK_START, _THINK_END = "<think>", "</think>"


def load_tokenizer(path: str | os.PathLike[str], revision: str | None = None) -> Tokenizer:
    """Load the tokenizer of a checkpoint.

    path      a folder with `tokenizer.json`, or a name on the Hugging Face hub, as for `load_model`
    revision  a branch, tag or commit, if `path` is a name on the hub

    Raises:
      MissingFile: if the folder or name does not exist, or has no tokenizer.json.
      InvalidCheckpoint: if a file cannot be read, or two files disagree.
      UnsupportedConfig: if a part of tokenizer.json is not implemented, or larger than any family needs.
    """
    return Tokenizer(read_files(local_folder(path, revision, weights=False)))


class Tokenizer:
    """Converts text to token ids and back, and chat messages to prompts.

    eos_ids  ids that end an answer: from generation_config.json, else the id of `eos_token`; () if there is neither
    pad_id   id of the padding token, or None
    """

    def __init__(self, files: Files):
        self.eos_ids, self.pad_id = files.eos_ids, files.pad_id
        self._files, self._backend = files, files.backend
        self._compiled: dict[str, ChatTemplate] = {}

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including added ones; a model's embedding may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def token_id(self, token: str) -> int:
        """Return the id of one token, such as '</think>'.

        Raises:
          InvalidTokens: if the vocabulary has no such token.
        """
        try:
            number = self._backend.token_to_id(token)
        except (TypeError, UnicodeEncodeError):  # no string, or half of a surrogate pair
            number = None
        if number is None:
            raise InvalidTokens(
                f"{self._files.folder}: the vocabulary of {self.vocab_size} tokens has no token {shown(token)}. "
                "Use `encode` for text of several tokens."
            )
        return number

    def encode(self, text: str, *, add_special_tokens: bool = True, max_length: int | None = None) -> list[int]:
        """Return the token ids of `text`, as `tokenizer(text)["input_ids"]` in transformers.

        Special tokens that are spelled out in the text become those tokens.

        add_special_tokens  add what the post-processor of tokenizer.json adds: BOS for Llama, nothing for Qwen3
        max_length          cut off the end of the text, so that no more ids than these remain, added ones included;
                            None keeps the whole text

        Raises:
          InvalidText: if `text` is not a string, or contains half of a surrogate pair.
          InvalidCheckpoint: if the package tokenizers fails.
        """
        encoding = self._encoding(text, add_special_tokens)
        ids, added = encoding.ids, encoding.special_tokens_mask  # 1 for the ids that the post-processor adds
        if max_length is None or len(ids) <= max_length:
            return ids
        excess = len(ids) - max_length
        end = len(added) - added[::-1].index(0) if 0 in added else 0  # of the text
        return ids[: max(end - excess, 0)] + ids[end:]

    def encode_prompt(self, text: str) -> list[int]:
        """Return the token ids of a prompt, with BOS exactly once if the checkpoint wants one.

        Like `encode`, but if `text` already begins with the BOS token, as the output of many chat templates does, none
        is added. BOS is also added if only `add_bos_token` in tokenizer_config.json asks for it.

        Raises:
          InvalidText, InvalidCheckpoint: as for `encode`.
        """
        encoding = self._encoding(text, True)
        added = encoding.special_tokens_mask  # 1 for the ids that the post-processor adds
        start = added.index(0) if 0 in added else 0
        before, ids = encoding.ids[:start], encoding.ids[start:]
        if not before and self._files.bos_id is not None:
            before = [self._files.bos_id]
        return ids if ids[:1] == before[:1] else before + ids

    def _encoding(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        try:
            text.encode()
        except (AttributeError, UnicodeEncodeError) as error:
            raise InvalidText(
                f"expected a string that can be encoded as UTF-8, found {shown(text)}. Pass one string "
                "without unpaired surrogates."
            ) from error
        with rust_errors(f"{self._files.folder / WHOLE}: the tokenizer cannot encode {shown(text)}"):
            return self._backend.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; invalid UTF-8 becomes U+FFFD, ids outside the vocabulary are ignored.

        Raises:
          InvalidTokens: if `ids` is not a flat sequence of token ids.
        """
        checked = checked_ids(ids)
        with rust_errors(f"{self._files.folder / WHOLE}: the tokenizer cannot decode {shown(checked)}"):
            return self._backend.decode(checked, skip_special_tokens=skip_special_tokens)

    def decode_stream(self, *, skip_special_tokens: bool = True) -> DecodeStream:
        """Return a decoder that takes ids in pieces, while a model generates them."""
        return DecodeStream(self._backend, self._files.special if skip_special_tokens else ())

    @overload
    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, tokenize: Literal[False] = False, **options: Any
    ) -> str: ...

    @overload
    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, tokenize: Literal[True], **options: Any
    ) -> list[int]: ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tokenize: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str | list[int]:
        """Return the prompt that the checkpoint's chat template writes for a chat, as text or as token ids.

        As in transformers, except that `tokenize` is False and `add_generation_prompt` is True by default.

        messages                mappings with the strings `role` and `content`; an assistant's message may have
                                `tool_calls` and `reasoning_content`. Special tokens in `content` are not escaped.
        tokenize                return the ids of the prompt, without any BOS or EOS beside those the template writes
        tools                   JSON schemas of functions
        enable_thinking         variable of Qwen3's template; None leaves it undefined, and Qwen3 then thinks
        add_generation_prompt   end the prompt with the header of an assistant message
        continue_final_message  end the prompt within the last message, for the model to continue that message;
                                overrides `add_generation_prompt`
        variables               any other variables that the template reads

        Raises:
          InvalidText: if the messages have another form, or the template rejects them.
          InvalidCheckpoint: if there is no chat template, or it fails or takes too long.
          UnsupportedConfig: if it uses a part of Jinja that published templates do not use.
        """
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        prompt = self._template(tools is not None).render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )
        return self.encode(prompt, add_special_tokens=False) if tokenize else prompt

    @staticmethod
    def split_thinking(text: str, *, opened: bool = False) -> tuple[str, str]:
        """Split generated text into (thinking, answer), without the blank lines between them.

        Thinking ends at the first `</think>`. Without one, all of `text` is thinking if it begins with `<think>` or
        `opened` is true, and all of it is the answer otherwise.

        opened  the prompt ended with `<think>`, so that `text` begins inside the thinking
        """
        before, end, after = text.partition(_THINK_END)
        thinking = before.lstrip()
        if not (end or opened or thinking.startswith(_THINK_START)):
            return "", text
        return thinking.removeprefix(_THINK_START).strip("\n"), after.lstrip("\n")

    def _template(self, with_tools: bool) -> ChatTemplate:
        """Return the compiled chat template: the one named "tool_use" for tools, if there is one, else "default"."""
        from .chat_template import ChatTemplate

        templates = self._files.templates
        name = "tool_use" if with_tools and "tool_use" in templates else "default"
        if name not in templates:
            found = f"only {', '.join(map(named, templates))}" if templates else "none"
            raise InvalidCheckpoint(
                f"{self._files.folder}: expected a chat template named default, found {found}. Copy "
                "chat_template.jinja from the chat model that this one was made from, or write the prompt yourself."
            )
        if name not in self._compiled:
            text, file = templates[name]
            self._compiled[name] = ChatTemplate(text, file, self._files.tokens)
        return self._compiled[name]
