"""Files of calibration text: JSON Lines, plain text, or a folder of both."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import CalibrationError
from .rows import DOMAIN, Row, check_row, parse

BUNDLED = Path(__file__).with_name("optiq.jsonl")

JSON_LINES, PLAIN = (".jsonl", ".json", ".ndjson"), (".txt", ".md", ".text")
SAMPLE = 1500  # characters of plain text in a row, at least: some 400 tokens


def load_rows(
    path: str | os.PathLike[str] | None = None, check: Callable[[object], Row] = check_row
) -> list[Row]:
    """Rows of the file at `path` (None: the bundled mix), each with its 1-based `line`.

    A file whose name ends in .txt, .md or .text is plain text, of which paragraphs make rows; any
    other is JSON Lines. Of a folder all files with such names are read, in the order of their
    names; their rows are numbered on. Blank lines are skipped. `check` makes a row of a value, or
    raises CalibrationError; rows of `check_row` have tool-call arguments as a dict.

    Raises CalibrationError "PATH line N: what is wrong; what is expected" at the first bad row,
    and for a file that cannot be read, is not UTF-8, or holds no rows.
    """
    where = BUNDLED if path is None else Path(path)
    if where.is_dir():
        known = (*JSON_LINES, *PLAIN)
        files = sorted(f for f in where.rglob("*") if f.suffix.lower() in known and f.is_file())
        found = [row for file in files for row in _rows(file, check)]
        rows = [{**row, "line": number} for number, row in enumerate(found, start=1)]
        expected = f"files with text ({', '.join(known)})"
    else:
        rows = list(_rows(where, check))
        expected = "text, or JSON Lines with one sample on each line"
    if not rows:
        raise CalibrationError(f"{where}: no rows; expected {expected}")
    return rows


def _rows(where: Path, check: Callable[[object], Row]) -> Iterator[Row]:
    text = _read(where)
    if where.suffix.lower() in PLAIN:
        yield from _paragraphs(text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield {**check(parse(line)), "line": number}
        except CalibrationError as fault:
            plain = "; give plain text a name that ends in .txt" if number == 1 else ""
            raise CalibrationError(f"{where} line {number}: {fault}{plain}") from None


def _paragraphs(text: str) -> Iterator[Row]:
    """Whole paragraphs, so many together that a row is long enough; a short rest joins the last."""
    lines = text.replace("\r\n", "\n")
    held: list[Row] = []
    start, size = 0, 0
    for match in re.finditer(r"\n\s*\n|\Z", lines):
        size = match.start() - start
        if size >= SAMPLE or (match.end() == len(lines) and lines[start:].strip()):
            piece = lines[start : match.start()].strip()
            if size < SAMPLE // 4 and held:
                held[-1]["text"] += "\n\n" + piece
            elif piece:
                line = lines.count("\n", 0, start) + 1
                held.append({"domain": DOMAIN, "text": piece, "line": line})
            start = match.end()
    return iter(held)


def _read(where: Path) -> str:
    try:
        data = where.read_bytes()
    except (OSError, ValueError) as fault:
        reason = getattr(fault, "strerror", None) or fault
        raise CalibrationError(
            f"{where}: cannot be read ({reason}); expected a file of text or of JSON Lines"
        ) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        number = data.count(b"\n", 0, fault.start) + 1
        raise CalibrationError(
            f"{where} line {number}: not UTF-8 text; expected text in UTF-8"
        ) from None
