"""Text in, text out: a checkpoint's `tokenizer.json` over Hugging Face tokenizers, and its chat template.

With jinja2 that is 12 MB installed, and nothing of a checkpoint is run as Python. transformers does it with the same
two packages, adds 58 MB with what it requires (5.23, bytecode not counted), and can import code from checkpoints.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...policies.errors import InvalidCheckpoint, InvalidText, InvalidTokens, named, shown
from ..hub import local_folder
from .decoding import DecodeStream, checked_ids
from .files import Files, read_files

if TYPE_CHECKING:  # imported where it is used: jinja2 takes a twentieth of a second
    from .chat_template import ChatTemplate

_THINK, _THOUGHT = "<think>", "</think>"


def load_tokenizer(path: str | os.PathLike[str], revision: str | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint.

    path      a folder with `tokenizer.json`, or a name on the hub, as for `load_model`
    revision  a branch, tag or commit of a name on the hub

    Raises:
      MissingFile: where there is no such folder or name, or no tokenizer.json there.
      InvalidCheckpoint: for files that cannot be read, or disagree.
      UnsupportedConfig: for a tokenizer that is not a byte-level one.
    """
    return Tokenizer(read_files(local_folder(path, revision, weights=False)))


class Tokenizer:
    """Text to token ids and back, and chats to prompts.

    eos_ids  the ids that end an answer: those of generation_config.json, else eos_token's; () where none is named
    pad_id   the id to pad with, or None
    """

    def __init__(self, files: Files):
        self.eos_ids, self.pad_id = files.eos_ids, files.pad_id
        self._files, self._backend = files, files.backend
        self._compiled: dict[str, ChatTemplate] = {}

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included; a model's embedding may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def token_id(self, token: str) -> int:
        """The id of one token, such as '</think>'.

        Raises:
          InvalidTokens: where there is no such token.
        """
        found = self._backend.token_to_id(token)
        if found is None:
            raise InvalidTokens(f"{self._files.folder}: no token {shown(token)} among {self.vocab_size}.")
        return found

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`; what spells a special token becomes that token.

        add_special_tokens  whether to add what the checkpoint wants around a text; Qwen3 wants nothing

        Raises:
          InvalidText: for what is no text, and half a surrogate pair.
        """
        try:
            ids = self._backend.encode(text, add_special_tokens=add_special_tokens and self._files.around is None).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidText(f"expected text that UTF-8 can write, found {shown(text)}.") from error
        if add_special_tokens and self._files.around is not None:
            return [*self._files.around[0], *ids, *self._files.around[1]]
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD, ids without a token nothing.

        Raises:
          InvalidTokens: for what are no ids.
        """
        return self._backend.decode(checked_ids(ids), skip_special_tokens=skip_special_tokens)

    def decode_stream(self, *, skip_special_tokens: bool = True) -> DecodeStream:
        """What decodes ids as they come."""
        return DecodeStream(self._backend, skip_special_tokens)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt that the checkpoint's chat template makes of a chat.

        messages                mappings with `role` and `content`, both text; an assistant's may have `tool_calls` and
                                `reasoning_content`. Content is not escaped: special tokens in it count as such.
        tools                   JSON schemas of functions
        enable_thinking         as the template reads it; None leaves it unset, and then Qwen3 thinks
        add_generation_prompt   whether the prompt ends where an assistant's answer begins
        continue_final_message  whether it ends within the last message, for the model to go on; no answer is begun
        variables               what else the template reads

        Raises:
          InvalidText: for messages of another shape, and where the template refuses them.
          InvalidCheckpoint: where there is no template, or it is wrong.
        """
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        return self._template(tools is not None).render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """The ids of `chat(messages, **options)`, nothing added."""
        return self.encode(self.chat(messages, **options), add_special_tokens=False)

    @staticmethod
    def split_thinking(text: str, *, opened: bool = False) -> tuple[str, str]:
        """What a model thought and what it answered, without the blank lines between.

        Thinking ends at the first `</think>`. Where none follows, `text` is thinking if it begins with `<think>`, or
        if the prompt has `opened` it, and else the answer.
        """
        before, closed, after = text.partition(_THOUGHT)
        inside = before.lstrip()
        if not (closed or opened or inside.startswith(_THINK)):
            return "", text
        return inside.removeprefix(_THINK).strip("\n"), after.lstrip("\n")

    def _template(self, with_tools: bool) -> ChatTemplate:
        from .chat_template import ChatTemplate

        name = "tool_use" if with_tools and "tool_use" in self._files.templates else "default"
        if name not in self._files.templates:
            found = f"only {', '.join(map(named, self._files.templates))}" if self._files.templates else "none"
            raise InvalidCheckpoint(
                f"{self._files.folder}: expected a chat template, found {found}. Fetch chat_template.jinja of the "
                "model that this one was made of, or write the prompt yourself."
            )
        if name not in self._compiled:
            text, file = self._files.templates[name]
            self._compiled[name] = ChatTemplate(text, file, self._files.tokens)
        return self._compiled[name]
