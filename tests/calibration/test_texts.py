"""The three texts of a conversion, and what happens where there is too little of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optiq.calibration import gather, gather_selection, texts
from optiq.errors import CalibrationError

from .test_batches import Letters


def mix(folder: Path, **lengths: list[int]) -> Path:
    """Rows of `x`, a token each, by domain."""
    path = folder / "mix.jsonl"
    rows = [{"domain": d, "text": "x" * n} for d, sizes in lengths.items() for n in sizes]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_no_row_is_in_two_texts() -> None:
    parts = [
        gather(Letters(), None, "calibration", 8000, 0).sequences,
        gather_selection(Letters(), None, 0),
        gather(Letters(), None, "heldout", 4000, 0).sequences,
    ]
    lines = [{sample.line for sample in part} for part in parts]
    assert all(lines)
    assert len(set.union(*lines)) == sum(map(len, lines))


def test_too_little_text_to_choose_by_is_said_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("optiq.base.lines.EVERY", 0)  # what is said is printed at once
    for lengths in ([99, 20, 99], [99, 99]):  # the second of three chooses; of two, none does
        path = mix(tmp_path, a=lengths)
        assert gather_selection(Letters(), path, 0) == []
        assert "mix.jsonl: none, plans are not compared (" in capsys.readouterr().err
        assert gather(Letters(), path, "calibration", 50, 0).sequences
        assert gather(Letters(), path, "heldout", 50, 0).sequences
    monkeypatch.setattr(texts, "SELECTION_TOKENS", 63)
    assert gather_selection(Letters(), mix(tmp_path, a=[99] * 3, b=[99] * 3), 0) == []
    assert "63 calibration tokens are too few" in capsys.readouterr().err


@pytest.mark.parametrize(("held_out", "most"), [(1000, 1000), (100_000, 4096)])
def test_plans_are_chosen_by_no_more_text_than_the_result_is_judged_on(
    monkeypatch: pytest.MonkeyPatch, held_out: int, most: int
) -> None:
    monkeypatch.setattr(texts, "SELECTION_TOKENS", 4096)
    found = gather_selection(Letters(), None, 0, held_out)
    assert 0.9 * most < sum(len(s.tokens) for s in found) <= most


def test_rows_too_short_are_left_out_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("optiq.base.lines.EVERY", 0)
    assert gather_selection(Letters(), mix(tmp_path, a=[99, 3, 99]), 0) == []
    assert "no calibration rows of 8 tokens or more" in capsys.readouterr().err
    gather(Letters(), mix(tmp_path, a=[99, 3, 5, 99, 99]), "calibration", 50, 0)
    told = capsys.readouterr().err
    assert "calibration text of mix.jsonl: left out 2 rows under 8 tokens (lines 2, 3)" in told


def test_of_one_row_nothing_can_be_held_out(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"mix.jsonl has a single row of each domain"):
        gather(Letters(), mix(tmp_path, a=[99], b=[99]), "heldout", 64, 0)
