"""Progress of long work on stderr: done/total, time left, peak memory.

On a terminal one line is rewritten in place. Elsewhere nothing is printed, unless OPTIQ_PROGRESS=1
asks for one line per 5 %.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from typing import TextIO

_REDRAW = 0.1  # seconds between two redraws of the terminal line


class Progress:
    """A counter of `total` equal steps of work; `done` of them were finished in an earlier run.

    Steps need not be integers: what counts for the time left is that they take equally long.
    """

    def __init__(
        self,
        total: float,
        label: str,
        *,
        done: float = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.label = label
        self.done = done
        self._stream = stream or sys.stderr
        self._clock = clock
        self._start, self._start_done = clock(), done
        self._terminal = enabled and self._stream.isatty()
        self._lines = enabled and not self._terminal and os.environ.get("OPTIQ_PROGRESS") == "1"
        self._printed = self._percent() // 5 if total else 0
        self._drawn = float("-inf")
        self._width = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self, n: float = 1, note: str = "") -> None:
        """Count `n` steps as done; `note` says what is being worked on."""
        self.done += n
        finished = self.done >= self.total
        if self._terminal and (finished or self._clock() - self._drawn >= _REDRAW):
            self._drawn = self._clock()
            line = self._line(note)
            self._stream.write("\r" + line.ljust(self._width))
            self._stream.flush()
            self._width = len(line)
        elif self._lines and self._percent() // 5 > self._printed:
            self._printed = self._percent() // 5
            self._stream.write(self._line(note) + "\n")
            self._stream.flush()

    def say(self, text: str) -> None:
        """Print a whole line, above the running one."""
        if self._terminal:
            self._stream.write("\r" + text.ljust(self._width) + "\n")
        elif self._lines:
            self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """End the terminal line, so that what follows starts on its own."""
        if self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0

    def seconds_left(self) -> float | None:
        """Time left at the pace of this run, or None before the first step."""
        worked = self.done - self._start_done
        if worked <= 0:
            return None
        return (self._clock() - self._start) / worked * max(0.0, self.total - self.done)

    def _percent(self) -> int:
        return int(100 * self.done / self.total) if self.total else 100

    def _line(self, note: str) -> str:
        left = self.seconds_left()
        parts = [
            f"{self.label} {self.done:.0f}/{self.total:.0f} ({self._percent()} %)",
            "time left unknown" if left is None else f"{duration(left)} left",
            f"peak {peak_memory() / 1e9:.1f} GB",
        ]
        return ", ".join([*parts, note] if note else parts)


def tell(text: str, *, enabled: bool = True) -> None:
    """Print a whole line where progress is printed, between two pieces of work."""
    Progress(0, "", enabled=enabled).say(text)


def duration(seconds: float) -> str:
    """ "45 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def peak_memory() -> int:
    """Bytes: the largest resident size of this process, or MLX's own peak where that is larger.

    Memory that MLX holds for a GPU is not part of the resident size.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resident = peak if sys.platform == "darwin" else peak * 1024
    mx = sys.modules.get("mlx.core")
    return max(resident, int(mx.get_peak_memory()) if mx else 0)
