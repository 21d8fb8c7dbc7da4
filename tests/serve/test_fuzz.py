"""Random requests: each is answered or refused in its protocol's words, and changes no other.

A few hundred in every run; ten thousand with `pytest -m fuzz tests/serve/test_fuzz.py`.
"""

from __future__ import annotations

import copy
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.serve.servers import CALL, MODEL, TOOLS, WEATHER, Asked, scripted, tiny_tokenizer

CHAT = "/v1/chat/completions"
RESPOND = "/v1/responses"
ENDS = ("data: [DONE]", 'data: {"type":"message_stop"}')
SEEN = "SAY:The neighbour's words"
REFUSALS = {400, 401, 403, 404, 405, 408, 413, 415, 429, 503, 529}

FEW = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)
MANY = settings(FEW, max_examples=4000)


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Asked]:
    """Of a model that reasons and calls, with small limits."""
    options = {"answer_tokens": 40, "body_bytes": 200_000, "preparing_seconds": 120.0}
    with scripted(tiny_tokenizer(thinking=True), **options) as asked:
        yield asked


@pytest.fixture(scope="module")
def hurried() -> Iterator[Asked]:
    """One that waits for nobody."""
    with scripted(answer_tokens=40, body_seconds=0.2, idle_seconds=0.2) as asked:
        yield asked


OPENAI_MESSAGES: list[Any] = [
    {"role": "system", "content": "Be brief"},
    {"role": "user", "content": [{"type": "text", "text": "What?"}]},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "Hm",
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    {"role": "user", "content": f"SAY:<think>\nWell\n</think>\n\nHi {CALL}"},
]
ANTHROPIC_MESSAGES: list[Any] = [
    {"role": "user", "content": "What?"},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "Hm", "signature": "xx"},
            {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "x"}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": "sunny"},
            {"type": "text", "text": f"SAY:Hi {CALL}", "cache_control": {"type": "ephemeral"}},
        ],
    },
]
RESPONSES_ITEMS: list[Any] = [
    {"role": "developer", "content": "Be brief"},
    {"type": "reasoning", "summary": [], "encrypted_content": "xx"},
    {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
    {"type": "custom_tool_call", "call_id": "c2", "name": "c", "namespace": "n", "input": "x"},
    {"type": "custom_tool_call_output", "call_id": "c2", "output": [{"type": "input_text"}]},
    {"role": "user", "content": [{"type": "input_text", "text": f"SAY:Hi {CALL}"}]},
]
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {
        "model": MODEL,
        "messages": OPENAI_MESSAGES,
        "tools": TOOLS,
        "tool_choice": "auto",
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
        "stream_options": {"include_usage": True},
        "stop": ["x"],
        "logit_bias": {"5": 1},
        "chat_template_kwargs": {"enable_thinking": True},
        "n": 1,
        "seed": 1,
        "top_logprobs": 2,
        "logprobs": True,
        "max_tokens": 30,
        "temperature": 0.5,
    },
    "/v1/completions": {
        "model": MODEL,
        "prompt": "SAY:Hi\n",
        "max_tokens": 20,
        "logprobs": 2,
        "echo": False,
        "best_of": 1,
        "stop": "x",
    },
    "/v1/messages": {
        "model": MODEL,
        "max_tokens": 30,
        "system": [{"type": "text", "text": "Be brief"}],
        "messages": ANTHROPIC_MESSAGES,
        "tools": [{"name": "get_weather", "input_schema": WEATHER["parameters"]}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "thinking": {"type": "enabled", "budget_tokens": 10},
        "stop_sequences": ["x"],
        "output_config": {"effort": "low"},
    },
    "/v1/messages/count_tokens": {"model": MODEL, "messages": ANTHROPIC_MESSAGES},
    RESPOND: {
        "model": MODEL,
        "input": RESPONSES_ITEMS,
        "tools": [
            {"type": "function", **WEATHER},
            {"type": "namespace", "name": "n", "tools": [{"type": "custom", "name": "c"}]},
            {"type": "web_search"},
        ],
        "tool_choice": {"type": "function", "name": "get_weather"},
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
        "reasoning": {"effort": "low", "summary": "auto"},
        "include": ["reasoning.encrypted_content"],
        "previous_response_id": None,
        "store": True,
        "max_output_tokens": 30,
    },
}

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, -1, 383, 384, 2**31, 2**63, 10**400]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.sampled_from(["", "auto", "any", "text", "tool", "user", "<|im_end|>", "<think>", "\x00"]),
    st.sampled_from(
        ["é☕𝄞", "\ud800", "x" * 5000, "{{ 7 * 7 }}", "../../etc/passwd", "http://[::]"]
    ),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to everything within a body."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@st.composite
