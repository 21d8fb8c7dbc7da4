"""A wrong version of a peer is a failure; only an index out of reach is a reason to skip."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.peers import packages


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(autouse=True)
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """The only package index, on this machine: all it has is one version of pip."""
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "index.html").write_text('<a href="pip-1.0-py3-none-any.whl">pip</a>')
    (tmp_path / "none").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("PIP_EXTRA_INDEX_URL", (tmp_path / "none").as_uri())
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "none"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("CI", raising=False)
        packages.index_answers.cache_clear()
        yield server
        server.shutdown()
    packages.index_answers.cache_clear()


def outcome(folder: Path) -> str:
    """What becomes of a test that asks for a package that does not exist."""
    try:
        packages.install(folder, "optiq-has-no-such-peer==1")
    except (pytest.fail.Exception, pytest.skip.Exception) as raised:
        return type(raised).__name__
    return "passed"


def test_a_wrong_pin_fails_where_the_index_answers(tmp_path: Path) -> None:
    assert outcome(tmp_path / "to") == "Failed"


def test_no_index_is_a_skip_except_in_ci(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("PIP_RETRIES", "0")
    assert outcome(tmp_path / "to") == "Skipped"
    monkeypatch.setenv("CI", "true")
    assert outcome(tmp_path / "to") == "Failed"
