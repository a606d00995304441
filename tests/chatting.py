"""What the tests of `perparam chat` share: a template, a terminal that remembers, and what is dim on it."""

import io
import re

TEMPLATE = r"""
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\n' + messages[-1].content }}"""
"""Has an answer go on from the question, which decides on it."""

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
SUMMARY = r"(\d+) tokens, the first after ([\d.]+) s(?:, then ([\d.]+) tokens/s)?, ([\d.]+) GiB on the (?:host|device)"


class Screen(io.StringIO):
    """A terminal that remembers."""

    def isatty(self):
        return True

    def take(self):
        """What was written since the last time."""
        written = self.getvalue()
        self.seek(0)
        self.truncate()
        return written


def dimmed(written):
    """The text without escapes, and the stretches of it that are dim."""
    plain, stretches, dim = "", [""], False
    for part in re.split("(\x1b\\[[02]m)", written):
        if part in (DIM, PLAIN):
            dim = part == DIM
            stretches.append("")
        else:
            plain += part
            stretches[-1] += part if dim else ""
    return plain, [stretch for stretch in stretches if stretch]
