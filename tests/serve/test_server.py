"""The life of a server: what it refuses to start with, how it stops, and the command."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import optiq
from optiq.cli import main
from optiq.errors import ServeError, SourceError, UsageError
from optiq.serve.http.log import log_to_stderr
from optiq.serve.opening import _name, check_libraries
from optiq.serve.options import Options
from optiq.serve.server import Server
from tests.serve.servers import (
    chat_body,
    content_of,
    doubled,
    message_body,
    scripted,
    wait_until,
)
from tests.tiny import tiny_folder

CHAT = "/v1/chat/completions"
CODE = "import sys; from optiq.cli import main; sys.exit(main())"


def in_thread(work: Any) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    return thread, results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("served"))


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    logger = logging.getLogger("optiq.serve")
    handlers, propagate = list(logger.handlers), logger.propagate
    yield
    logger.handlers, logger.propagate = handlers, propagate


def test_streams_finish_when_the_server_stops() -> None:
    with scripted() as asked:
        thread, results = in_thread(lambda: asked.chunks("SAY(delay=0.02):One two three four"))
        wait_until(lambda: asked.engine.stats().running)
        asked.server.stop(30)
        thread.join()
        assert content_of(results[0]) == "One two three four"
        assert results[0][-1].choices[0].finish_reason == "stop"
        with pytest.raises(httpx.ConnectError):
            asked.http.get("/health")


def test_streams_are_told_when_they_cannot_finish() -> None:
    with scripted() as asked:
        say = "SAY(delay=0.2):" + "word " * 30
        openai, told = in_thread(lambda: asked.events(CHAT, chat_body(say, stream=True)))
        body = message_body(say, stream=True)
        anthropic, told_too = in_thread(lambda: asked.events("/v1/messages", body))
        plain, answered = in_thread(lambda: asked.http.post(CHAT, json=chat_body(say)))
        wait_until(lambda: asked.engine.stats().running == 3)
        asked.server.stop(0)
        for thread in (openai, anthropic, plain):
            thread.join()
        assert "error" in json.loads(told[0][-2])
        assert told[0][-1] == "[DONE]"
        assert json.loads(told_too[0][-1])["type"] == "error"
        assert answered[0].status_code >= 500


def test_a_stopping_server_takes_nothing_new() -> None:
    with doubled() as asked:
        assert asked.http.get("/ready").status_code == 200
        asked.server._state.stopping = True
        assert asked.http.get("/ready").status_code == 503
        assert asked.http.get("/health").status_code == 200
        answer = asked.http.post(CHAT, json=chat_body())
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert asked.http.post("/v1/messages", json=message_body()).status_code == 529


def test_it_is_not_ready_while_the_engine_is_not() -> None:
    with doubled() as asked:
        asked.engine._engine.ready = False
        assert asked.http.get("/ready").status_code == 503
        assert asked.http.get("/health").status_code == 200


def test_it_says_that_it_cannot_go_on() -> None:
    with doubled() as asked:
        asked.engine._engine.fault = "the server lost a rank (rank 1 died); ask again"
        told = asked.http.get("/health")
        assert (told.status_code, told.json()["status"]) == (503, "failed")
        assert "rank 1 died" in told.json()["reason"]


def test_nothing_is_left_behind() -> None:
    def count() -> tuple[int, int]:
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    with scripted() as asked:  # what is made once in a process
        asked.chat()
    before = count()
    for _ in range(3):
        with scripted() as asked:
            asked.chat()
            asked.chunks()
    # Threads take a moment to end, also those of tests before this one.
    wait_until(lambda: all(now <= then for now, then in zip(count(), before, strict=True)))


def test_a_busy_port_is_refused_before_the_model_is_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UsageError, match=f"127.0.0.1:{port} cannot be listened on.*--port"):
            Server.open("/no/such/model", port=port)


def test_a_model_that_cannot_be_loaded_gives_the_port_back(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    (tmp_path / "config.json").write_text("{}")
    for model in ("/no/such/model", str(tmp_path)):
        with pytest.raises(SourceError):
            Server.open(model, port=port)
        socket.create_server(("127.0.0.1", port)).close()


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optiq.serve.opening._LIBRARIES", ("starlette", "nolib", "json"))
    with pytest.raises(ServeError, match=r"needs nolib; pip install 'optiq-mlx\[serve\]'"):
        check_libraries()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "needs a key: --api-key-file"),
        ({"host": "192.168.0.7"}, "needs a key"),
        ({"host": "example.com"}, "needs a key"),
        ({"api_keys": ("short",)}, "8 or more"),
        ({"api_keys": ("späße sind frei",)}, "ASCII"),
        ({"cors_origins": ("*",)}, "every web page"),
        ({"port": 70000}, "65535"),
        ({"port": -1}, "at least 0"),
        ({"drain": -1.0}, "at least 0"),
        ({"drain": float("nan")}, "at least 0"),
        ({"max_concurrent": 0}, "at least 1"),
        ({"body_bytes": 5}, "at least 1024"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Options(**options)


def test_options_that_are_good() -> None:
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        assert Options(host=host).loopback
    assert not Options(host="0.0.0.0", api_keys=("a-good-key",)).loopback


def test_a_model_by_its_folder(folder: Path) -> None:
    with Server.open(folder, port=0, drain=0.0) as server:
        name = folder.name
        assert f'base_url="{server.url}/v1"' in server.greeting()
        assert f'model="{name}"' in server.greeting()
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
            answer = client.post(CHAT, json=chat_body(model=name, max_tokens=4))
            assert answer.status_code == 200
            assert answer.json()["model"] == name


def test_prompts_outlive_a_restart(folder: Path, tmp_path: Path) -> None:
    cached = []
    for _ in range(2):
        with (
            Server.open(folder, port=0, drain=0.0, prefix_cache=tmp_path / "kept") as server,
            httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client,
        ):
            body = chat_body("A long story " * 12, model=folder.name, max_tokens=2)
            usage = client.post(CHAT, json=body).json()["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert cached[0] == 0
    assert cached[1] > 60


def test_what_a_model_in_memory_cannot_have(folder: Path) -> None:
    loaded: Any = (None, None)
    with pytest.raises(UsageError, match="given by its name"):
        Server.open(loaded, port=0, kv="8/4")


def test_names_of_models() -> None:
    for given, kind, name in (
        ("Qwen/Qwen3-0.6B", "hub", "Qwen/Qwen3-0.6B"),
        ("/models/Qwen3-0.6B", "folder", "Qwen3-0.6B"),
        ("/models/Qwen3-0.6B.gguf", "gguf", "Qwen3-0.6B"),
    ):
        assert _name(given, kind) == name


def test_optiq_serve_is_a_package_and_a_function() -> None:
    assert callable(optiq.serve)
    with pytest.raises(UsageError, match="needs a key"):
        optiq.serve("model", host="0.0.0.0")
    assert "serve" in optiq.__all__


def run(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CODE, "serve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def test_the_command_serves_until_sigterm(folder: Path) -> None:
    """A stream that is being sent finishes; the log has no words of it."""
    process = run(str(folder), "--port", "0", "--name", "m", OPTIQ_API_KEY="from-the-environment")
    assert process.stdout is not None
    first = process.stdout.readline()
    url = first.split(" at ")[1].split(",")[0]
    headers = {"authorization": "Bearer from-the-environment"}
    with httpx.Client(base_url=url, timeout=60, trust_env=False, headers=headers) as client:
        assert client.get("/v1/models", headers={"authorization": "no"}).status_code == 401
        # EOS is banned, so that the answer is as long as it may be
        body = chat_body("zebra", model="m", max_tokens=200, stream=True, logit_bias={"3": -100})
        with client.stream("POST", CHAT, json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            events = [line for line in lines if line]
    assert events[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in events[-2]
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "from-the-environment" not in first + out + err
    assert "zebra" not in err
    paths = [json.loads(line)["path"] for line in err.splitlines() if line.startswith("{")]
    assert paths == ["/v1/models", CHAT]


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "keys"
    empty.write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        for arguments, message in (
            (("model", "--host", "0.0.0.0"), "needs a key"),
            (("model", "--api-key-file", str(empty)), "has no key"),
            (("model", "--api-key-file", "/no/such/file"), "cannot be read"),
            (("model", "--port", port), "cannot be listened on"),
            (("model", "--memory", "lots"), "not understood"),
            (("model", "--memory", "4bpw"), "not a number of bytes"),
        ):
            assert main(["serve", *arguments]) == 2
            assert message in capsys.readouterr().err
    assert main(["serve", "/no/such/model", "--port", "0"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_the_log_is_shown_once() -> None:
    log_to_stderr()
    log_to_stderr()
    assert len(logging.getLogger("optiq.serve").handlers) == 1
