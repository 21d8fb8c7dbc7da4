"""Checkpoints: the same job goes on, another one is told apart by what differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiq.base import checkpoint
from optiq.errors import CheckpointError, UsageError

KIND = "optiq.test"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=60),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.text(min_size=1), JSON), JSON)
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, identity: dict[str, object], content: object
) -> None:
    path = tmp_path_factory.mktemp("c") / "new" / "c.json"
    checkpoint.write(path, KIND, identity, {"content": content})
    assert checkpoint.read(path, KIND, identity)["content"] == content
    assert checkpoint.read(path, KIND)["identity"] == identity
    assert [p.name for p in path.parent.iterdir()] == ["c.json"]


@given(st.dictionaries(st.text(min_size=1), JSON, min_size=1), st.data())
def test_what_differs_is_named_with_both_values(
    tmp_path_factory: pytest.TempPathFactory, identity: dict[str, object], data: st.DataObject
) -> None:
    key = data.draw(st.sampled_from(sorted(identity)))
    other = data.draw(JSON.filter(lambda value: value != identity[key]))
    path = tmp_path_factory.mktemp("c") / "c.json"
    checkpoint.write(path, KIND, identity, {})
    with pytest.raises(CheckpointError) as error:
        checkpoint.read(path, KIND, identity | {key: other})
    text = str(error.value)
    assert text.startswith(f"{path} belongs to another job ({key}: ")
    assert json.dumps(other)[:37] in text
    assert json.dumps(identity[key])[:37] in text
    assert text.endswith("or use --restart to discard it (restart=True in Python)")


def test_a_key_that_an_earlier_build_did_not_know_differs(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    checkpoint.write(path, KIND, {"seed": 0}, {})
    with pytest.raises(CheckpointError, match=r"another job \(versions: null then, \{\} now\)"):
        checkpoint.read(path, KIND, {"seed": 0, "versions": {}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"is damaged \(not JSON: .*\); start anew with --restart"),
        ("[" * 100_000, "is damaged"),
        ("[]", "is damaged .not a JSON object"),
        ('{"kind": "other"}', "is not a checkpoint of this job; start anew with --restart"),
        ('{"kind": "optiq.test"}', "is damaged .no identity"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=f"c.json {message}") as error:
        checkpoint.read(path, KIND, {})
    assert "\n" not in str(error.value)
    assert path.read_text() == content


def test_unfinished_work_is_not_overwritten(tmp_path: Path) -> None:
    here, absent = tmp_path / "here", tmp_path / "absent"
    here.touch()
    checkpoint.check_unfinished([absent], resume=False)
    checkpoint.check_unfinished([absent, here], resume=True)
    with pytest.raises(UsageError, match=r"here holds unfinished work; --resume goes on"):
        checkpoint.check_unfinished([absent, here], resume=False)


def test_restart_discards_unfinished_work(tmp_path: Path) -> None:
    here, other = tmp_path / "here", tmp_path / "other"
    here.touch()
    other.touch()
    checkpoint.check_unfinished([here], resume=False, restart=True)
    assert [p.name for p in tmp_path.iterdir()] == ["other"]
    with pytest.raises(UsageError, match=r"--resume goes on .* --restart discards it; choose one"):
        checkpoint.check_unfinished([other], resume=True, restart=True)
    assert other.exists()
