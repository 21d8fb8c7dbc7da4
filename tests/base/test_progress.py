"""Progress: one line on a terminal of any width, a line every 30 seconds in a log, or nothing."""

from __future__ import annotations

import io
import re
import threading

import pytest

from optiq.base import lines
from optiq.base.progress import Job, Progress, duration, peak_memory, silenced, tell


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("optiq.base.progress.peak_memory", lambda: 1_500_000_000)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def drawn(job: Job, columns: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """The line of `job` as it is now, on a terminal of this width."""
    from rich.console import Console

    stream = Terminal()
    monkeypatch.setenv("COLUMNS", str(columns))
    line = lines.Terminal(stream, job._shown)
    Console(file=stream, width=columns).print(line._line())
    return plain(stream.getvalue())


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_the_line_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, expected = Clock(), {"measuring sensitivity": 9000.0, "writing": 3000.0}
    with (
        Job(stream=Terminal(), clock=clock) as job,
        Progress(1000, "measuring sensitivity", clock=clock) as progress,
    ):
        job.expect(expected)
        clock.now = 5000.0
        progress.step(500, "model.layers.31.block_sparse_moe.experts.gate_up_proj " * 3)
        shown = drawn(job, columns, monkeypatch)
    assert shown.count("\n") == 1
    assert len(shown.rstrip("\n")) <= columns
    for part in ("measuring sensitivity", "50 %", "2 h 13 min left"):
        assert part in shown


def test_a_terminal_is_left_clean() -> None:
    stream = Terminal()
    with Job(stream=stream) as job:
        job.expect({"reading": 1.0, "writing": 1.0})
        with Progress(4, "reading") as progress:
            progress.step(4)
            progress.say("half way")
        with Progress(1, "writing") as progress:
            progress.step()
    left = [line.split("\r")[-1].rstrip() for line in plain(stream.getvalue()).split("\n")]
    for line in ("reading                 0 s", "half way", "writing                 0 s"):
        assert line in left
    assert "━" not in left[-2]  # the live line is wiped
    assert job.seconds_left() is None


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    def colours() -> list[str]:
        stream = Terminal()
        with Progress(4, "reading", stream=stream) as progress:
            progress.step(2)
        return re.findall(r"\x1b\[[0-9;]*3[0-9][0-9;]*m", stream.getvalue())

    assert colours()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colours()


def test_a_log_gets_a_line_every_30_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(100, "reading", stream=stream, clock=clock) as progress:
        for _ in range(100):
            clock.now += 1
            progress.step()
    assert stream.getvalue().splitlines() == [
        "reading: 30 %, 70 s left, peak 1.5 GB",
        "reading: 60 %, 40 s left, peak 1.5 GB",
        "reading: 90 %, 10 s left, peak 1.5 GB",
    ]


def test_a_log_gets_lines_while_one_step_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = threading.Event()

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            printed.set()
            return super().write(text)

    monkeypatch.setattr(lines, "EVERY", 0.01)
    stream = Stream()
    with Progress(0, "reading", stream=stream):
        assert printed.wait(30)
    assert stream.getvalue().startswith("reading: time left unknown, peak 1.5 GB\n")


def test_short_work_prints_nothing_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(10, "reading") as progress:
        progress.step(10)
        tell("said")
    tell("said")
    assert capsys.readouterr() == ("", "")


def test_what_was_said_is_in_the_log_of_longer_work() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(4, "reading", stream=stream, clock=clock) as progress:
        progress.say("first")
        clock.now = 40
        progress.step(2)
        progress.say("second")
    said = ["first", "reading: 50 %, 40 s left, peak 1.5 GB", "second"]
    assert stream.getvalue().splitlines() == said


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_silence(stream: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    with silenced(), Job(stream=stream), Progress(10, "reading") as progress:
        progress.step(10)
        progress.say("said")
        tell("said")
    with Progress(10, "reading", stream=stream, enabled=False) as progress:
        progress.say("said")
    tell("said", enabled=False)
    assert stream.getvalue() == ""
    assert capsys.readouterr().err == ""


def test_time_left_is_that_of_the_whole_job() -> None:
    clock = Clock()
    expected = {"reading": 10.0, "fitting": 100.0, "writing": 50.0}
    with Job(stream=io.StringIO(), clock=clock) as job:
        job.expect(expected)
        job.phase("reading")
        assert job.seconds_left() == 160
        clock.now = 20  # twice as slow as expected, so will be the others
        with Progress(10, "fitting", clock=clock) as progress:
            assert job.seconds_left() == 300
            clock.now += 100
            progress.step(1)  # slower still: at its own pace 900 s are left
            assert job.seconds_left() == pytest.approx(1000)
            progress.step(9)
            assert job.seconds_left() == pytest.approx(100)


def test_work_within_work_shows_the_time_of_the_outer() -> None:
    clock = Clock()
    with (
        Progress(4, "measuring models", stream=io.StringIO(), clock=clock) as outer,
        Progress(10, "fitting weights", clock=clock) as inner,
    ):
        clock.now = 5
        outer.step()
        inner.step()
        assert outer._job is not None
        shown = outer._job._shown()
    assert (shown.phase, shown.share, shown.note) == ("measuring models", 0.25, "fitting weights")
    assert shown.left == "15 s left"


def test_time_left_counts_only_this_run() -> None:
    clock = Clock()
    progress = Progress(100, "x", done=60, stream=io.StringIO(), clock=clock)
    assert progress.seconds_left() is None
    clock.now = 20
    progress.step(10)
    assert progress.seconds_left() == pytest.approx(60)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (5000, "83 min"), (12_000, "3 h 20 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_peak_memory_is_this_process() -> None:
    before = peak_memory()
    assert before > 1 << 20
    held = bytearray(b"x") * (before + (64 << 20))
    assert peak_memory() >= before + (32 << 20)
    del held
