"""Where progress is shown: one live line on a terminal, a line every 30 seconds in a log."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:  # rich takes a moment to import, and only a terminal needs it
    from rich.console import RenderableType
    from rich.table import Table

EVERY = 30.0  # seconds between two lines in a log
_REDRAWS = 5  # a second, on a terminal

_BAR = (8, 30)  # columns of the bar, least and most
_MEMORY_FROM = 68  # columns of a terminal that has room for the peak memory as well
_NAME = 22  # columns of a phase's name


@dataclass(frozen=True)
class Shown:
    """What a line says. `share` of the phase is done; None where that is not known."""

    phase: str
    share: float | None
    left: str
    memory: str
    note: str

    def __str__(self) -> str:
        parts = [] if self.share is None else [f"{100 * self.share:.0f} %"]
        parts += [self.left or "time left unknown", f"peak {self.memory}"]
        return f"{self.phase}: {', '.join([*parts, self.note] if self.note else parts)}"


class Lines(Protocol):
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def refresh(self) -> None:
        """Called after every step."""

    def say(self, text: str) -> None:
        """Print a whole line."""

    def phase_over(self, name: str, took: str) -> None: ...


def lines_for(stream: TextIO, shown: Callable[[], Shown], clock: Callable[[], float]) -> Lines:
    """For a terminal that can move its cursor, or for anything else."""
    if stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        return Terminal(stream, shown)
    return Log(stream, shown, clock)


class Log:
    """A line every 30 seconds, also while a long step runs. Work that is shorter prints nothing.

    What is said before the first line is kept for it.
    """

    def __init__(
        self, stream: TextIO, shown: Callable[[], Shown], clock: Callable[[], float]
    ) -> None:
        self._stream, self._shown, self._clock = stream, shown, clock
        self._printed = clock()
        self._kept: list[str] | None = []  # None once the first line is out
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def start(self) -> None:
        self._printed = self._clock()
        threading.Thread(target=self._beat, name="optiq-progress", daemon=True).start()

    def stop(self) -> None:
        with self._lock:  # nothing is printed from here on: the stream may be closed
            self._stopped.set()

    def refresh(self) -> None:
        with self._lock:
            if self._is_due() and not self._stopped.is_set():
                self._print(str(self._shown()))

    def say(self, text: str) -> None:
        with self._lock:
            if self._kept is None or self._is_due():
                self._print(text)
            else:
                self._kept.append(text)

    def phase_over(self, name: str, took: str) -> None:
        """A log has the lines of every 30 seconds."""

    def _is_due(self) -> bool:
        return self._clock() - self._printed >= EVERY

    def _print(self, text: str) -> None:
        print(*(self._kept or ()), text, sep="\n", file=self._stream, flush=True)
        self._printed, self._kept = self._clock(), None

    def _beat(self) -> None:
        while not self._stopped.wait(max(EVERY, 0.01)):
            self.refresh()


class Terminal:
    """One line, redrawn in place and never wider than the terminal."""

    def __init__(self, stream: TextIO, shown: Callable[[], Shown]) -> None:
        from rich.console import Console
        from rich.live import Live

        self._shown = shown
        self._console = Console(file=stream, highlight=False)
        self._live = Live(
            console=self._console,
            get_renderable=self._line,
            refresh_per_second=_REDRAWS,
            transient=True,
            redirect_stdout=False,  # results go there, not progress
        )

    def start(self) -> None:
        self._live.start(refresh=True)

    def stop(self) -> None:
        self._live.stop()

    def refresh(self) -> None:
        """The line redraws itself."""

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def phase_over(self, name: str, took: str) -> None:
        from rich.text import Text

        self._console.print(Text(f"{name.ljust(_NAME)}  {took}", style="dim"))

    def _line(self) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        shown, columns = self._shown(), self._console.width
        percent = "" if shown.share is None else f"{100 * shown.share:.0f} %"
        texts = [percent.rjust(5), shown.left]
        if columns >= _MEMORY_FROM:
            texts.append(shown.memory)
        name = max(_NAME, len(shown.phase))
        room = columns - 1 - name - sum(2 + len(text) for text in texts) - 2
        least, most = _BAR
        bar = max(least, min(most, room))
        note = shown.note[: max(0, room - bar - 2)]
        cells: list[RenderableType] = [
            Text(shown.phase.ljust(name), style="bold"),
            ProgressBar(100, 100 * (shown.share or 0), width=bar, pulse=shown.share is None),
            *map(Text, texts),
        ]
        if len(note) > 12:
            cells.append(Text(note, style="dim"))
        grid = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        for _ in cells:
            grid.add_column(no_wrap=True)
        grid.add_row(*cells)
        return grid
