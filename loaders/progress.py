"""A progress bar with a rate."""

from __future__ import annotations

import sys
import threading
from types import TracebackType

from tqdm import tqdm


class Progress:
    """A progress bar on stderr, for several threads.

    text   label of the bar
    total  units in all
    show   None: only if stderr is a terminal
    unit   bytes, or the noun of what is counted
    """

    def __init__(self, text: str, total: int, show: bool | None = None, unit: str = "B"):
        show = sys.stderr is not None and sys.stderr.isatty() if show is None else show
        self._lock = threading.Lock()
        form = {"unit": "B", "unit_scale": True, "unit_divisor": 1024} if unit == "B" else {"unit": f" {unit}"}
        self._bar = tqdm(desc=text, total=total, disable=not show, **form)

    def add(self, count: int) -> None:
        """Advances the bar by `count` units."""
        with self._lock:
            self._bar.update(count)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
