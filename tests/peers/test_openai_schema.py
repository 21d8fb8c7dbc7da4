"""Responses, chunks and errors against OpenAI's own OpenAPI schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.serve.servers import (
    CALL,
    MODEL,
    TOOLS,
    WEATHER,
    Asked,
    chat_body,
    scripted,
    tiny_tokenizer,
)

FILE = Path(__file__).parents[3] / "shared" / "data" / "openapi" / "openai-schemas.json"

pytestmark = pytest.mark.skipif(
    not FILE.is_file(), reason=f"needs OpenAI's schemas in {FILE.name}, which are not part of optiq"
)

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    return dict(_with_nulls(json.loads(FILE.read_text())["components"]))


@pytest.fixture(scope="module")
def asked() -> Iterator[Asked]:
    options = {"aliases": ("gpt-*",), "tools": ("python",), "sandbox_packages": ()}
    with scripted(tiny_tokenizer(thinking=True), context=20_000, **options) as asked:
        yield asked


def _with_nulls(schema: Any) -> Any:
    """`nullable` as JSON Schema has it: it is OpenAPI 3.0, in a document that says it is 3.1."""
    if isinstance(schema, list):
        return [_with_nulls(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _with_nulls(value) for key, value in schema.items()}
    if found.pop("nullable", False) is True:
        return {"anyOf": [found, {"type": "null"}]}
    return found


def check(schemas: dict[str, Any], name: str, value: Any) -> None:
    schema = {"$ref": f"#/components/schemas/{name}", "components": schemas}
    Draft202012Validator(schema).validate(value)


BODIES = [
    {},
    {"n": 2, "max_tokens": 3},
    {"logprobs": True, "top_logprobs": 3},
    {"tools": TOOLS},
    {"tools": TOOLS, "tool_choice": "none"},
    {"stop": "l"},
]
TEXTS = ["Hello", f"Well, {CALL}", "<think>\nHm\n</think>\n\nHello", ""]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("body", BODIES, ids=lambda body: ",".join(body) or "plain")
def test_chat_completions(
    schemas: dict[str, Any], asked: Asked, body: dict[str, Any], text: str
) -> None:
    content = f"SAY:{text}"
    answer = asked.post(CHAT, chat_body(content, **body))
    check(schemas, "CreateChatCompletionResponse", answer)
    for options in ({}, {"stream_options": {"include_usage": True}}):
        *events, _ = asked.events(CHAT, chat_body(content, stream=True, **body, **options))
        assert len(events) > 1
        for event in events:
            check(schemas, "CreateChatCompletionStreamResponse", json.loads(event))


@pytest.mark.parametrize("body", [{}, {"n": 2}, {"logprobs": 2}, {"echo": True}, {"best_of": 2}])
def test_completions(schemas: dict[str, Any], asked: Asked, body: dict[str, Any]) -> None:
    body = {"model": MODEL, "prompt": "SAY:Hello\n", **body}
    check(schemas, "CreateCompletionResponse", asked.post(COMPLETE, body))


def _event_schemas(schemas: dict[str, Any]) -> dict[str, str]:
    """The name of each event's schema by the event's type, so that an error says what is wrong."""
    found = {}
    for each in schemas["schemas"]["ResponseStreamEvent"]["anyOf"]:
        name = each["$ref"].rpartition("/")[2]
        for kind in schemas["schemas"][name]["properties"]["type"]["enum"]:
            found[kind] = name
    return found


RUN = '<tool_call>\n{"name": "python", "arguments": {"code": "print(5)"}}\n</tool_call>'
RESPONSES: list[dict[str, Any]] = [
    {"input": "SAY:<think>\nHm\n</think>\n\nHello"},
    {"input": "SAY:Hello", "include": ["message.output_text.logprobs"]},
    {"input": f"SAY:Well, {CALL}", "tools": [{"type": "function", **WEATHER, "strict": False}]},
    {"input": f"SAY:{RUN}", "tools": [{"type": "code_interpreter", "container": {"type": "auto"}}]},
]


@pytest.mark.parametrize("body", RESPONSES, ids=["reasoning", "logprobs", "function", "python"])
def test_responses(schemas: dict[str, Any], asked: Asked, body: dict[str, Any]) -> None:
    answer = asked.post("/v1/responses", body)
    check(schemas, "Response", answer)
    events = [json.loads(e) for e in asked.events("/v1/responses", {**body, "stream": True})]
    names = _event_schemas(schemas)
    for event in events:
        if event.get("response", {}).get("usage", 0) is None:
            del event["response"]["usage"]  # as OpenAI has it, and not its schema
        check(schemas, names[event["type"]], event)
    kinds = {event["type"] for event in events}
    if "code_interpreter" in str(body):
        assert "response.code_interpreter_call.interpreting" in kinds
    listed = asked.http.get(f"/v1/responses/{answer['id']}/input_items").json()
    check(schemas, "ResponseItemList", listed)


def test_models_and_errors(schemas: dict[str, Any], asked: Asked) -> None:
    check(schemas, "ListModelsResponse", asked.http.get("/v1/models").json())
    check(schemas, "Model", asked.http.get(f"/v1/models/{MODEL}").json())
    for answer in (
        asked.post(CHAT, {}, 400),
        asked.post(CHAT, chat_body(n="x"), 400),
        asked.post(CHAT, chat_body(model="x"), 404),
        asked.post("/v1/nothing", {}, 404),
    ):
        check(schemas, "ErrorResponse", answer)


def test_what_is_wrong_is_found(schemas: dict[str, Any], asked: Asked) -> None:
    answer = asked.post(CHAT, chat_body("SAY:Hello"))
    answer["choices"][0]["finish_reason"] = "done"
    with pytest.raises(Exception, match="done"):
        check(schemas, "CreateChatCompletionResponse", answer)
