"""Shows the results of `gpu.py` as a Markdown page.

python benchmarks/gpu_page.py benchmarks/results/gpu-….json    # prints the page
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any


def page(report: dict[str, Any]) -> str:
    """Returns the page: the device, how each part ended, all checks, and the output of each benchmark."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    title = f"# perparam on {machine['device']}"
    if report["dry"]:
        title += ", a dry run: it tests the script, not the device"
    lines = [title, "", f"{machine['date']}; {versions}"]
    if machine.get("driver, clock, power"):
        lines.append(f"; driver, maximal clock, power limit: {machine['driver, clock, power']}")
    lines += ["", "| part | seconds | at most | |", "|---|---|---|---|"]
    checks = report.get("checks")
    if checks:
        lines.append(f"| checks | {checks['seconds']} | {checks['budget']:.0f} | {checks_summary(checks)} |")
    for part in report["parts"]:
        lines.append(f"| {part['name']} | {part['seconds']} | {part['budget']:.0f} | {part['failed'] or 'complete'} |")
    if checks:
        lines += [
            "", "## Checks", "",
            "Of bound: the largest difference from the reference, divided by the largest difference allowed for the",
            "element. Error: the norm of all differences, divided by that of the reference.",
            "", "| check | | of bound | error |", "|---|---|---|---|",
        ]  # fmt: skip
        for one in checks["results"]:
            result = "passed" if one["passed"] else f"**failed**: {one['why']}"
            numbers = [f"{one[name]:.3g}" if name in one else "" for name in ("of bound", "error")]
            lines.append(f"| {one['name']} | {result} | {' | '.join(numbers)} |")
    for part in report["parts"]:
        lines += ["", f"## {part['name']}", "", *(["Failed: " + part["failed"], ""] if part["failed"] else [])]
        lines += ["```", shown(part["output"]), "```"]
    return "\n".join(lines) + "\n"


def shown(output: str) -> str:
    """Returns the output of a benchmark for the page, without the names of temporary files.

    >>> shown("a table\\nwritten to /tmp/x.json")
    'a table'
    """
    lines = [line for line in output.splitlines() if not line.startswith(("written to", "no picture"))]
    return "\n".join(lines).strip().replace("```", "'''")


def check_line(result: dict[str, Any]) -> str:
    """Returns a check as a line of text.

    >>> check_line({"name": "a", "passed": False, "why": "other bits"})
    'FAILED a: other bits'
    """
    return f"passed {result['name']}" if result["passed"] else f"FAILED {result['name']}: {result['why']}"


def checks_summary(checks: dict[str, Any]) -> str:
    """Returns the number of checks that passed, as text.

    >>> checks_summary({"results": [{"passed": True}, {"passed": False}]})
    '1 of 2 checks passed'
    """
    passed = sum(one["passed"] for one in checks["results"])
    return f"{passed} of {len(checks['results'])} checks passed"


def part_summary(part: dict[str, Any]) -> str:
    """Returns how a benchmark ended, as text."""
    return f"{part['name']}: {part['failed'] or 'complete'}, {part['seconds']} of at most {part['budget']:.0f} s"


if __name__ == "__main__":
    print(page(json.loads(pathlib.Path(sys.argv[1]).read_text())))
