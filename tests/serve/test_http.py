"""HTTP itself: point 17 of OpenAI's list, security, limits, operation. Raw sockets where needed."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.serve.servers import MODEL, Asked, chat_body, doubled, message_body, wait_until

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def hurried() -> Iterator[Asked]:
    """Small limits of size and time."""
    with doubled(body_bytes=10_000, body_seconds=0.4, idle_seconds=0.4) as asked:
        yield asked


def connect(server: Asked) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.server.port), timeout=10)
    connection.settimeout(10)
    return connection


def head(length: int | None = None, **headers: str) -> bytes:
    lines = {"Host": "localhost", "Content-Type": "application/json", **headers}
    if length is not None:
        lines["Content-Length"] = str(length)
    text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {CHAT} HTTP/1.1\r\n{text}\r\n".encode()


def read_all(connection: socket.socket) -> bytes:
    data = b""
    while part := connection.recv(65536):
        data += part
    return data


def read_answer(connection: socket.socket) -> tuple[int, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    found = re.search(rb"content-length: (\d+)", head)
    while found and len(body) < int(found[1]):
        body += connection.recv(65536)
    return int(head.split()[1]), body


def test_openai_17_keep_alive(server: Asked) -> None:
    body = json.dumps(chat_body("SAY:Hi")).encode()
    with connect(server) as connection:
        for _ in range(3):
            connection.sendall(head(len(body)) + body)
            status, answer = read_answer(connection)
            assert status == 200
            assert json.loads(answer)["choices"][0]["message"]["content"] == "Hi"


def test_openai_17_chunked_body(server: Asked) -> None:
    body = json.dumps(chat_body("SAY:Hi")).encode()
    with connect(server) as connection:
        connection.sendall(head(**{"Transfer-Encoding": "chunked"}))
        for i in range(0, len(body), 7):
            part = body[i : i + 7]
            connection.sendall(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert read_answer(connection)[0] == 200


def test_openai_17_bytes_one_by_one(server: Asked) -> None:
    body = json.dumps(chat_body("SAY:Hi")).encode()
    with connect(server) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in head(len(body)) + body:
            connection.sendall(bytes([byte]))
        assert read_answer(connection)[0] == 200


def test_openai_17_pipelined_requests(server: Asked) -> None:
    body = json.dumps(chat_body("SAY:Hi")).encode()
    with connect(server) as connection:
        connection.sendall((head(len(body)) + body) * 2)
        data = b""
        while data.count(b'"finish_reason":"stop"') < 2:
            part = connection.recv(65536)
            assert part
            data += part
    assert data.count(b"HTTP/1.1 200") == 2


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"messages": }',
        b"[]",
        b"5",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"model": "\xed\xa0\x80"}',
        b'{"model": "\\ud800"}',
        b'{"temperature": NaN}',
        b'{"temperature": Infinity}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' + b"[" * 200 + b"]" * 200 + b"}",
        b'{"a":' * 100_000,
        b"\x00",
        b'{"model": "a"} trailing',
    ],
    ids=lambda body: repr(body[:20]),
)
def test_openai_17_bad_bodies(server: Asked, body: bytes) -> None:
    for path in (CHAT, "/v1/messages"):
        headers = {"content-type": "application/json"}
        answer = server.http.post(path, content=body, headers=headers)
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_openai_17_huge_body(hurried: Asked) -> None:
    answer = hurried.http.post(CHAT, json=chat_body("x" * 20_000))
    assert answer.status_code == 413
    assert "10000 bytes" in answer.json()["error"]["message"]
    with connect(hurried) as connection:  # more than it says it has
        connection.sendall(head(10**12))
        assert read_answer(connection)[0] == 413
    with connect(hurried) as connection:  # of unknown length
        connection.sendall(head(**{"Transfer-Encoding": "chunked"}))
        connection.sendall(b"4000\r\n" + b" " * 0x4000 + b"\r\n")
        assert read_answer(connection)[0] == 413
    answer = hurried.http.post("/v1/messages", json=message_body("x" * 20_000))
    assert answer.json()["error"]["type"] == "request_too_large"
    assert hurried.chat("SAY:Hi").choices[0].message.content == "Hi"


def test_openai_17_slow_body(hurried: Asked) -> None:
    with connect(hurried) as connection:
        connection.sendall(head(100) + b'{"model"')
        status, body = read_answer(connection)
        assert status == 408
        assert json.loads(body)["error"]["code"] == "body_timeout"
        assert read_all(connection) == b""  # closed


@pytest.mark.parametrize(
    "start", [b"", b"POST /v1/chat", b"POST / HTTP/1.1\r\nHost: localhost\r\n"]
)
def test_openai_17_slow_headers(hurried: Asked, start: bytes) -> None:
    with connect(hurried) as connection:
        connection.sendall(start)
        assert read_all(connection) == b""


def test_openai_17_slow_headers_after_an_answer(hurried: Asked) -> None:
    with connect(hurried) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert read_answer(connection)[0] == 200
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        assert read_all(connection) == b""


def test_openai_17_huge_headers(server: Asked) -> None:
    for line in (b"X-Long: " + b"a" * 200_000, b"A: b\r\n" * 20_000):
        with connect(server) as connection:
            try:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + line)
                assert b" 400 " in read_all(connection).split(b"\r\n")[0] + b" "
            except ConnectionError:
                pass  # closed while we were sending


@pytest.mark.parametrize("request_line", [b"\x00\x01\x02\r\n\r\n", b"HELLO\r\n\r\n"])
def test_openai_17_what_is_not_http(server: Asked, request_line: bytes) -> None:
    with connect(server) as connection:
        connection.sendall(request_line)
        assert read_all(connection).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "json"])
def test_openai_17_content_type(server: Asked, kind: str) -> None:
    body = json.dumps(chat_body())
    answer = server.http.post(CHAT, content=body, headers={"content-type": kind})
    assert answer.status_code == 415
    answer = server.http.post(
        CHAT, content=body, headers={"content-type": "Application/JSON; charset=utf-8"}
    )
    assert answer.status_code == 200
    packed = {"content-type": "application/json", "content-encoding": "gzip"}
    assert server.http.post(CHAT, content=body, headers=packed).status_code == 415


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8080", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8080", 200),
        ("localhost.", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example:8080", 403),
        ("192.168.0.7", 403),
        ("", 403),
    ],
)
def test_openai_17_host(server: Asked, host: str, status: int) -> None:
    for method, path in (("GET", "/health"), ("GET", "/v1/models"), ("POST", CHAT)):
        answer = server.http.request(
            method, path, json=chat_body() if method == "POST" else None, headers={"host": host}
        )
        assert answer.status_code == status


def test_hosts_can_be_allowed() -> None:
    with doubled(allowed_hosts=("Server.lan",)) as asked:
        for host, status in (("server.LAN:80", 200), ("other.lan", 403)):
            assert asked.http.get("/health", headers={"host": host}).status_code == status


def test_behind_a_wildcard_addresses_are_hosts() -> None:
    with doubled(host="0.0.0.0", api_keys=("a-good-key",)) as asked:
        for host, status in (("192.168.0.7:80", 200), ("[fe80::1]", 200), ("evil.example", 403)):
            assert asked.http.get("/health", headers={"host": host}).status_code == status


def test_keys(keyed: Asked) -> None:
    for headers in (
        {"authorization": "Bearer a-good-key"},
        {"authorization": "bearer another-key"},
        {"x-api-key": "another-key"},
    ):
        assert keyed.http.get("/v1/models", headers=headers).status_code == 200
    for headers in (
        {},
        {"authorization": "a-good-key"},
        {"authorization": "Bearer x"},
        {"authorization": "Bearer a-good-ke"},
        {"authorization": "Bearer a-good-keyy"},
        {"x-api-key": "A-GOOD-KEY"},
        {"cookie": "key=a-good-key"},
    ):
        for path in ("/v1/models", "/metrics", "/nothing"):
            answer = keyed.http.get(path, headers=headers)
            assert answer.status_code == 401
            assert "good" not in answer.text
        body = httpx.Request("POST", keyed.server.url + CHAT, json=chat_body(), headers=headers)
        assert keyed.http.send(body).status_code == 401
    latin = [(b"x-api-key", b"\xff\xfe")]
    assert keyed.http.get("/v1/models", headers=latin).status_code == 401
    for path in ("/health", "/ready"):
        assert keyed.http.get(path).status_code == 200


def test_cors_is_off(server: Asked) -> None:
    origin = {"origin": "http://evil.example"}
    preflight = {**origin, "access-control-request-method": "POST"}
    for answer in (
        server.http.options(CHAT, headers=preflight),
        server.http.post(CHAT, json=chat_body(), headers=origin),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert server.http.options(CHAT, headers=preflight).status_code == 405


def test_cors_for_named_origins() -> None:
    with doubled(cors_origins=("http://good.example",), api_keys=("a-good-key",)) as asked:
        preflight = {
            "origin": "http://good.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization",
        }
        answer = asked.http.options(CHAT, headers=preflight)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "http://good.example"
        refused = asked.http.post(CHAT, json={}, headers={"origin": "http://good.example"})
        assert refused.status_code == 401  # which the page may read
        assert refused.headers["access-control-allow-origin"] == "http://good.example"
        bad = asked.http.options(CHAT, headers={**preflight, "origin": "http://evil.example"})
        assert "access-control-allow-origin" not in bad.headers


def test_paths_and_methods(server: Asked) -> None:
    for method, path, status in (
        ("GET", CHAT, 405),
        ("PUT", CHAT, 405),
        ("DELETE", f"/v1/models/{MODEL}", 405),
        ("POST", "/health", 405),
        ("GET", "/v1", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/etc/passwd", 404),
    ):
        answer = server.http.request(method, path)
        assert answer.status_code == status, (method, path)
        assert answer.json()["error"]["message"]
    assert server.http.head("/health").status_code == 200


def test_every_answer_has_an_id(server: Asked) -> None:
    seen = set()
    for answer in (
        server.http.get("/health"),
        server.http.get("/nothing"),
        server.http.post(CHAT, json=chat_body()),
        server.http.post(CHAT, json={}),
        server.http.post(CHAT, json=chat_body(), headers={"host": "evil.example"}),
    ):
        assert answer.headers["x-request-id"] == answer.headers["request-id"]
        seen.add(answer.headers["x-request-id"])
    assert len(seen) == 5


def test_a_comment_while_the_prompt_is_read(server: Asked) -> None:
    body = chat_body("SAY(reading=0.5):One moment", stream=True)
    with server.http.stream("POST", CHAT, json=body) as answer:
        assert ": ping" in list(answer.iter_lines())


def request_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    lines = [json.loads(record.message) for record in caplog.records]
    return [line for line in lines if "path" in line]


def test_log_lines_have_no_words(double: Asked, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="optiq.serve"):
        double.chat("SAY(cached=3):zebra")
        double.http.post(CHAT, json=chat_body("SAY(fails=broken):zebra"))
        double.refused(CHAT, chat_body("zebra", n="zebra"), "n")
        double.chunks("SAY:zebra")
        double.post("/v1/messages", message_body("SAY:zebra"))
        # A line is written when its answer has been sent, which is when the client has it. So the
        # last ones may still come, and that of an earlier test, too.
        wanted = Counter({200: 3, 400: 1, 500: 1})
        wait_until(lambda: not wanted - Counter(line["status"] for line in request_lines(caplog)))
    lines = [json.loads(record.message) for record in caplog.records]
    asked = request_lines(caplog)
    (first,) = [line for line in asked if line.get("cached_tokens") == 3]
    assert first["generated_tokens"] > 0
    assert first["first_token_ms"] >= 0
    assert any(line.get("stream") is True for line in asked)
    assert [line["error"] for line in asked if line["status"] == 500] == ["server_error"]
    (failure,) = [line for line in lines if "where" in line]
    assert failure["error"] == "ZeroDivisionError"
    text = "".join(record.message for record in caplog.records)
    assert "zebra" not in text
    assert "secret" not in text


def test_metrics_count(double: Asked) -> None:
    def values() -> dict[str, float]:
        lines = double.http.get("/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    before = values()
    usage = double.chat("SAY(cached=4):Hello").usage
    double.chat("SAY:Hello", n=2)
    double.refused(CHAT, chat_body(n=0), "n")
    refused = f'optiq_requests_total{{path="{CHAT}",status="400"}}'
    wait_until(lambda: values().get(refused, 0) > before.get(refused, 0))
    after = values()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert usage is not None
    assert grown("optiq_generated_tokens_total") == 3 * usage.completion_tokens
    assert grown("optiq_cached_tokens_total") == 4
    assert grown("optiq_time_to_first_token_seconds_count") == 3
    assert grown("optiq_inter_token_seconds_count") == 3 * (usage.completion_tokens - 2)
    assert grown('optiq_answers_total{reason="stop"}') == 3
    assert grown('optiq_errors_total{code="invalid_value"}') == 1
    assert grown(f'optiq_requests_total{{path="{CHAT}",status="200"}}') == 2
    for name in ("optiq_running", "optiq_waiting", "optiq_kv_bytes"):
        assert after[name] == 0


def test_many_streams_at_a_time(server: Asked) -> None:
    """Each gets its own words, though all run together."""
    texts: dict[int, str] = {}

    def ask(number: int) -> None:
        chunks = server.chunks(f"SAY(delay=0.005):number {number}")
        texts[number] = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {i: f"number {i}" for i in range(16)}


def test_a_client_that_does_not_read_holds_nobody_up(server: Asked) -> None:
    """Its answer waits in memory, and the others go on; then it leaves."""
    body = json.dumps(chat_body("SAY:" + "word " * 60, stream=True, n=8)).encode()
    with connect(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(head(len(body)) + body)
        for _ in range(3):
            assert server.chat("SAY:Hi").choices[0].message.content == "Hi"
        assert connection.recv(12) == b"HTTP/1.1 200"
    wait_until(lambda: server.engine.stats().running == 0)
