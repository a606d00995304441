"""What the tests of text share: tokenizers, and a model that says what it is told to."""

import contextlib
import types

import numpy as np
from checkpoints import GOLDEN

from perparam import generate_text, stream_text
from perparam.loaders import text
from perparam.loaders.tokenizer import load_tokenizer
from perparam.models import Generated

TOKENIZER = load_tokenizer(GOLDEN / "chat")
LLAMA2, LLAMA3 = (load_tokenizer(GOLDEN / "llama" / name) for name in ("llama2", "llama3"))
END, START = TOKENIZER.token_id("<|im_end|>"), TOKENIZER.token_id("<|im_start|>")


def scripted(*scripts):
    """A `decode` that answers row i with the tokens `scripts[i]`, then goes on with 0s; `asked` notes what it got."""
    asked = []

    def decode(model, ids, mask, config, *, chunk):
        count, eos, samples = config.max_new_tokens, config.eos_token_id, config.num_return_sequences
        asked.append({"ids": ids, "mask": mask, "eos": eos, "chunk": chunk, "samples": samples, "sent": []})
        rows = np.array([[*script, *[0] * count][:count] for script in scripts], np.int32).reshape(len(scripts), count)
        done, given = np.zeros(len(rows), bool), 0
        while given < count and not done.all():
            stop, lengths = min(given + chunk, count), np.zeros(len(rows), np.int32)
            part = rows[:, given:stop].copy()
            for place in range(part.shape[1]):
                lengths += ~done
                part[done, place] = 0
                done = done | np.isin(part[:, place], eos) & ~done
                if done.all():
                    part = part[:, : place + 1]
                    break
            told = None if config.logprobs is None else -part.astype(np.float32)
            ended = yield Generated(part, lengths, done.copy(), told)
            asked[-1]["sent"].append(ended)
            done, given = done | ended, stop

    decode.asked = asked
    return decode


def model_of(eos=()):
    return types.SimpleNamespace(config=types.SimpleNamespace(eos_token_id=eos))


@contextlib.contextmanager
def says(*scripts):
    """A context in which models answer so."""
    before, text.decode = text.decode, scripted(*scripts)
    try:
        yield text.decode.asked
    finally:
        text.decode = before


def run(pieces):
    """The pieces of a stream, and the completion that it returns."""
    found = []
    while True:
        try:
            found.append(next(pieces))
        except StopIteration as end:
            return found, end.value


def streamed(script, **options):
    with says(script):
        count = options.pop("count", len(script))
        return run(stream_text(model_of(), TOKENIZER, "Hello", count, **options))


def completed(script, **options):
    with says(script):
        count = options.pop("count", len(script))
        (found,) = generate_text(model_of(), TOKENIZER, "Hello", count, **options)
        return found


def ids(text):
    return TOKENIZER.encode(text)
