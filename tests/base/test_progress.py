"""Progress lines: on a terminal, in a log, and when nobody asked."""

from __future__ import annotations

import io

import pytest

from optiq.base.progress import Progress, duration, peak_memory


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_terminal_line_is_rewritten_in_place() -> None:
    stream, clock = Terminal(), Clock()
    with Progress(4, "probes", stream=stream, clock=clock) as progress:
        for i in range(4):
            clock.now += 10
            progress.step(note=f"layer {i}")
        progress.say("half way")
    lines = stream.getvalue().split("\r")
    assert lines[0] == ""
    assert lines[1].startswith("probes 1/4 (25 %), 30 s left, peak ")
    assert lines[1].rstrip().endswith("GB, layer 0")
    assert lines[4].startswith("probes 4/4 (100 %), 0 s left")
    assert lines[5].rstrip() == "half way"
    assert lines[5].endswith("\n")


def test_fast_steps_are_not_all_drawn() -> None:
    stream, clock = Terminal(), Clock()
    progress = Progress(1000, "x", stream=stream, clock=clock)
    for _ in range(1000):
        clock.now += 0.001
        progress.step()
    assert stream.getvalue().count("\r") <= 12
    assert "x 1000/1000" in stream.getvalue()


def shown(output: str) -> list[str]:
    """The lines that a terminal shows: after a carriage return, new letters replace old ones."""
    lines = []
    for line in output.split("\n"):
        cells: list[str] = []
        for part in line.split("\r"):
            cells[: len(part)] = part
        lines.append("".join(cells).rstrip())
    return lines


def test_shorter_lines_cover_longer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optiq.base.progress.peak_memory", lambda: 1_500_000_000)
    stream, clock = Terminal(), Clock()
    progress = Progress(3, "x", stream=stream, clock=clock)
    for note, line in (
        ("a long note", "x 1/3 (33 %), 2 s left, peak 1.5 GB, a long note"),
        ("short", "x 2/3 (66 %), 1 s left, peak 1.5 GB, short"),
        ("", "x 3/3 (100 %), 0 s left, peak 1.5 GB"),
    ):
        clock.now += 1
        progress.step(note=note)
        assert shown(stream.getvalue()) == [line]
    progress.say("done")
    assert shown(stream.getvalue()) == ["done", ""]


def test_a_log_is_quiet_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPTIQ_PROGRESS", raising=False)
    stream = io.StringIO()
    with Progress(10, "x", stream=stream) as progress:
        progress.step(10)
        progress.say("done")
    assert stream.getvalue() == ""


def test_a_log_gets_a_line_per_5_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTIQ_PROGRESS", "1")
    stream = io.StringIO()
    progress = Progress(1000, "x", stream=stream)
    for _ in range(1000):
        progress.step()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 20
    assert lines[0].startswith("x 50/1000 (5 %), ")
    assert lines[-1].startswith("x 1000/1000 (100 %), ")
    progress = Progress(10, "x", stream=stream, enabled=False)
    progress.step(10)
    assert len(stream.getvalue().splitlines()) == 20


def test_time_left_counts_only_this_run() -> None:
    clock = Clock()
    progress = Progress(100, "x", done=60, stream=io.StringIO(), clock=clock)
    assert progress.seconds_left() is None
    clock.now = 20
    progress.step(10)
    assert progress.seconds_left() == pytest.approx(60)


def test_nothing_to_do() -> None:
    stream = Terminal()
    with Progress(0, "x", stream=stream) as progress:
        progress.step(0)
    assert "x 0/0 (100 %)" in stream.getvalue()


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
