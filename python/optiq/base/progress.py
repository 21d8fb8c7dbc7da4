"""Progress of long work, on stderr: what is being done, how much of it is done, the time left.

On a terminal one line is kept up to date. In a log or a pipe a line is printed every 30 seconds.
`silenced` switches both off.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

from .lines import Lines, Shown, lines_for

Clock = Callable[[], float]

_PACE = (0.25, 4.0)  # how far the phases that are over correct the seconds expected of the others

_job: Job | None = None
_silent = False


class Progress:
    """A counter of `total` equal steps of work; `done` of them were finished in an earlier run.

    Steps need not be integers: what counts for the time left is that they take equally long. With a
    `total` of 0 the work is shown without a percentage. It is a part of the job that is open (see
    `Job`), or else a job of its own.
    """

    def __init__(
        self,
        total: float,
        label: str,
        *,
        done: float = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.total = total
        self.label = label
        self.done = done
        self.note = ""
        self._enabled, self._stream, self._clock = enabled, stream, clock
        self._start, self._start_done = clock(), done
        self._own: Job | None = None
        self._job: Job | None = None

    def __enter__(self) -> Progress:
        self._job = _job if self._enabled else None
        if self._job is None:
            self._job = self._own = Job(
                enabled=self._enabled, stream=self._stream, clock=self._clock
            )
            self._own.__enter__()
        self._job.begin(self)
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._job is not None
        self._job.end(self)
        if self._own:
            self._own.__exit__(*exception)

    def step(self, n: float = 1, note: str = "") -> None:
        """Count `n` steps as done; `note` says what is being worked on."""
        self.done += n
        self.note = note
        if self._job:
            self._job.refresh()

    def say(self, text: str) -> None:
        """Print a whole line, above the running one."""
        if self._job:
            self._job.say(text)

    def seconds_left(self) -> float | None:
        """Time left at the pace of this run, or None before the first step."""
        worked = self.done - self._start_done
        if worked <= 0:
            return None
        return (self._clock() - self._start) / worked * max(0.0, self.total - self.done)

    def share(self) -> float | None:
        return min(1.0, self.done / self.total) if self.total else None


class Job:
    """Work in phases, shown on one line; a context manager.

    Once it knows what to expect of the phases (`expect`), the time left is that of the whole job,
    and each phase leaves a line with the time it took.
    """

    def __init__(
        self,
        *,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._expected: dict[str, float] = {}
        self._clock = clock
        self._parts: list[Progress] = []  # the innermost is last
        self._phase, self._phase_start = "", clock()
        self._took: dict[str, float] = {}
        self._outer: Job | None = None
        shown = enabled and not _silent
        self._lines: Lines | None = None
        if shown:
            self._lines = lines_for(stream or sys.stderr, self._shown, clock)

    def __enter__(self) -> Job:
        global _job
        self._outer = _job
        if self._lines:
            _job = self
            self._lines.start()
        return self

    def __exit__(self, *_: object) -> None:
        global _job
        if self._lines:
            self._lines.stop()
        self._close_phase()
        _job = self._outer

    @property
    def took(self) -> Mapping[str, float]:
        """Seconds of each phase so far."""
        now = {self._phase: self._clock() - self._phase_start} if self._phase else {}
        return {p: self._took.get(p, 0.0) + now.get(p, 0.0) for p in {**self._took, **now}}

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Name the phases in order, with the seconds that each is expected to take."""
        self._expected = dict(seconds)

    def phase(self, name: str) -> None:
        """Begin the phase `name`; the last one is over."""
        if name != self._phase:
            self._close_phase()
            self._phase, self._phase_start = name, self._clock()
            self.refresh()

    def begin(self, part: Progress) -> None:
        if not self._parts:
            self.phase(part.label)
        self._parts.append(part)
        self.refresh()

    def end(self, part: Progress) -> None:
        self._parts.remove(part)
        self.refresh()

    def refresh(self) -> None:
        if self._lines:
            self._lines.refresh()

    def say(self, text: str) -> None:
        """Print a whole line, above the running one."""
        if self._lines:
            self._lines.say(text)

    def seconds_left(self) -> float | None:
        """Of the whole job: what this phase still takes, and what is expected of the later ones."""
        part = self._parts[0] if self._parts else None
        own = part.seconds_left() if part else None
        if self._phase not in self._expected:
            return own
        names = list(self._expected)
        at = names.index(self._phase)
        pace = self._pace()
        rest = pace * self._expected[self._phase] - (self._clock() - self._phase_start)
        later = pace * sum(self._expected[name] for name in names[at + 1 :])
        if part and own is not None:  # what is seen of it counts more and more
            rest = own + max(0.0, rest - own) * (1 - (part.share() or 0.0))
        return max(rest, 0.0) + later

    def _pace(self) -> float:
        """How much slower than expected the phases went that are over."""
        over = [name for name in self._took if name in self._expected]
        expected = sum(self._expected[name] for name in over)
        if expected <= 0:
            return 1.0
        low, high = _PACE
        return min(high, max(low, sum(self._took[name] for name in over) / expected))

    def _close_phase(self) -> None:
        if not self._phase:
            return
        took = self._clock() - self._phase_start
        self._took[self._phase] = self._took.get(self._phase, 0.0) + took
        if self._phase in self._expected and self._lines:
            self._lines.phase_over(self._phase, duration(took))
        self._phase = ""

    def _shown(self) -> Shown:
        part = self._parts[0] if self._parts else None
        inner = self._parts[-1] if len(self._parts) > 1 else None
        left = self.seconds_left()
        return Shown(
            phase=self._phase,
            share=part.share() if part else None,
            left="" if left is None else f"{duration(left)} left",
            memory=f"{peak_memory() / 1e9:.1f} GB",
            note=inner.label if inner else part.note if part else "",
        )


@contextmanager
def silenced(silent: bool = True) -> Iterator[None]:
    """Within it nothing is shown of any work."""
    global _silent
    before, _silent = _silent, _silent or silent
    try:
        yield
    finally:
        _silent = before


def tell(text: str, *, enabled: bool = True) -> None:
    """Print a whole line where progress is shown."""
    if enabled:
        (_job or Job()).say(text)


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
