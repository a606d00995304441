"""A progress bar with bytes and rate."""

from __future__ import annotations

import sys
import threading
from types import TracebackType

from tqdm import tqdm


class Progress:
    """A progress bar on stderr, for several threads.

    text   label of the bar
    total  bytes in all
    show   None: only if stderr is a terminal
    """

    def __init__(self, text: str, total: int, show: bool | None = None):
        show = sys.stderr is not None and sys.stderr.isatty() if show is None else show
        self._lock = threading.Lock()
        self._bar = tqdm(desc=text, total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=not show)

    def add(self, count: int) -> None:
        """Advances the bar by `count` bytes."""
        with self._lock:
            self._bar.update(count)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
