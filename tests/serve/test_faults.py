"""Requests that stop, crash or mislead other servers; one test for each row of the table in
docs/serving-reference.md. After each of them this server answers as before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.serve.servers import (
    CALL,
    MODEL,
    TOOLS,
    Asked,
    chat_body,
    content_of,
    message_body,
    wait_until,
)

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
MESSAGES = "/v1/messages"


@pytest.fixture(autouse=True)
def as_before(server: Asked) -> Iterator[None]:
    yield
    assert server.chat("SAY:As before").choices[0].message.content == "As before"
    assert server.http.get("/ready").status_code == 200


def test_fault_several_prompts(server: Asked) -> None:
    answer = server.complete(["SAY:a\n", "SAY:b\n"], n=2)
    assert [choice.text for choice in answer.choices] == ["a", "a", "b", "b"]


def test_fault_stop_that_is_not_text(server: Asked) -> None:
    server.refused(CHAT, chat_body(stop=[5]), "stop[0]")
    server.refused(COMPLETE, {"prompt": "a", "stop": [5]}, "stop[0]")


def test_fault_logit_bias_outside(server: Asked) -> None:
    for token in ("384", "999999999", "4294967296", "-1", "1.5", "x", ""):
        server.refused(CHAT, chat_body(logit_bias={token: 5}), "logit_bias")
    for value in ("5", [1], None, True):
        error = server.post(CHAT, chat_body(logit_bias={"5": value}), 400)["error"]
        assert error["param"].startswith("logit_bias")
    server.refused(CHAT, chat_body(logit_bias={"5": 101}), "logit_bias.5")
    server.refused(CHAT, chat_body(logit_bias=[1]), "logit_bias")
    server.chat(logit_bias={"5": -100, "383": 100})
    assert server.engine.requests[-1].sampling.logit_bias == {5: -100.0, 383: 100.0}


@pytest.mark.parametrize("stop", ["orld", "ow are"])
def test_fault_stop_between_tokens(server: Asked, stop: str) -> None:
    text = "Hello world, how are you"
    before = text.split(stop)[0]
    assert server.chat(f"SAY:{text}", stop=stop).choices[0].message.content == before
    answer = server.message(f"SAY:{text}", stop_sequences=[stop])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
    assert answer.content[0].model_dump()["text"] == before


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETE, MESSAGES])
def test_fault_client_goes_away(server: Asked, path: str, stream: bool) -> None:
    say = "SAY(delay=0.05):" + "word " * 30
    body = {**message_body(say, stream=stream), "prompt": f"{say}\n"}
    before = len(server.engine.cancelled)
    if stream:
        with server.http.stream("POST", path, json=body) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            server.http.post(path, json=body, timeout=0.3)
    wait_until(lambda: len(server.engine.cancelled) > before)
    wait_until(lambda: server.engine.stats().running == 0)


def test_fault_null_options(server: Asked) -> None:
    answer = server.chat("SAY:Hi", temperature=None, max_tokens=None, stream=None)
    assert answer.choices[0].message.content == "Hi"


def test_fault_n(server: Asked) -> None:
    assert len(server.chat("SAY:Hi", n=2).choices) == 2


def test_fault_tool_choice_none(server: Asked) -> None:
    (choice,) = server.chat(f"SAY:{CALL}", tools=TOOLS, tool_choice="none").choices
    assert choice.message.tool_calls is None
    tools = [{"name": "get_weather", "input_schema": {"type": "object"}}]
    answer = server.message(f"SAY:{CALL}", tools=tools, tool_choice={"type": "none"})
    assert answer.stop_reason == "end_turn"


def test_fault_response_format_of_no_kind(server: Asked) -> None:
    form = {"type": "nonsense"}
    server.refused(CHAT, chat_body(response_format=form), "response_format.type")


def test_fault_logprobs_in_a_stream(server: Asked) -> None:
    chunks = server.chunks("SAY:Hello", logprobs=True)
    tokens = [
        token.token
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs
        for token in choice.logprobs.content or []
    ]
    assert "".join(tokens) == "Hello"


def test_fault_logprobs_without_alternatives(server: Asked) -> None:
    logprobs = server.chat("SAY:Hi", logprobs=True).choices[0].logprobs
    assert logprobs is not None
    for token in logprobs.content or []:
        assert token.token
        assert token.bytes
        assert token.top_logprobs == []


def test_fault_twenty_alternatives(server: Asked) -> None:
    logprobs = server.chat("SAY:Hi", logprobs=True, top_logprobs=20).choices[0].logprobs
    assert logprobs is not None
    assert all(len(token.top_logprobs) == 20 for token in logprobs.content or [])


def test_fault_empty_stream_options(server: Asked) -> None:
    assert content_of(server.chunks("SAY:Hi", stream_options={})) == "Hi"


def test_fault_usage_chunk(server: Asked) -> None:
    *_, last = server.chunks("SAY:Hi", stream_options={"include_usage": True})
    assert last.object == "chat.completion.chunk"
    assert last.usage is not None


def test_fault_one_model(server: Asked) -> None:
    assert server.http.get(f"/v1/models/{MODEL}").json()["id"] == MODEL
    missing = server.http.get("/v1/models/nobody")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_fault_models_are_listed_without_a_cache_folder(server: Asked) -> None:
    assert [m["id"] for m in server.http.get("/v1/models").json()["data"]] == [MODEL]


def test_fault_shape_of_errors(server: Asked) -> None:
    for body in ({}, {"messages": []}, {"messages": [{"role": "user"}]}, chat_body(n="x")):
        error = server.post(CHAT, body, 400)["error"]
        assert error.keys() == {"message", "type", "param", "code"}


def test_fault_unknown_model(server: Asked) -> None:
    for path, body in (
        (CHAT, chat_body(model="/etc")),
        (COMPLETE, {"model": "org/other", "prompt": "a"}),
    ):
        assert server.post(path, body, 404)["error"]["code"] == "model_not_found"


def test_fault_body_that_is_not_utf8(server: Asked) -> None:
    headers = {"content-type": "application/json"}
    for path in (CHAT, COMPLETE, MESSAGES):
        answer = server.http.post(path, content=b'{"model": "\xff\xfe"}', headers=headers)
        assert answer.status_code == 400
        assert "UTF-8" in answer.json()["error"]["message"]


def test_fault_paths_of_both_protocols(server: Asked) -> None:
    assert server.http.post(MESSAGES, json=message_body()).status_code == 200
    count = server.http.post(f"{MESSAGES}/count_tokens", json=message_body())
    assert count.status_code == 200
    assert server.http.get("/metrics").status_code == 200
    missing = server.http.post("/v1/nothing", json={})
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "not_found"


def test_fault_anthropic_call_is_returned(server: Asked) -> None:
    tools = [{"name": "get_weather", "input_schema": {"type": "object"}}]
    answer = server.message(f"SAY:{CALL}", tools=tools)
    assert answer.stop_reason == "tool_use"
    assert answer.content[0].model_dump()["name"] == "get_weather"


def test_fault_anthropic_without_what_is_required(server: Asked) -> None:
    for change in ({"max_tokens": None}, {"messages": "x"}, {"messages": []}):
        server.refused_message({**message_body(), **change})
    answer = server.http.post(MESSAGES, json=[])
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_fault_seeds_do_not_wait_for_each_other(server: Asked) -> None:
    """Eight answers with one seed are made at a time, not one after another."""
    say = "SAY(delay=0.05):" + "word " * 10
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.chat, say, n=8, seed=1)
        wait_until(lambda: server.engine.stats().running == 8)
        assert len(asked.result().choices) == 8


def test_fault_content_type_and_host(server: Asked) -> None:
    text = json.dumps(chat_body()).encode()
    answer = server.http.post(CHAT, content=text, headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    answer = server.http.post(CHAT, json=chat_body(), headers={"host": "evil.example"})
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers


def test_fault_a_missing_key_is_not_a_good_one(keyed: Asked) -> None:
    assert keyed.http.post(CHAT, json=chat_body()).status_code == 401
    assert keyed.http.post(CHAT, json=chat_body(), headers={"x-api-key": ""}).status_code == 401
