"""Calibration takes what people have: plain text, JSON Lines of several shapes, a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optiq.calibration import gather, load_rows, split
from optiq.calibration.files import SAMPLE
from optiq.calibration.rows import DOMAIN
from optiq.errors import CalibrationError

from .test_texts import Letters

SENTENCE = "The evening light reached the river and it turned silver. "


def paragraphs(count: int) -> list[str]:
    return [(f"Paragraph {n}. " + SENTENCE * 10).strip() for n in range(count)]


@pytest.mark.parametrize("name", ["book.txt", "notes.md", "BOOK.TXT"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_plain_text_becomes_rows_of_whole_paragraphs(
    tmp_path: Path, name: str, newline: str
) -> None:
    said = paragraphs(40)
    file = tmp_path / name
    file.write_bytes((newline * 2).join(said).encode())
    rows = load_rows(file)
    assert "\n\n".join(row["text"] for row in rows).split("\n\n") == said
    assert all(len(row["text"]) >= SAMPLE for row in rows[:-1])
    assert {row["domain"] for row in rows} == {DOMAIN}
    assert rows[1]["line"] == 2 * rows[0]["text"].count("Paragraph") + 1
    assert all(split(rows, which) for which in ("calibration", "selection", "heldout"))


def test_a_short_rest_is_a_part_of_the_row_before(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join([SENTENCE * 40, "The end.", "", ""]))
    (row,) = load_rows(file)
    assert row["text"].endswith("The end.")
    file.write_text("Short, and all there is.")
    assert [row["text"] for row in load_rows(file)] == ["Short, and all there is."]


def test_rows_of_every_shape(tmp_path: Path) -> None:
    file = tmp_path / "mix.jsonl"
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    shapes = [{"text": "hi"}, {"messages": chat}, {"prompt": "Why?", "completion": "Because."}]
    file.write_text("".join(json.dumps(row) + "\n" for row in shapes))
    text, messages, question = load_rows(file)
    assert (text["text"], text["domain"]) == ("hi", DOMAIN)
    assert messages["messages"] == question["messages"] == chat
    assert "prompt" not in question


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two", "domain": "d"}\n')
    (tmp_path / "b" / "c.txt").write_text("three")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    rows = load_rows(tmp_path)
    assert [row["text"] for row in rows] == ["one", "two", "three"]
    assert [row["line"] for row in rows] == [1, 2, 3]
    (tmp_path / "b" / "c.txt").write_bytes(b"\xff")
    with pytest.raises(CalibrationError, match=r"b/c.txt line 1: not UTF-8"):
        load_rows(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        CalibrationError, match=r"empty: no rows; expected files with text \(.jsonl"
    ):
        load_rows(tmp_path / "empty")


def test_plain_text_under_another_name_says_how_to_give_it(tmp_path: Path) -> None:
    file = tmp_path / "words"
    file.write_text("Just words.")
    with pytest.raises(CalibrationError, match=r"not JSON .*; give plain text a name .* \.txt"):
        load_rows(file)


def test_all_three_texts_come_from_a_book(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("\n\n".join(paragraphs(60)))
    parts = [gather(Letters(), file, which, 400, 0) for which in ("calibration", "heldout")]
    assert all(sum(len(s.tokens) for s in part.sequences) == 400 for part in parts)
    lines = [{s.line for s in part.sequences} for part in parts]
    assert not lines[0] & lines[1]