def bodies(draw: Any) -> tuple[str, Any]:
    """A path, and what is posted to it: a good body of which some places were changed."""
    path = draw(st.sampled_from(sorted(BODIES)))
    body = copy.deepcopy(BODIES[path])
    optional = sorted(set(body) - {"model", "messages", "prompt", "max_tokens"})
    for name in draw(st.lists(st.sampled_from(optional), max_size=9)) if optional else ():
        body.pop(name, None)
    body["stream"] = draw(st.booleans())
    for _ in range(draw(st.integers(0, 3))):
        known = list(places(body))
        *outer, last = draw(st.sampled_from(known))
        holder: Any = body
        for key in outer:
            holder = holder[key]
        change = draw(st.sampled_from(["replace", "replace", "delete", "nest", "add"]))
        if change == "replace":
            holder[last] = draw(values)
        elif change == "delete":
            del holder[last]
        elif change == "nest":
            depth = draw(st.sampled_from([1, 3, 98, 500]))
            for _ in range(depth):
                holder[last] = [holder[last]]
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=10))] = draw(values)
        else:
            holder.append(draw(values))
    return path, body


def check_neighbour(asked: Asked) -> None:
    assert asked.chat(SEEN).choices[0].message.content == SEEN.removeprefix("SAY:")


def check_answer(asked: Asked, path: str, body: Any) -> None:
    content = json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    answer = asked.http.post(path, content=content, headers=headers, timeout=30)
    if answer.status_code == 200:
        if answer.headers["content-type"].startswith("text/event-stream"):
            last = [line for line in answer.text.splitlines() if line][-1]
            if path == RESPOND:
                check_stored(asked, json.loads(last.removeprefix("data: "))["response"])
            else:
                assert last in ENDS or '"error"' in last
        elif path == RESPOND:
            check_stored(asked, answer.json())
        else:
            assert answer.json()
        return
    assert answer.status_code in REFUSALS, (answer.text, body)
    error = answer.json()["error"]
    assert error["message"]
    assert "\n" not in error["message"].strip()


def check_stored(asked: Asked, response: dict[str, Any]) -> None:
    """A response is complete, and if it is stored, what it answered can be listed."""
    assert response["status"] in ("completed", "incomplete", "failed")
    listed = asked.http.get(f"{RESPOND}/{response['id']}/input_items", params={"limit": 100})
    if response["store"] and response["status"] != "failed":
        data = listed.json()["data"]
        assert data
        assert all(isinstance(item["id"], str) for item in data)
    else:
        assert listed.status_code == 404


@FEW
@given(bodies())
def test_changed_bodies(fuzzed: Asked, asked: tuple[str, Any]) -> None:
    check_answer(fuzzed, *asked)


@FEW
@given(st.sampled_from(sorted(BODIES)), values)
def test_any_values(fuzzed: Asked, path: str, value: Any) -> None:
    check_answer(fuzzed, path, value)


@st.composite
def raw_requests(draw: Any) -> bytes:
    """A request as bytes, of which some were changed or left out."""
    body = json.dumps(BODIES[CHAT]).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    data = bytearray(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data) - 1))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=4))
    if draw(st.booleans()):
        del data[draw(st.integers(0, len(data) - 1)) :]
    return bytes(data)


@settings(FEW, max_examples=50)
@given(raw_requests(), st.booleans())
def test_changed_bytes(hurried: Asked, data: bytes, wait: bool) -> None:
    check_bytes(hurried, data, wait)


def check_bytes(asked: Asked, data: bytes, wait: bool) -> None:
    """It answers, or closes the connection: it never waits for ever."""
    address = ("127.0.0.1", asked.server.port)
    with socket.create_connection(address, timeout=30) as connection:
        try:
            connection.sendall(data)
            if not wait:
                return  # gone in the middle
            answer = b""
            while part := connection.recv(65536):
                answer += part
        except ConnectionError:
            return
    if answer:
        assert int(answer.split()[1]) in {200, *REFUSALS}


def test_nobody_was_changed(fuzzed: Asked, hurried: Asked) -> None:
    for asked in (fuzzed, hurried):
        check_neighbour(asked)
        engine = asked.engine.stats()
        assert (engine.running, engine.waiting, engine.restarts) == (0, 0, 0)


@pytest.mark.fuzz
@MANY
@given(bodies())
def test_many_changed_bodies(fuzzed: Asked, asked: tuple[str, Any]) -> None:
    check_answer(fuzzed, *asked)
    check_neighbour(fuzzed)


@pytest.mark.fuzz
@MANY
@given(st.sampled_from(sorted(BODIES)), values)
def test_many_values(fuzzed: Asked, path: str, value: Any) -> None:
    check_answer(fuzzed, path, value)


@pytest.mark.fuzz
@settings(MANY, max_examples=2000)
@given(raw_requests(), st.booleans())
def test_many_changed_bytes(hurried: Asked, data: bytes, wait: bool) -> None:
    check_bytes(hurried, data, wait)
