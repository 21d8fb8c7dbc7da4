"""Reading and validating rows: every fault is one line that names the file and the line."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiq.calibration import load_rows, split
from optiq.calibration.rows import SPLITS
from optiq.errors import CalibrationError

TEXT = {"domain": "prose", "text": "Rain fell on the tin roof."}


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"domain": "agent", "messages": list(messages), **more}


def user(content: Any = "hello") -> dict[str, Any]:
    return {"role": "user", "content": content}


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    function = {"name": "look", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"function": function, **more}]}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return path


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "the row is a list"),
        ('"hi"', "the row is a string"),
        ("NaN", "NaN is not a JSON number"),
        ("[" * 5000, "nested too deeply"),
        ('{"domain": "x", "text": "\\ud800"}', "surrogate"),
        ({"prompt": "a"}, "completion is missing"),
        ({"prompt": "", "completion": "b"}, "prompt is ''"),
        ({"prompt": ["a"], "completion": "b"}, "prompt is a list"),
        ({"domain": " ", "text": "a"}, "domain is ' '"),
        ({"domain": 3, "text": "a"}, "domain is a number"),
        ({"domain": "x"}, "neither text nor messages"),
        ({"domain": "x", "text": "a", "messages": []}, "both text and messages"),
        ({"domain": "x", "text": ""}, "text is ''"),
        ({"domain": "x", "text": ["a"]}, "text is a list"),
        ({"domain": "x", "text": "a", "tools": []}, "a text row has tools"),
        (chat(), "messages is empty"),
        ({"domain": "x", "messages": {}}, "messages is an object"),
        (chat("hi"), "messages[0] is a string"),
        (chat(user(), {"role": "robot", "content": "a"}), "messages[1].role is 'robot'"),
        (chat({"content": "a"}), "messages[0].role is missing"),
        (chat(user(None)), "messages[0] has no content"),
        (chat(user([{"type": "text", "text": "a"}])), "messages[0].content is a list"),
        (chat({"role": "assistant", "content": None}), "messages[0] has no content"),
        (chat({**call({}), "role": "user"}), "tool_calls in a user turn"),
        (chat({"role": "assistant", "tool_calls": []}), "tool_calls is empty"),
        (chat({"role": "assistant", "tool_calls": {}}), "tool_calls is an object"),
        (chat({"role": "assistant", "tool_calls": [{"name": "f"}]}), "has no function name"),
        (chat(call([1])), "function.arguments is a list"),
        (chat(call(None)), "function.arguments is missing"),
        (chat(call("{")), "function.arguments is not JSON text"),
        (chat(call({}, id=7)), "tool_calls[0].id is a number"),
        (chat({"role": "tool", "content": "a", "tool_call_id": "b"}), "tool_call_id is 'b'"),
        (chat(user(), tools={}), "tools is an object"),
        (chat(user(), tools=[{"name": "f"}]), "tools[0] has no function name"),
        (chat(user(), tools=[{"function": {"name": ""}}]), "tools[0] has no function name"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "mix.jsonl", TEXT, "", row)
    with pytest.raises(CalibrationError) as fault:
        load_rows(path)
    text = str(fault.value)
    assert text.startswith(f"{path} line 3: ")
    assert message in text
    assert "; expected " in text
    assert "\n" not in text


def test_good_rows_keep_their_line_and_get_dict_arguments(tmp_path: Path) -> None:
    turns = [user(), call('{"far": 2}', id="c1")]
    answer = {"role": "tool", "content": "fog", "tool_call_id": "c1", "name": "look"}
    tools = [{"type": "function", "function": {"name": "look"}}]
    path = write(tmp_path / "mix.jsonl", "", TEXT, chat(*turns, answer, tools=tools))
    text, talk = load_rows(path)
    assert text == {**TEXT, "line": 2}
    assert talk["line"] == 3
    assert talk["tools"] == tools
    assert talk["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"far": 2}


def test_a_byte_order_mark_and_windows_line_ends_are_harmless(tmp_path: Path) -> None:
    path = tmp_path / "mix.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(TEXT).encode() + b"\r\n")
    assert load_rows(path) == [{**TEXT, "line": 1}]


def test_files_that_hold_no_rows(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.jsonl", "", " ")
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(json.dumps(TEXT).encode() + b"\n\xe9\n")
    for path, message in [
        (empty, "no rows"),
        (tmp_path / "absent.jsonl", "cannot be read (No such file or directory)"),
        (latin, "line 2: not UTF-8"),
        ("a\0b", "cannot be read"),
    ]:
        with pytest.raises(CalibrationError) as fault:
            load_rows(path)
        assert message in str(fault.value)
        assert "expected" in str(fault.value)


def test_split_gives_each_row_one_part() -> None:
    rows = [{"domain": d, "n": n} for n in range(32) for d in ("a", "b")]
    for domain, count in (("short", 3), ("two", 2), ("one", 1)):
        rows += [{"domain": domain, "n": n} for n in range(count)]
    parts = {which: split(rows, which) for which in SPLITS}

    def places(which: str, domain: str) -> list[int]:
        return [row["n"] for row in parts[which] if row["domain"] == domain]

    for domain in ("a", "b"):
        assert places("heldout", domain) == [7, 15, 23, 31]
        assert places("selection", domain) == [3, 11, 19, 27]
    assert [places(which, "short") for which in SPLITS] == [[0], [1], [2]]
    assert [places(which, "two") for which in SPLITS] == [[0], [], [1]]
    assert [places(which, "one") for which in SPLITS] == [[0], [], []]
    assert all(sum(row in part for part in parts.values()) == 1 for row in rows)
    with pytest.raises(CalibrationError, match="calibration, selection, heldout"):
        split(rows, "test")


def load_bytes(data: bytes) -> None:
    """Loads or refuses with one line that names the file; anything else fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mix.jsonl"
        path.write_bytes(data)
        rows, fault = [], ""
        try:
            rows = load_rows(path)
        except CalibrationError as refusal:
            fault = str(refusal)
        assert bool(rows) != fault.startswith(str(path))
        assert "\n" not in fault
        assert all(("text" in row) != ("messages" in row) for row in rows)


KEYS = st.sampled_from(
    [
        "domain",
        "text",
        "messages",
        "tools",
        "role",
        "content",
        "tool_calls",
        "function",
        "name",
        "id",
    ]
)
WORDS = st.sampled_from(["user", "assistant", "tool", "system", "x", "{}", "", "\ud800"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=6),
    max_leaves=25,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=3))
def test_any_json_loads_or_is_refused(values: list[Any]) -> None:
    load_bytes("\n".join(json.dumps(value) for value in values).encode())


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_load_or_are_refused(data: bytes) -> None:
    load_bytes(data)
