"""Bounds of the time and memory that a chat template may use.

A template has a number of steps and of characters, which every operation uses up before it runs: a step for each part
of an expression, each turn of a loop and each element of a list that is made or read; a character for each one that is
read or written. So the sum of both bounds time and memory, whatever the template does.
"""

from __future__ import annotations

import sys
from typing import Any

STEPS, STEPS_EACH = 300_000, 100
"""Steps of a template, about 1 µs each, and further ones for each string, number, list and mapping of the chat.

A chat of 400 messages with tools may take 1,100,000 steps. Published templates take at most 490,000 for it, but for
those of Idefics 3, which go through each character of a text.
"""

CHARACTERS, CHARACTERS_EACH = 1 << 24, 64
"""Characters that a template may read and write, and further ones for each character of the chat.

Published templates read and write each character of a chat up to 11 times.
"""

COPIED = 2 << 30
"""Bytes that `+` and `~` may copy, about 1 s: a loop that appends each message to a text copies that text each time."""

LARGEST_INTEGER = 1 << 63


VIEWS: Any = (type({}.keys()), type({}.values()), type({}.items()))


class TooExpensive(Exception):
    """A template takes more steps or characters than its chat allows."""


class Budget:
    """What is left of the steps and characters of one rendering."""

    def __init__(self, chat: Any):
        self.steps, self.characters, self.copied = 1 << 62, 1 << 62, COPIED
        self.value(chat)
        elements, length = (1 << 62) - self.steps, (1 << 62) - self.characters
        self.steps = STEPS + STEPS_EACH * elements
        self.characters = CHARACTERS + CHARACTERS_EACH * length

    def step(self, count: int = 1) -> None:
        """Use up steps.

        Raises:
          TooExpensive: if fewer are left.
        """
        self.steps -= count
        if self.steps < 0:
            raise TooExpensive("it runs for too long: it has too many loops, or too many turns of a loop")

    def write(self, count: int) -> None:
        """Use up characters.

        Raises:
          TooExpensive: if fewer are left.
        """
        self.characters -= count
        if self.characters < 0:
            raise TooExpensive("it reads and writes too much text")

    def check(self, count: int) -> None:
        """Check that a text of `count` characters can be made.

        Raises:
          TooExpensive: if fewer characters are left.
        """
        if count > self.characters:
            raise TooExpensive("it reads and writes too much text")

    def copy(self, text: str) -> None:
        """Use up what a text takes that `+` or `~` made: its characters, and the time of copying its bytes.

        Raises:
          TooExpensive: if less is left.
        """
        self.write(len(text))
        self.copied -= sys.getsizeof(text)
        if self.copied < 0:
            raise TooExpensive("it copies too much text, by + or ~ in a loop")

    def refund(self, count: int) -> None:
        """Give back the characters of a text that `copy` charged, and that nothing holds any more."""
        self.characters += count

    def value(self, value: Any) -> int:
        """Use up a step for each element of a value and a character for each of its strings; return its depth.

        A list that contains another list twice counts that list twice, as printing and comparing do.
        """
        waiting: list[tuple[Any, int]] = [(value, 0)]
        deepest = 0
        while waiting:
            one, depth = waiting.pop()
            if isinstance(one, str):
                self.write(len(one))
            elif isinstance(one, (list, tuple, dict, *VIEWS)):
                deepest = max(deepest, depth + 1)
                parts: Any = one
                self.step(len(parts))
                if isinstance(one, dict):
                    waiting += [(key, depth + 1) for key in one]
                    parts = one.values()
                waiting += [(part, depth + 1) for part in parts]
            self.step()
        return deepest

    def text(self, value: Any) -> str:
        """Return a value as text, as a template prints it."""
        if isinstance(value, str):
            return value
        self.value(value)
        text = str(value)
        self.write(len(text))
        return text

    def integer(self, value: Any) -> Any:
        """Return a number that is no integer of more than 64 bits.

        Raises:
          TooExpensive: for such an integer.
        """
        if isinstance(value, int) and not -LARGEST_INTEGER <= value < LARGEST_INTEGER:
            raise TooExpensive("it computes with integers of more than 64 bits")
        return value
