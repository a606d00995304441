"""Write the golden tokenizers in `llama/`: token ids, texts and prompts that Hugging Face transformers computes.

    python tests/golden/make_llama.py

needs transformers, not torch. The script makes four small tokenizers, each in a folder of its own:

    llama3     byte-level BPE; a sequence of post-processors writes BOS, and so does the chat template
    smollm2    byte-level BPE that splits numbers into digits; no post-processor
    llama2     SentencePiece BPE with byte fallback; normalizers write "▁"; BOS as in llama3
    metaspace  SentencePiece BPE without byte fallback; a pre-tokenizer writes "▁"; only the post-processor writes BOS

Beside the tokenizer's files, `cases.json` in each folder has

    texts      a text, its ids with and without special tokens, and the text of the ids, special tokens skipped or kept
    ids        token ids that no text encodes to, and their text, special tokens skipped or kept
    chats      messages and options, the prompt that `apply_chat_template` renders, and its ids
"""

import json
import random
import sys
from pathlib import Path

import tokenizers
import transformers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

sys.path.insert(0, str(Path(__file__).parent.parent))
from small_tokenizer import WORDS, vocabulary, write_json

FOLDER = Path(__file__).parent / "llama"
UNDERLINE = "\u2581"  # "▁", which SentencePiece writes for a space

WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
SPLIT = rf"{WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""The words of Llama 3: as Qwen3 splits them, but for numbers of up to three digits."""


def llama3() -> tuple[tokenizers.Tokenizer, dict]:
    tokens, merges = vocabulary()
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=tokens, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    bos = special[0]
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), template(tokenizer, f"{bos} $A")]
    )
    return tokenizer, {"bos_token": bos, "eos_token": "<|eot_id|>", "clean_up_tokenization_spaces": True}


