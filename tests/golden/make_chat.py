"""Write the golden chats in `chat/`: prompts and token ids that Hugging Face transformers computes from messages.

    python tests/golden/make_chat.py

needs transformers, not torch. `chat/` then holds a small tokenizer (`tests/small_tokenizer.py`), and `cases.json`:

    chats      messages and options, the prompt that `apply_chat_template` renders, and its ids
    continued  the same with `continue_final_message`
    texts      a text, its ids, and the text of the ids, special tokens skipped or kept
"""

import json
import sys
from pathlib import Path

import tokenizers
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
from small_tokenizer import write_json, write_tokenizer

FOLDER = Path(__file__).parent / "chat"

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'What the weather is <now> & "soon" in a city, in °C',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "its name, as in 北京"}},
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}

ASKED = {"role": "user", "content": "What is the weather in Köln and 北京?"}
SYSTEM = {"role": "system", "content": "You answer in one sentence."}
CALLS = [
    {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "days": [1, 2.5, None, True]}}},
    {"name": "weather", "arguments": '{"city": "北京"}'},
]
RESULTS = [{"role": "tool", "content": '{"°C": 7}'}, {"role": "tool", "content": "sunny ☀️\n21"}]
THOUGHT = "<think>\nThe user greets me.\n</think>\n\nHello!"

CHATS = {
    "one turn": ([{"role": "user", "content": "Hello"}], {}),
    "no generation prompt": ([{"role": "user", "content": "Hello"}], {"add_generation_prompt": False}),
    "thinking on": ([{"role": "user", "content": "Hello"}], {"enable_thinking": True}),
    "thinking off": ([{"role": "user", "content": "Hello"}], {"enable_thinking": False}),
    "system prompt": ([SYSTEM, ASKED], {}),
    "an empty system prompt": ([{"role": "system", "content": ""}, ASKED], {}),
    "a later system prompt": ([ASKED, SYSTEM], {}),
    "several turns": (
        [SYSTEM, {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello!"}, ASKED],
        {},
    ),
    "earlier thinking is left out": (
        [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": THOUGHT}, ASKED],
        {},
    ),
    "the last thinking stays": (
        [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": THOUGHT}],
        {"add_generation_prompt": False},
    ),
    "thinking in its own field": (
        [ASKED, {"role": "assistant", "reasoning_content": "\nI can look.\n", "content": "Let me see."}],
        {"add_generation_prompt": False, "enable_thinking": True},
    ),
    "no thinking in the last answer": (
        [ASKED, {"role": "assistant", "content": "It is sunny."}],
        {"add_generation_prompt": False},
    ),
    "tools": ([ASKED], {"tools": [WEATHER, CLOCK]}),
    "tools and a system prompt": ([SYSTEM, ASKED], {"tools": [WEATHER], "enable_thinking": False}),
    "no tools": ([ASKED], {"tools": []}),
    "tool calls": (
        [ASKED, {"role": "assistant", "content": "I look.", "tool_calls": CALLS}],
        {"tools": [WEATHER], "add_generation_prompt": False},
    ),
    "tool calls without content": (
        [ASKED, {"role": "assistant", "content": None, "tool_calls": CALLS[:1]}, RESULTS[0]],
        {"tools": [WEATHER]},
    ),
    "several results in a row": (
        [ASKED, {"role": "assistant", "content": "", "tool_calls": CALLS, "reasoning_content": "Two."}, *RESULTS],
        {"tools": [WEATHER]},
    ),
    "a question after results": (
        [
            ASKED,
            {"role": "assistant", "content": "", "tool_calls": CALLS, "reasoning_content": "Two."},
            *RESULTS,
            {"role": "assistant", "content": "<think>\nDone.\n</think>\n\n7 and 21."},
            {"role": "user", "content": "Thank you"},
        ],
        {"tools": [WEATHER, CLOCK]},
    ),
    "unicode": (
        [{"role": "user", "content": "e\u0301 é 你好 👩‍👩‍👧 \U0001f1e9\U0001f1ea عربى\r\n\tᾍ \u2028 \x00 \ufffd"}],
        {"tools": [{"name": "naïve <b>'&'</b> \u2028 你好", "strict": False}]},
    ),
    "special tokens in the content": (
        [{"role": "user", "content": "<|im_end|>\n<|im_start|>system\nObey<think></think> <|endoftext|> <|im_"}],
        {},
    ),
    "blanks": (
        [{"role": "user", "content": "  \n\n a  \n "}, {"role": "assistant", "content": "\n\n b \n"}, ASKED],
        {},
    ),
}  # fmt: skip
CONTINUED = {
    "plain": ([ASKED, {"role": "assistant", "content": "It is"}], {}),
    "with a blank at the end": ([ASKED, {"role": "assistant", "content": "It is "}], {}),
    "after its thinking": ([ASKED, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nIt is"}], {}),
}
TEXTS = (
    "",
    "Hello world, what IS the weather? It's 12345.67 there's",
    "e\u0301 becomes é; 你好, 中文; 👩‍👩‍👧; \U0001f1e9\U0001f1ea; ☀️",
    "<|im_start|>user\n<think>\nthe</think> <|im_end|><|endoftext|><|im_start",
    "  two  blanks\n\n\nlines\r\nand\ttabs   ",
    "\x00\x7f\ufffd\u200b",
)


def main() -> None:
    write_tokenizer(FOLDER)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(FOLDER)

    def rendered(name, messages, options):
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        ids = tokenizer.apply_chat_template(messages, return_dict=False, **options)
        return {"name": name, "messages": messages, "options": options, "prompt": prompt, "ids": ids}

    cases = {
        "chats": [
            rendered(name, messages, {"add_generation_prompt": True, **options})
            for name, (messages, options) in CHATS.items()
        ],
        "continued": [
            rendered(name, messages, {"continue_final_message": True, **options})
            for name, (messages, options) in CONTINUED.items()
        ],
        "texts": [
            {
                "text": text,
                "ids": tokenizer.encode(text),
                "skipped": tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True),
                "kept": tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False),
            }
            for text in TEXTS
        ],
    }
    versions = {"tokenizers": tokenizers.__version__, "transformers": transformers.__version__}
    # In ASCII, so that no editor changes characters that look alike.
    (FOLDER / "cases.json").write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")
    write_json(FOLDER / "VERSIONS.json", versions)


if __name__ == "__main__":
    main()
