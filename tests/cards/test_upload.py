"""Uploads to a hub that is a stand-in on this machine; each case is a process of its own, because
huggingface_hub reads its settings when it is imported."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from optiq.quantize.convert import convert
from tests.tiny import tiny_folder

CODE = "import sys; from optiq.cli import main; sys.exit(main())"


class Hub(ThreadingHTTPServer):
    """Knows the token "good", and keeps what is committed; `large` files are sent by themselves."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.created: list[dict[str, object]] = []
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == "Bearer good"
            self.reply(200 if known else 401, {"name": "org"} if known else {"error": "who?"})
        elif path.startswith("/api/models/"):
            name = path.removeprefix("/api/models/").split("/revision")[0].split("/tree")[0]
            self.reply(
                200, [] if "/tree" in path else {"id": name, "sha": "0" * 40, "siblings": []}
            )
        else:
            self.reply(404, {"error": "no such page"})

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        self.server.objects[urlsplit(self.path).path.rpartition("/")[2]] = self.body()
        self.reply(200, {})

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self.body()
        if path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.reply(200, {"url": f"{self.server.url}/org/small"})
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if name.endswith(".safetensors") else "regular" for name in names]
            files = [
                {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": None}
                for name, mode in zip(names, modes, strict=True)
            ]
            self.reply(200, {"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self.reply(200, {"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[value["path"]] = self.server.objects[value["oid"]]
            url = f"{self.server.url}/org/small/commit/{'1' * 40}"
            self.reply(200, {"success": True, "commitOid": "1" * 40, "commitUrl": url})
        else:
            self.reply(200, {})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def reply(self, status: int, data: object) -> None:
        content = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("upload")
    tiny_folder(home, name="model")
    convert(home / "model", home / "out", tokens=320, held_out_tokens=320, progress=False)
    return home


def optiq(home: Path, hub: Hub, token: str, *argv: str) -> subprocess.CompletedProcess[str]:
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": token,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "no_proxy": "127.0.0.1",
    }
    return subprocess.run(
        [sys.executable, "-c", CODE, *argv],
        cwd=home,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_model_and_its_card_arrive_whole(home: Path, hub: Hub) -> None:
    (home / "out" / ".DS_Store").write_text("x")
    done = optiq(home, hub, "good", "card", "out", "--upload-repo", "org/small", "--private")
    assert done.returncode == 0, done.stderr
    assert f"uploaded   {hub.url}/org/small" in done.stdout
    assert hub.created[0]["visibility"] == "private"
    assert [made["name"] for made in hub.created] == ["small"]
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        sent = hashlib.sha256(hub.files[name]).digest()
        assert sent == hashlib.sha256((home / "out" / name).read_bytes()).digest()
    assert hub.files["README.md"].decode().partition("\n# ")[2].startswith("org/small\n")
    assert ".DS_Store" not in hub.files
    plan = json.loads((home / "out/optiq/plan.json").read_text())
    assert plan["model"].pop("path") == str(home / "model")
    assert json.loads(hub.files["optiq/plan.json"]) == plan


def test_a_stranger_is_told_before_any_work(home: Path, hub: Hub) -> None:
    job = ["convert", "model", "-o", "new", "--upload-repo", "org/small", "--quiet"]
    done = optiq(home, hub, "bad", *job)
    assert done.returncode == 1
    assert "the hub does not know you" in done.stderr
    assert "hf auth login" in done.stderr
    assert not hub.created
    assert not (home / "new").exists()
    done = optiq(home, hub, "good", *job[:-2], "small", "--quiet")
    assert done.returncode == 2
