"""Record files: what is written is read, what was torn is cut off, what is foreign is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from optiq.errors import CheckpointError, EvalError
from optiq.evals.records import Header, Record, append, check, create, read, resume

HEADER = Header("gsm8k", "gsm8k/1: x", "m", "f" * 64, "d" * 64, 6, None, {"optiq": "0"})
RECORDS = [
    Record(
        f"test/{i}", "", "a" * 64, f"ans\nwer \u2028 é {i}", {"strict": i % 2 == 0}, "n" * (i % 2)
    )
    for i in range(6)
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "new" / "gsm8k.jsonl"
    create(path, HEADER)
    append(path, RECORDS[:2])
    append(path, RECORDS[2:5])
    return path


def test_round_trip(path: Path) -> None:
    assert read(path) == (HEADER, RECORDS[:5])
    lines = path.read_bytes().split(b"\n")
    assert len(lines) == 7
    assert lines[-1] == b""
    assert "note" not in json.loads(lines[1])
    assert json.loads(lines[2])["note"] == "n"


def test_a_file_is_not_begun_twice(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(EvalError, match=r"holds results already; --resume"):
        create(path, HEADER)
    assert path.read_bytes() == before


def test_a_torn_line_is_left_out_and_cut_off(path: Path) -> None:
    whole = path.read_bytes()
    for size in range(len(whole) - len(RECORDS[4].line().encode()), len(whole)):
        path.write_bytes(whole[:size])
        assert read(path) == (HEADER, RECORDS[:4])
    assert resume(path, HEADER, [2, 4, 6]) == RECORDS[:4]
    append(path, RECORDS[4:5])
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("boundaries", "kept"), [([2, 4, 6], 4), ([3, 6], 3), ([6], 0), ([1, 5, 6], 5), ([], 0)]
)
def test_only_whole_waves_are_kept(path: Path, boundaries: list[int], kept: int) -> None:
    assert resume(path, HEADER, boundaries) == RECORDS[:kept]
    assert read(path) == (HEADER, RECORDS[:kept])
    append(path, RECORDS[kept:])
    assert read(path) == (HEADER, RECORDS)


@pytest.mark.parametrize(
    ("key", "value"),
    [("protocol", "gsm8k/2"), ("fingerprint", "e"), ("limit", 3), ("versions", {}), ("seed", 1)],
)
def test_another_run_is_refused_and_untouched(path: Path, key: str, value: object) -> None:
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=rf"another job \({key}: .* now\)") as error:
        resume(path, replace(HEADER, **{key: value}), [2, 5])
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before


def test_the_same_model_may_be_named_in_another_way(path: Path) -> None:
    check(path, replace(HEADER, model="./m"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no header"),
        (b'{"task": "gsm8k"}\n', "line 1 is not a header"),
        (b"[1]\n", "line 1 is not a header"),
        (b"\xff\n", "line 1 is not a header"),
        (b"HEADER\nnot json\n", "line 2 is not a record"),
        (b'HEADER\n{"id": "a"}\n', "line 2 is not a record"),
        (b"HEADER\n" + b"[" * 100_000 + b"\n", "line 2 is not a record"),
    ],
)
def test_damage_is_named(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content.replace(b"HEADER", path.read_bytes().split(b"\n")[0]))
    with pytest.raises(EvalError, match=message):
        read(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"cannot be read .*; run optiq eval"):
        read(tmp_path / "none.jsonl")
