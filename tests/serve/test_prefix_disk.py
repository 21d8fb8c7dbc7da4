"""What the prefix cache stored is there after a restart, whatever happened to the disk."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache

from optiq.base.notice import notice
from optiq.errors import ServeError
from optiq.kv.prefix import Key
from optiq.serve.engine.prefix import PrefixCache, disk
from optiq.serve.engine.prefix.cache import SPAN
from tests.serve.test_prefix import (
    CASES,
    ENDS,
    KEY,
    MODELS,
    PLENTY,
    TAIL,
    TOKENS,
    Kept,
    caches_of,
    check,
    empty,
    finish,
    longest,
    read,
    sequences,
)


@contextmanager
def opened(
    folder: Path, nbytes: int = PLENTY, folder_bytes: int = PLENTY, key: Key = KEY
) -> Iterator[PrefixCache]:
    prefix = PrefixCache(key, nbytes, folder, folder_bytes)
    try:
        yield prefix
    finally:
        prefix.close()


@pytest.fixture(autouse=True)
def _notices() -> None:
    notice.cache_clear()


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "lock")


def on_disk(folder: Path) -> int:
    nbytes = 0
    for path in files(folder):
        with suppress(FileNotFoundError):  # moved into place or removed meanwhile
            nbytes += path.stat().st_size
    return nbytes


@pytest.mark.parametrize(("kind", "bits"), CASES)
def test_after_a_restart_a_hit_goes_on_as_a_cold_run(kind: str, bits: str, tmp_path: Path) -> None:
    model = MODELS[bits](kind)
    with opened(tmp_path) as prefix:
        read(model, make_prompt_cache(model), ENDS[-1], prefix)
        stored = prefix.folder_bytes
    assert on_disk(tmp_path) == stored
    with opened(tmp_path) as prefix:
        assert (prefix.folder_bytes, prefix.nbytes) == (stored, 0)
        for end in reversed(ENDS):
            cold = make_prompt_cache(model)
            read(model, cold, end)
            caches, n = prefix.find(TOKENS[:end] + TAIL, lambda: make_prompt_cache(model))
            assert n == end
            assert mx.array_equal(finish(model, caches), finish(model, cold))
            assert prefix.nbytes > 0  # now it is in memory, too


Step = tuple[str, tuple[int, ...]]


def steps() -> st.SearchStrategy[list[Step]]:
    doing = st.sampled_from(["keep", "keep", "find", "restart"])
    return st.lists(st.tuples(doing, sequences()), max_size=14)


@settings(max_examples=40, deadline=None)
@given(steps(), st.booleans(), st.sampled_from([PLENTY, 30_000, 0]))
def test_with_room_on_disk_it_finds_the_longest_prefix(
    steps: list[Step], recurrent: bool, nbytes: int
) -> None:
    kept = Kept()
    with TemporaryDirectory() as folder:
        prefix = PrefixCache(KEY, nbytes, Path(folder), PLENTY)
        for doing, tokens in steps:
            if doing == "keep":
                prefix.keep(tokens, caches_of(tokens, recurrent))
                kept.add(tokens)
            elif doing == "restart":
                prefix.close()
                assert on_disk(Path(folder)) == prefix.folder_bytes
                before = prefix.folder_bytes
                prefix = PrefixCache(KEY, nbytes, Path(folder), PLENTY)
                assert prefix.folder_bytes == before
            found, n = prefix.find(tokens, lambda: empty(recurrent))
            if nbytes == PLENTY:  # else more may wait to be written than is allowed
                assert n == longest(kept, tokens, recurrent)
            assert n <= longest(kept, tokens, recurrent)
            check(found, tokens[:n], recurrent)
            assert prefix.nbytes <= nbytes
        prefix.close()


@settings(max_examples=40, deadline=None)
@given(steps(), st.booleans(), st.integers(0, 60_000))
def test_the_budget_of_the_folder_is_never_passed(
    steps: list[Step], recurrent: bool, budget: int
) -> None:
    kept = Kept()
    with TemporaryDirectory() as name:
        folder = Path(name)
        prefix = PrefixCache(KEY, 20_000, folder, budget)
        for doing, tokens in steps:
            if doing == "keep":
                prefix.keep(tokens, caches_of(tokens, recurrent))
                kept.add(tokens)
            elif doing == "restart":
                prefix.close()
                assert on_disk(folder) == prefix.folder_bytes
                prefix = PrefixCache(KEY, 20_000, folder, budget)
            assert prefix.folder_bytes <= budget
            assert on_disk(folder) <= budget
            found, n = prefix.find(tokens, lambda: empty(recurrent))
            assert n <= longest(kept, tokens, recurrent)
            check(found, tokens[:n], recurrent)
        prefix.close()


LONG = [i % 7 for i in range(2 * SPAN + 40)]  # three blocks


def found_after_restart(folder: Path, tokens: Sequence[int] = LONG, **options: Any) -> int:
    with opened(folder, **options) as prefix:
        caches, n = prefix.find([*tokens, 1], lambda: empty(False))
        check(caches, tokens[:n], False)
    return n


def store(folder: Path, tokens: Sequence[int] = LONG, **options: Any) -> list[Path]:
    """The files of `tokens`, first ones first."""
    with opened(folder, **options) as prefix:
        prefix.keep(tokens, caches_of(tokens, False))
    return sorted(files(folder), key=lambda path: start(path))


def start(path: Path) -> int:
    _, metadata = mx.load(str(path), return_metadata=True)
    return int(json.loads(metadata["optiq"])["start"])


def edit(path: Path, **changes: Any) -> None:
    arrays, metadata = mx.load(str(path), return_metadata=True)
    header = {**json.loads(metadata["optiq"]), **changes}
    mx.eval(arrays)
    mx.save_safetensors(str(path), arrays, {"optiq": json.dumps(header)})


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a flipped bit": flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "no safetensors": lambda path: path.write_bytes(b"\xff" * 4096),
    "a future version": lambda path: edit(path, version=99),
    "another format": lambda path: edit(path, format="other"),
    "another key": lambda path: edit(path, key={"model": "another"}),
    "other tokens": lambda path: edit(path, tokens=[1, 2, 3]),
    "another place": lambda path: edit(path, start=3),
    "no header": lambda path: mx.save_safetensors(str(path), {"x": mx.zeros(3)}),
    "a header of another type": lambda path: edit(path, tokens=5),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_ignored_with_one_warning_and_removed(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, second, third = store(tmp_path)
    DAMAGES[damage](second)
    DAMAGES[damage](third)
    assert found_after_restart(tmp_path) == SPAN
    assert capsys.readouterr().err.count("they are removed") == 1
    assert len(files(tmp_path)) == 1
    store(tmp_path)
    assert found_after_restart(tmp_path) == len(LONG)


def test_files_that_lead_nowhere_are_removed(tmp_path: Path) -> None:
    first, *_ = store(tmp_path)
    first.unlink()
    (first.parent / ".1234.partial").write_bytes(b"of a server that was killed")
    assert found_after_restart(tmp_path) == 0
    assert files(tmp_path) == []


def test_files_removed_by_others_are_not_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, second, _ = store(tmp_path)
    with opened(tmp_path) as prefix:
        second.unlink()
        assert prefix.find([*LONG, 1], lambda: empty(False))[1] == SPAN
        prefix.keep(LONG, caches_of(LONG, False))
    assert found_after_restart(tmp_path) == len(LONG)
    assert capsys.readouterr().err == ""


def test_a_full_disk_leaves_the_cache_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store(tmp_path)

    def full(*paths: Path) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    other = [5] * 300
    with monkeypatch.context() as patch, opened(tmp_path) as prefix:
        patch.setattr(disk, "whole", full)  # until all is written that waits
        for _ in range(2):
            prefix.keep(other, caches_of(other, False))
            prefix.keep(LONG[:99] + other, caches_of(LONG[:99] + other, False))
        assert prefix.find([*other, 1], lambda: empty(False))[1] == len(other)
        assert prefix.find([*LONG, 1], lambda: empty(False))[1] == len(LONG)
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert found_after_restart(tmp_path) == len(LONG)
    assert found_after_restart(tmp_path, other) == 0


def test_a_slow_disk_blocks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, written = threading.Event(), disk.whole

    def slow(*paths: Path) -> Any:
        assert go_on.wait(60)
        return written(*paths)

    monkeypatch.setattr(disk, "whole", slow)
    with opened(tmp_path) as prefix:
        prefix.keep(LONG, caches_of(LONG, False))
        assert files(tmp_path) == []
        assert prefix.find([*LONG, 1], lambda: empty(False))[1] == len(LONG)
        go_on.set()
    assert found_after_restart(tmp_path) == len(LONG)


def test_what_waits_to_be_written_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, written = threading.Event(), disk.whole

    def slow(*paths: Path) -> Any:
        assert go_on.wait(60)
        return written(*paths)

    monkeypatch.setattr(disk, "whole", slow)
    with opened(tmp_path, nbytes=2 * SPAN * 48) as prefix:  # two blocks wait
        prefix.keep(LONG, caches_of(LONG, False))
        go_on.set()
    assert found_after_restart(tmp_path) == 2 * SPAN


def test_one_server_for_each_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with opened(tmp_path) as first:
        first.keep(LONG, caches_of(LONG, False))
        with opened(tmp_path) as second:
            assert "in use by another server" in capsys.readouterr().err
            second.keep([3] * 50, caches_of([3] * 50, False))
            assert second.find([3] * 50, lambda: empty(False))[1] == 49
            assert second.folder_bytes == 0
    assert found_after_restart(tmp_path) == len(LONG)
    assert found_after_restart(tmp_path, [3] * 50) == 0


def test_a_killed_server_leaves_whole_files(tmp_path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from optiq.serve.engine.prefix import PrefixCache
from tests.serve.test_prefix import KEY, PLENTY, caches_of
prefix = PrefixCache(KEY, PLENTY, Path({str(tmp_path)!r}), PLENTY)
tokens = [i % 11 for i in range(20_000)]
prefix.keep(tokens, caches_of(tokens, False))
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], timeout=120)
    tokens = [i % 11 for i in range(20_000)]
    n = found_after_restart(tmp_path, tokens)
    assert n % SPAN == 0 or n == len(tokens)
    assert len(files(tmp_path)) == -(-n // SPAN)


def test_keys_are_never_mixed_and_count_together(tmp_path: Path) -> None:
    keys = [KEY, Key("other", config="config"), Key("model", "adapter", "config"), Key("model")]
    for key in keys[:3]:
        store(tmp_path, key=key)
        assert found_after_restart(tmp_path, key=key) == len(LONG)
    nbytes = on_disk(tmp_path) // 3
    assert found_after_restart(tmp_path, key=keys[3]) == 0
    # With room for two, the folder that was used last stays beside that of the fourth key.
    store(tmp_path, key=keys[3], folder_bytes=2 * nbytes + 100)
    assert on_disk(tmp_path) <= 2 * nbytes + 100
    there = [found_after_restart(tmp_path, key=key) for key in keys]
    assert there == [0, 0, len(LONG), len(LONG)]


def test_the_least_recently_used_goes_first_after_a_restart_too(tmp_path: Path) -> None:
    kept = [[i] * 60 for i in range(3)]
    for tokens in kept[:2]:
        store(tmp_path, tokens)
    nbytes = on_disk(tmp_path) // 2
    old, new = 1e9, 2e9
    for path in files(tmp_path):
        os.utime(path, (old, old))
    assert found_after_restart(tmp_path, kept[0]) == 60  # used now
    assert max(p.stat().st_mtime for p in files(tmp_path)) > new - 1e9
    store(tmp_path, kept[2], folder_bytes=2 * nbytes + 100)
    assert [found_after_restart(tmp_path, tokens) for tokens in kept] == [60, 0, 60]


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ServeError, match="name another folder"):
        PrefixCache(KEY, PLENTY, tmp_path / "file", PLENTY)


def test_nothing_is_left(tmp_path: Path) -> None:
    def left() -> tuple[int, int]:
        return threading.active_count(), len(list(Path("/dev/fd").iterdir()))

    store(tmp_path)
    before = left()
    for _ in range(3):
        store(tmp_path)
        assert found_after_restart(tmp_path) == len(LONG)
    assert left() == before
