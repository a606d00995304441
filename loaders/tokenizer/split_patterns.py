"""Regular expressions that split text into words, restricted to those that take linear time.

The package tokenizers matches them by backtracking, so a pattern such as `(a+a+)+b` runs for hours. Published patterns
are alternatives, each a few characters or classes in a row. They take linear time by these rules:

    ` ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*`  after an atom without a limit, all is optional: nothing is retried
    `\\p{N}{1,3}`                  what precedes such an atom, and other alternatives, match in at most 16 ways
    `\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+`   of a failed first alternative, the next one takes all that was tried
    `\\s+$`                        allowed as a pattern of its own
    `(?i:'s|'t|'re)`              groups contain text only, and do not repeat
"""

from __future__ import annotations

import re

LONGEST = 2000
"""Characters of a pattern; published ones have up to 500."""

_CLASS_PART = r"\\[pP]\{\^?\w{1,20}\}|\\[^pPxouU0-9]|[^\[\]\\&]|&(?!&)"
_TOKEN = re.compile(
    rf"""
    (?P<group>\(\?i?:(?:[^\\\[\]()|?*+{{}}^$.\s]+\|?)+\)\??)
    | (?P<atom>
        \\[pP]\{{\^?\w{{1,20}}\}} | \\[sSdDwWrnt] | \\[^\w\s] | \[\^?(?:{_CLASS_PART})+\] | [^\\\[\](){{}}|?*+^$.]
      )
      (?:(?P<unlimited>[*+]) | (?P<optional>\?) | \{{(?P<least>\d)(?:(?P<open>,)(?P<most>\d)?)?\}})?
    | (?P<ahead>\(\?!\\S\))
    | (?P<bar>\|)
    """,
    re.VERBOSE,
)
_NEWLINES, _SPACES = r"\s*[\r\n]+", (r"\s+(?!\S)", r"\s+")
_MOST_WAYS, _MOST_ALTERNATIVES = 16, 24


def takes_linear_time(pattern: str) -> bool:
    """Return whether a pattern is one of those that this module describes."""
    if pattern == r"\s+$":
        return True
    alternatives = _alternatives(pattern) if 0 < len(pattern) <= LONGEST else None
    if not alternatives or len(alternatives) > _MOST_ALTERNATIVES:
        return False
    for index, tokens in enumerate(alternatives):
        text = "".join(token[0] for token in tokens).replace("\r", r"\r").replace("\n", r"\n")
        following = "".join(token[0] for token in alternatives[index + 1]) if index + 1 < len(alternatives) else ""
        if not (text in _SPACES or (text == _NEWLINES and following in _SPACES) or _never_retries(tokens)):
            return False
    return True


def _alternatives(pattern: str) -> list[list[re.Match[str]]] | None:
    """Return the tokens of each alternative, or None if the pattern has other tokens."""
    alternatives: list[list[re.Match[str]]] = [[]]
    at = 0
    while at < len(pattern):
        token = _TOKEN.match(pattern, at)
        if token is None:
            return None
        if token["bar"]:
            alternatives.append([])
        else:
            alternatives[-1].append(token)
        at = token.end()
    return alternatives


def _never_retries(tokens: list[re.Match[str]]) -> bool:
    """Return whether an alternative either fails within a few characters, or matches at the first try."""
    unlimited, ways = False, 1
    for token in tokens:
        if token["ahead"]:
            return False
        optional = token["optional"] or token["unlimited"] == "*" or token["least"] == "0" or token[0].endswith(")?")
        if unlimited and not optional:
            return False
        unlimited = unlimited or bool(token["unlimited"] or (token["open"] and not token["most"]))
        if token["most"]:
            ways *= max(int(token["most"]) - int(token["least"]), 0) + 1
        elif optional:
            ways *= 2
    return bool(tokens) and ways <= _MOST_WAYS