def smollm2() -> tuple[tokenizers.Tokenizer, dict]:
    tokens, merges = vocabulary()
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=tokens, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    roles = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    return tokenizer, {**roles, "pad_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}


def llama2() -> tuple[tokenizers.Tokenizer, dict]:
    tokens, merges = pieces([f"<0x{byte:02X}>" for byte in range(256)])
    model = models.BPE(vocab=tokens, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(UNDERLINE), normalizers.Replace(" ", UNDERLINE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(UNDERLINE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return sentencepiece(tokenizer, {"add_bos_token": True, "add_eos_token": False, "legacy": False})


def metaspace() -> tuple[tokenizers.Tokenizer, dict]:
    tokens, merges = pieces(list("\n0123456789<|>/"))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=tokens, merges=merges, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(UNDERLINE, prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(UNDERLINE, prepend_scheme="first")
    return sentencepiece(tokenizer, {})


def pieces(more: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens by text, and merges: special tokens, `more`, and the prefixes of each word with and without "▁"."""
    tokens = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *more])}
    words = [underline + word for word in WORDS for underline in ("", UNDERLINE)]
    for character in dict.fromkeys("".join(words) + ".,!?'ABCDEFGHIW"):
        tokens[character] = len(tokens)
    merges = []
    for word in [UNDERLINE * 2, UNDERLINE * 4, *words]:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens[word[:end]] = len(tokens)
                merges.append((word[: end - 1], word[end - 1]))
    return tokens, merges


def sentencepiece(tokenizer: tokenizers.Tokenizer, config: dict) -> tuple[tokenizers.Tokenizer, dict]:
    special = ("<unk>", "<s>", "</s>")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.post_processor = template(tokenizer, "<s> $A")
    roles = {
        role: {"__type": "AddedToken", "content": token, "lstrip": False, "normalized": False, "rstrip": False,
               "single_word": False}
        for role, token in zip(("unk_token", "bos_token", "eos_token"), special, strict=True)
    }  # fmt: skip
    return tokenizer, {**config, **roles, "tokenizer_class": "LlamaTokenizer"}


def template(tokenizer: tokenizers.Tokenizer, single: str) -> processors.TemplateProcessing:
    bos = single.split()[0]
    return processors.TemplateProcessing(
        single=single, pair=f"{single} $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


TOKENIZERS = {"llama3": llama3, "smollm2": smollm2, "llama2": llama2, "metaspace": metaspace}

TEXTS = (
    "",
    " ",
    "   ",
    "\n",
    "Hello world, what IS the weather? It's 12345.67 , there's",
    "  two  blanks\n\n\nlines\r\nand\ttabs   ",
    " the\u2581underline",
    "你好, 中文; Привет, мир; مرحبا; नमस्ते; 안녕",
    "e\u0301 is é; 👩‍👩‍👧 \U0001f1e9\U0001f1ea ☀️",
    "\x00\x7f\ufffd\u200b\u2028",
    "<0xE4><0x0A><unk>",
    "BOS Hello EOS  the BOSBOS",
    "BOS",
)
"""Texts in which BOS and EOS stand for the tokenizer's own tokens."""

USER, ANSWER = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello there! "}
ASKED = {"role": "user", "content": "  What is the weather\nin Köln and 北京?  "}
SYSTEM = {"role": "system", "content": "You answer in one sentence."}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CHATS = {
    "one turn": ([USER], {}),
    "no generation prompt": ([USER], {"add_generation_prompt": False}),
    "several turns": ([SYSTEM, USER, ANSWER, ASKED], {}),
    "an answer at the end": ([USER, ANSWER], {"add_generation_prompt": False}),
    "continued": ([ASKED, {"role": "assistant", "content": "It is"}],
                  {"continue_final_message": True, "add_generation_prompt": False}),
    "special tokens in the content": ([{"role": "user", "content": "BOS the EOS"}], {}),
    "tools": ([ASKED], {"tools": [WEATHER]}),
}  # fmt: skip


def main() -> None:
    for name, make in TOKENIZERS.items():
        folder = FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        backend, config = make()
        backend.save(str(folder / "tokenizer.json"), pretty=False)
        fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        added = {
            str(number): {field: getattr(token, field) for field in fields}
            for number, token in backend.get_added_tokens_decoder().items()
        }
        write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": added, **config})
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        (folder / "cases.json").write_text(written(cases(tokenizer)), encoding="utf-8")
    versions = {"tokenizers": tokenizers.__version__, "transformers": transformers.__version__}
    write_json(FOLDER / "VERSIONS.json", versions)


def cases(tokenizer: transformers.PreTrainedTokenizerFast) -> dict[str, list[dict]]:
    def own(value):
        """`value` with the tokenizer's special tokens."""
        text = json.dumps(value).replace("BOS", tokenizer.bos_token).replace("EOS", tokenizer.eos_token)
        return json.loads(text)

    def text_case(text):
        ids = tokenizer(text)["input_ids"]
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        return {"text": text, "plain": plain, **decoded(ids)}

    def decoded(ids):
        skipped, kept = (tokenizer.decode(ids, skip_special_tokens=skip) for skip in (True, False))
        return {"ids": ids, "skipped": skipped, "kept": kept}

    def chat_case(name, messages, options):
        messages, options = own(messages), {"add_generation_prompt": True, **options}
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
        return {"name": name, "messages": messages, "options": options, "prompt": prompt, "ids": ids}

    # Ids up to 300 are bytes and special tokens, or letters.
    draws = random.Random(0)
    drawn = [[draws.randrange(300) for _ in range(length)] for length in range(1, 9)]
    return {
        "texts": [text_case(own(text)) for text in TEXTS],
        "ids": [decoded(ids) for ids in [[], *drawn, [len(tokenizer) + 1, *drawn[2]]]],
        "chats": [chat_case(name, messages, options) for name, (messages, options) in CHATS.items()],
    }


def written(cases: dict[str, list[dict]]) -> str:
    """JSON with one line for each case, in ASCII, so that no editor changes characters that look alike."""
    sections = [
        json.dumps(name) + ": [\n" + ",\n".join(" " + json.dumps(case) for case in listed) + "\n]"
        for name, listed in cases.items()
    ]
    return "{\n" + ",\n".join(sections) + "\n}\n"


if __name__ == "__main__":
    main()
