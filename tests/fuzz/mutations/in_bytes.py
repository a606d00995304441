"""Mutations of bytes, which know nothing of what the bytes mean."""

from __future__ import annotations

import random


def random_count(rng: random.Random, most: int = 100_000) -> int:
    """A count, small ones as likely as large ones."""
    return min(most, int(10 ** rng.uniform(0, 5.01)))


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """`data` after a few flips, insertions, deletions, splices, repetitions and cuts."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        size = len(changed)
        at, to = rng.randrange(size + 1), rng.randrange(size + 1)
        length = rng.choice([1, 1, 2, 8, 64])
        move = rng.randrange(7)
        if move == 0 and at < size:
            changed[at] ^= 1 << rng.randrange(8)
        elif move == 1 and at < size:
            changed[at] = rng.choice(b'\0\xff\x7f\x80{}[]",:0-9eE.\\\n\t*&!%@`#?|><')
        elif move == 2:
            changed[at:at] = rng.randbytes(length)
        elif move == 3:
            del changed[at : at + length]
        elif move == 4:
            changed[to:to] = changed[at : at + length]
        elif move == 5:
            changed[at:at] = changed[at : at + length] * rng.choice([2, 10, 1000])
        elif move == 6:
            del changed[rng.choice([at, size - length, length]) :]
    return bytes(changed)


def in_another_encoding(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """The same text in another encoding, or with something around it."""
    text = data.decode("utf-8", "replace")
    choices = {
        "bom": b"\xef\xbb\xbf" + data,
        "utf-16": text.encode("utf-16"),
        "utf-16-le": text.encode("utf-16-le"),
        "utf-32": text.encode("utf-32"),
        "latin": data + b"\xff\xfe\xe9",
        "garbage": data + b" {} x",
        "twice": data + data,
        "nul": data + b"\0" * random_count(rng),
        "spaces": data + b" " * random_count(rng),
        "newlines": b"\r\n" * random_count(rng) + data,
        "empty": b"",
        "huge": data + b" " * rng.choice([1 << 20, 1 << 24, 17 << 20]),
    }
    what = rng.choice(sorted(choices))
    return choices[what], what
