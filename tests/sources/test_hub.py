"""The hub, as a stand-in server on this machine: huggingface_hub reads its settings when it is
imported, so each case is a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from optiq.sources.beside import NEEDED
from optiq.sources.hub import is_repo_id
from tests.tiny import tiny_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TAGGED = "fedcba9876543210fedcba9876543210fedcba98"
REVISIONS = {"main": COMMIT, "v1": TAGGED, COMMIT: COMMIT, TAGGED: TAGGED}
PROGRAM = """
import json, sys
from optiq.errors import SourceError
from optiq.sources import hub, load, resolve
hub.TIMEOUT_SECONDS = 1
try:
    source = resolve(sys.argv[1], revision=sys.argv[2] or None)
    dtype = str(load(source).dtype)
    print(json.dumps([source.kind, str(source.path), source.revision, dtype]))
except SourceError as error:
    print(json.dumps(str(error)))
"""


class Hub(ThreadingHTTPServer):
    """Serves `folder` as tiny/llama; tiny/gated is gated, all else does not exist."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.downloads: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def answer(self, with_body: bool) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        if parts[:3] == ["api", "models", "tiny"] and parts[3] == "gated":
            self.reply(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        elif parts[:4] == ["api", "models", "tiny", "llama"]:
            what, revision = parts[4:6] or ("revision", "main")
            commit = REVISIONS.get(revision)
            if commit is None:
                self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
            elif what == "revision":
                info = {"id": "tiny/llama", "sha": commit, "siblings": []}
                self.reply(200, json.dumps(info).encode(), {})
            else:
                self.reply(200, json.dumps(self.tree()).encode(), {})
        elif parts[:3] == ["tiny", "llama", "resolve"]:
            data = (self.server.folder / parts[4]).read_bytes()
            headers = {
                "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Repo-Commit": REVISIONS[parts[3]],
            }
            if with_body:
                self.server.downloads.append(parts[4])
            self.reply(200, data, headers, with_body)
        else:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})

    def tree(self) -> list[dict[str, object]]:
        return [
            {
                "type": "file",
                "path": file.name,
                "size": file.stat().st_size,
                "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
            }
            for file in sorted(self.server.folder.iterdir())
        ]

    def reply(
        self, status: int, body: bytes, headers: dict[str, str], with_body: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """No log."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tiny_folder(tmp_path_factory.mktemp("hub"), dtype="bfloat16", shards=2)
    (folder / "README.md").write_text("the model card")
    (folder / "LICENSE").write_text("the licence")
    (folder / "notes.md").write_text("not part of the model")
    (folder / "pytorch_model.bin").write_bytes(bytes(1000))
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def dead_url() -> str:
    """An address on this machine where nobody answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def run(name: str, revision: str, home: Path, url: str, **env: str) -> list[str] | str:
    """What a fresh process resolves and loads, or its error line; 60 s at most."""
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_DISABLE_TELEMETRY": "1"}
    for key in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        kept.pop(key, None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, name, revision],
        env={**kept, **settings, **env, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(answer, list) or "\n" not in answer
    return answer


def test_download_then_cache_then_offline(hub: Hub, dead_url: str, tmp_path: Path) -> None:
    first = run("tiny/llama", "", tmp_path, hub.url)
    kind, path, commit, dtype = first
    assert (kind, commit, dtype) == ("hub", COMMIT, "mlx.core.bfloat16")
    wanted = {
        "LICENSE",
        "README.md",
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {file.name for file in Path(path).iterdir()} == wanted
    assert sorted(hub.downloads) == sorted(wanted)
    assert run("tiny/llama", "", tmp_path, hub.url) == first
    assert len(hub.downloads) == len(wanted)
    assert run("tiny/llama", "", tmp_path, dead_url) == first
    assert run("tiny/llama", "", tmp_path, dead_url, HF_HUB_OFFLINE="1") == first
    error = run("tiny/llama", "v1", tmp_path, dead_url)
    assert "tiny/llama@v1 is not a folder here nor in the hub's cache" in error
    assert run("tiny/llama", "v1", tmp_path, hub.url)[2] == TAGGED


def test_what_the_hub_refuses(hub: Hub, tmp_path: Path) -> None:
    assert "tiny/llama has no revision 'v9'" in run("tiny/llama", "v9", tmp_path, hub.url)
    error = run("tiny/rocket", "", tmp_path, hub.url)
    assert f"tiny/rocket is neither a folder here nor a model at {hub.url}" in error
    assert "tiny/gated is gated" in run("tiny/gated", "", tmp_path, hub.url)


def test_no_network_and_no_cache_says_what_to_do(dead_url: str, tmp_path: Path) -> None:
    error = run("tiny/llama", "", tmp_path, dead_url)
    assert f"{dead_url} cannot be reached; give a folder, or set HF_ENDPOINT" in error
    error = run("tiny/llama", "", tmp_path, dead_url, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in error


def test_a_silent_server_is_not_waited_for(hub: Hub, tmp_path: Path) -> None:
    first = run("tiny/llama", "", tmp_path, hub.url)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert run("tiny/llama", "", tmp_path, url) == first
        error = run("tiny/llama", "v1", tmp_path, url)
        assert f"{url} cannot be reached" in error


def test_the_files_are_those_that_mlx_lm_downloads() -> None:
    utils = pytest.importorskip("mlx_lm.utils")
    assert getattr(utils, "DEFAULT_ALLOW_PATTERNS", list(NEEDED)) == list(NEEDED)


def test_a_snapshot_of_mlx_lm_is_complete_offline(hub: Hub, dead_url: str, tmp_path: Path) -> None:
    """It has no licence."""
    path, *_ = run("tiny/llama", "", tmp_path, hub.url)[1:]
    for name in ("LICENSE", "README.md"):
        (Path(path) / name).unlink()
    assert run("tiny/llama", "", tmp_path, dead_url)[1] == path


@pytest.mark.parametrize("name", ["org/name", "Qwen/Qwen3-0.6B", "a_b/c.d-e"])
def test_hub_ids(name: str) -> None:
    assert is_repo_id(name)


@pytest.mark.parametrize("name", ["name", "/a/b", "./a", "../a", "a/b/c", "a/", "~/a", "a b/c"])
def test_not_hub_ids(name: str) -> None:
    assert not is_repo_id(name)
