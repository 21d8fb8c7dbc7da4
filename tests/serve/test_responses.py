"""OpenAI's Responses, through its SDK and strictly against its types.

`test_openai_18_*` is point 18 of docs/serving-reference.md. `test_compliance_*` restate the
compliance cases of openresponses: basic, streaming, system prompt, tools, several turns.
"""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent
from pydantic import TypeAdapter

from optiq.serve.protocols.store import ResponseStore
from tests.serve.servers import CALL, MODEL, WEATHER, Asked

PATH = "/v1/responses"
FUNCTION = {"type": "function", **WEATHER, "strict": False}
THOUGHT = "SAY:<think>\nLet me see\n</think>\n\nParis"


def body(content: Any = "SAY:Hello", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": content, **fields}


def respond(server: Asked, content: Any = "SAY:Hello", **fields: Any) -> Response:
    answer = server.post(PATH, body(content, **fields))
    return Response.model_validate_json(json.dumps(answer), strict=True)


def stream(server: Asked, content: Any = "SAY:Hello", **fields: Any) -> list[Any]:
    """The events, each held to its type, numbered without gaps."""
    read: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    events = server.events(PATH, body(content, stream=True, **fields))
    found = [read.validate_json(event, strict=True) for event in events]
    assert [event.sequence_number for event in found] == list(range(len(found)))
    return found


def prompt_of(server: Asked) -> str:
    return str(server.tokenizer.decode(list(server.engine.requests[-1].tokens)))


def plain(item: Any) -> dict[str, Any]:
    """An item as clients send it back."""
    return dict(item.model_dump(exclude_none=True))


def test_compliance_basic(server: Asked) -> None:
    answer = respond(server, "SAY:Hi there")
    assert answer.output_text == "Hi there"
    assert (answer.status, answer.object) == ("completed", "response")
    (item,) = answer.output
    assert item.type == "message"
    assert (item.role, item.status) == ("assistant", "completed")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    # Required by the schema of openresponses, and null where there is nothing to say.
    raw = server.post(PATH, body())
    assert raw.keys() >= {
        "background", "completed_at", "created_at", "error", "frequency_penalty", "id",
        "incomplete_details", "instructions", "max_output_tokens", "max_tool_calls", "metadata",
        "model", "object", "output", "parallel_tool_calls", "presence_penalty",
        "previous_response_id", "prompt_cache_key", "reasoning", "safety_identifier",
        "service_tier", "status", "store", "temperature", "text", "tool_choice", "tools",
        "top_logprobs", "top_p", "truncation", "usage",
    }  # fmt: skip


def test_compliance_streaming(server: Asked) -> None:
    events = stream(server, "SAY:Hi there")
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == [
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert "".join(event.delta for event in events[4:-4]) == "Hi there"
    assert events[-4].text == events[-1].response.output_text == "Hi there"
    assert len({event.item_id for event in events[3:-2]}) == 1
    with server.openai.responses.stream(model=MODEL, input="SAY:Hi there") as streamed:
        assert [event.type for event in streamed][-1] == "response.completed"
        assert streamed.get_final_response().output_text == "Hi there"


def test_compliance_system(server: Asked) -> None:
    message = {"role": "user", "content": [{"type": "input_text", "text": "SAY:Ahoy"}]}
    for role in ("system", "developer"):
        items = [{"type": "message", "role": role, "content": "Be a pirate"}, message]
        assert respond(server, items).output_text == "Ahoy"
        assert "system\nBe a pirate<|im_end|>" in prompt_of(server)
    answer = respond(server, [message], instructions="Be a pirate")
    assert answer.instructions == "Be a pirate"
    assert "system\nBe a pirate<|im_end|>" in prompt_of(server)


def test_compliance_tools(server: Asked) -> None:
    answer = respond(server, f"SAY:{CALL}", tools=[FUNCTION])
    (call,) = answer.output
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny SAY:Good"}
    items = [{"role": "user", "content": "The weather?"}, plain(call), output]
    assert respond(server, items, tools=[FUNCTION]).output_text == "Good"
    assert "tool\nsunny SAY:Good" in prompt_of(server)


def test_compliance_several_turns(server: Asked) -> None:
    turns = [
        {"role": "user", "content": "My name is Alice"},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Hello Alice"}],
        },
        {"role": "user", "content": "SAY:Alice"},
    ]
    assert respond(server, turns).output_text == "Alice"
    assert "assistant\nHello Alice<|im_end|>" in prompt_of(server)


def test_openai_18_calls_in_a_stream(server: Asked) -> None:
    events = stream(server, f"SAY:Let me see\n{CALL}", tools=[FUNCTION])
    by_kind = {event.type: event for event in events}
    added = [event for event in events if event.type == "response.output_item.added"]
    assert [event.item.type for event in added] == ["message", "function_call"]
    assert added[1].item.arguments == ""
    arguments = by_kind["response.function_call_arguments.done"].arguments
    assert json.loads(arguments) == {"city": "Paris"}
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == arguments
    assert len(deltas) > 1  # while it is written
    assert events[-2].item.status == "completed"
    assert [item.type for item in events[-1].response.output] == ["message", "function_call"]
    with server.openai.responses.stream(
        model=MODEL, input=f"SAY:{CALL}", tools=[{**FUNCTION, "strict": True}]
    ) as streamed:
        snapshots = [e.snapshot for e in streamed if e.type.endswith("arguments.delta")]
        (call,) = streamed.get_final_response().output
    assert snapshots[-1] == call.arguments
    assert call.parsed_arguments == {"city": "Paris"}


def test_openai_18_a_malformed_call_is_text(server: Asked) -> None:
    broken = '<tool_call>\n{"name": "get_weather", "arg'
    events = stream(server, f"SAY:{broken}", tools=[FUNCTION])
    assert not any("function_call" in event.type for event in events)
    (item,) = events[-1].response.output
    assert item.type == "message"
    assert item.content[0].text == broken


@pytest.mark.parametrize("kind", ["function", "custom"])
def test_openai_18_a_call_that_breaks_off_is_never_done(server: Asked, kind: str) -> None:
    """Its arguments have begun to be streamed; it comes again as text, and is not in the output."""
    tool = {**FUNCTION, "type": kind}
    broken = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Par'
    events = stream(server, f"SAY:Well. {broken}", tools=[tool])
    done = [e.item for e in events if e.type == "response.output_item.done"]
    output = events[-1].response.output
    assert [item.type for item in output] == ["message", "message"]
    assert [item.id for item in done] == [item.id for item in output]
    assert output[1].content[0].text == f" {broken}"
    if kind == "function":
        assert any(e.type == "response.function_call_arguments.delta" for e in events)
    answer = respond(server, f"SAY:Well. {broken}", tools=[tool])
    assert answer.output_text == f"Well. {broken}"
    assert respond(server, "SAY:x", previous_response_id=answer.id).output_text == "x"


def test_openai_18_namespaces(server: Asked) -> None:
    """As codex offers and reads them."""
    space = {"type": "namespace", "name": "agents", "description": "Others", "tools": [FUNCTION]}
    call = CALL.replace("get_weather", "agents__get_weather")
    answer = respond(server, f"SAY:{call}", tools=[space, FUNCTION])
    (item,) = answer.output
    assert item.type == "function_call"
    assert (item.namespace, item.name) == ("agents", "get_weather")
    output = {"type": "function_call_output", "call_id": item.call_id, "output": "SAY:Well"}
    items = [{"role": "user", "content": "?"}, plain(item), output]
    assert respond(server, items, tools=[space]).output_text == "Well"
    assert '"name": "agents__get_weather"' in prompt_of(server)
    wrong = [space, {**FUNCTION, "name": "agents__get_weather"}]
    server.refused(PATH, body(tools=wrong), "tools[1].name")


def test_openai_18_custom_tools(server: Asked) -> None:
    form = {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}
    tool = {"type": "custom", "name": "patch", "description": "Edits", "format": form}
    call = '<tool_call>\n{"name": "patch", "arguments": {"input": "a\\nb"}}\n</tool_call>'
    events = stream(server, f"SAY:{call}", tools=[tool])
    kinds = [event.type for event in events]
    assert "response.custom_tool_call_input.delta" in kinds
    (item,) = events[-1].response.output
    assert (item.type, item.name, item.input) == ("custom_tool_call", "patch", "a\nb")
    assert "start: /.+/" in prompt_of(server)
    output = {"type": "custom_tool_call_output", "call_id": item.call_id, "output": "SAY:Done"}
    items = [{"role": "user", "content": "?"}, plain(item), output]
    assert respond(server, items, tools=[tool]).output_text == "Done"


def test_openai_18_tools_that_are_not_here_are_left_out(server: Asked) -> None:
    raw = server.post(PATH, body(tools=[{"type": "web_search"}, {"type": "local_shell"}, FUNCTION]))
    Response.model_validate(raw)
    assert [tool["type"] for tool in raw["tools"]] == ["function"]
    assert [note.split("'")[1] for note in raw["notes"]] == ["web_search", "local_shell"]
    items = [
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        {"role": "user", "content": "SAY:Hi"},
    ]
    assert "web_search_call" in server.post(PATH, body(items))["notes"][0]
    assert "notes" not in server.post(PATH, body())


def allowed(name: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": name}]}


def test_openai_18_tool_choice(server: Asked) -> None:
    other = {**FUNCTION, "name": "other"}
    for choice, calls in (
        ("none", 0),
        ("auto", 1),
        ("required", 1),
        ({"type": "function", "name": "get_weather"}, 1),
        (allowed("get_weather"), 1),
    ):
        answer = respond(server, f"SAY:{CALL}", tools=[FUNCTION, other], tool_choice=choice)
        found = [item for item in answer.output if item.type == "function_call"]
        assert len(found) == calls
    respond(server, tools=[FUNCTION, other], tool_choice=allowed("other"))
    assert "get_weather" not in prompt_of(server)
    for wrong, param in (
        ({"type": "function", "name": "missing"}, "tool_choice.name"),
        ({"type": "web_search"}, "tool_choice.name"),
        ("sometimes", "tool_choice"),
    ):
        server.refused(PATH, body(tools=[FUNCTION], tool_choice=wrong), param)
    server.refused(PATH, body(tool_choice="required"), "tool_choice")


def test_openai_18_reasoning_goes_out_and_comes_back(thinker: Asked) -> None:
    include = ["reasoning.encrypted_content"]
    events = stream(thinker, THOUGHT, include=include)
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds.index("reasoning_text.done") < kinds.index("output_text.delta")
    deltas = [e.delta for e in events if e.type == "response.reasoning_text.delta"]
    assert "".join(deltas) == "Let me see"
    reasoning, message = events[-1].response.output
    assert reasoning.content[0].text == "Let me see"
    assert reasoning.encrypted_content
    assert events[-1].response.usage.output_tokens_details.reasoning_tokens > 0

    def prompt(item: dict[str, Any]) -> str:
        question = {"role": "user", "content": "The capital?"}
        respond(thinker, [question, item, plain(message), {"role": "user", "content": "SAY:x"}])
        return prompt_of(thinker)

    whole = plain(reasoning)
    assert "<think>\nLet me see\n</think>" in prompt(whole)
    sealed = {"type": "reasoning", "summary": [], "encrypted_content": whole["encrypted_content"]}
    assert "<think>\nLet me see\n</think>" in prompt(sealed)  # as opencode sends it
    forged = {**sealed, "encrypted_content": whole["encrypted_content"][:-6] + "AAAAA="}
    assert "<think>" not in prompt(forged)
    assert "<think>\nOpen\n" in prompt(
        {
            "type": "reasoning",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Open"}],
        }
    )
    plainly = respond(thinker, THOUGHT).output[0]
    assert plainly.type == "reasoning"
    assert plainly.encrypted_content is None


def test_openai_18_effort(thinker: Asked, server: Asked) -> None:
    respond(thinker, reasoning={"effort": "none"})
    assert prompt_of(thinker).endswith("</think>\n\n")
    assert respond(thinker, reasoning={"effort": "low", "summary": "auto"}).reasoning is not None
    server.refused(PATH, body(reasoning={"effort": "high"}), "reasoning_effort")
    respond(server, reasoning={"summary": "auto"})
    server.refused(PATH, body(reasoning={"effort": "extreme"}), "reasoning.effort")


def test_openai_18_a_conversation_by_ids(server: Asked) -> None:
    create = server.openai.responses.create
    first = create(model=MODEL, input="SAY:One", instructions="Be brief")
    second = create(model=MODEL, input="SAY:Two", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    third = create(model=MODEL, input="SAY:Three", previous_response_id=second.id)
    assert third.output_text == "Three"
    prompt = prompt_of(server)
    assert prompt.index("SAY:One") < prompt.index("assistant\nOne<") < prompt.index("SAY:Two")
    assert "Be brief" not in prompt  # instructions are of one response
    assert server.openai.responses.retrieve(first.id).output_text == "One"
    server.openai.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        server.openai.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as gone:
        create(model=MODEL, input="x", previous_response_id=first.id)
    assert gone.value.code == "previous_response_not_found"
    assert create(model=MODEL, input="SAY:x", previous_response_id=second.id).output_text == "x"


def test_openai_18_the_input_of_a_stored_response(server: Asked) -> None:
    first = respond(server, "SAY:One", instructions="Be brief")
    call = respond(server, f"SAY:{CALL}", tools=[FUNCTION], previous_response_id=first.id).output[0]
    assert call.type == "function_call"
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    items = [
        {"role": "user", "content": "SAY:Two"},
        plain(call),
        output,
        {"type": "custom_tool_call", "call_id": "c", "name": "patch", "input": "x"},
        {"type": "custom_tool_call_output", "call_id": "c", "output": "done"},
        {"type": "reasoning", "summary": [], "encrypted_content": "x"},
        {"role": "assistant", "content": "Sunny"},
        {"role": "user", "content": [{"type": "input_text", "text": "SAY:Three"}]},
    ]
    last = respond(server, items, previous_response_id=first.id)
    raw = server.http.get(f"{PATH}/{last.id}/input_items", params={"limit": 100}).json()
    listed = ResponseItemList.model_validate_json(json.dumps(raw), strict=True)
    ids = [item.id for item in listed.data]
    assert len(set(ids)) == len(items) + 2
    assert (raw["first_id"], raw["last_id"], raw["has_more"]) == (ids[0], ids[-1], False)
    list_items = server.openai.responses.input_items.list
    found = list(list_items(last.id, order="asc", limit=3))  # in pages
    assert [item.id for item in found] == ids[::-1]
    assert [item.type for item in found] == [
        "message", "message", *(item.get("type", "message") for item in items)
    ]  # fmt: skip
    texts = [found[i].content[0].text for i in (0, 1, 2, -2, -1)]
    assert texts == ["SAY:One", "One", "SAY:Two", "Sunny", "SAY:Three"]
    assert len(list_items(last.id, limit=4).data) == 4
    for query in ({"limit": 0}, {"limit": "x"}, {"order": "up"}, {"after": "msg_x"}):
        answer = server.http.get(f"{PATH}/{last.id}/input_items", params=query)
        assert (answer.status_code, [answer.json()["error"]["param"]]) == (400, list(query))
    assert server.http.get(f"{PATH}/resp_x/input_items").status_code == 404


def test_openai_18_what_is_stored_is_not_running(server: Asked) -> None:
    answer = respond(server)
    with pytest.raises(openai.BadRequestError, match="background"):
        server.openai.responses.cancel(answer.id)
    with pytest.raises(openai.NotFoundError):
        server.openai.responses.cancel("resp_x")
    with pytest.raises(openai.BadRequestError, match="stream"):
        list(server.openai.responses.retrieve(answer.id, stream=True))
    assert server.openai.responses.retrieve(answer.id, include=[]).id == answer.id


def test_openai_18_nothing_is_stored_unasked(server: Asked) -> None:
    answer = respond(server, store=False)
    with pytest.raises(openai.NotFoundError):
        server.openai.responses.retrieve(answer.id)
    (item,) = respond(server, "SAY:Known").output
    assert item.id
    items = [
        {"role": "user", "content": "?"},
        {"type": "item_reference", "id": item.id},
        {"role": "user", "content": "SAY:x"},
    ]
    respond(server, items)
    assert "assistant\nKnown<|im_end|>" in prompt_of(server)
    items[1]["id"] = answer.output[0].id or ""
    server.refused(PATH, body(items), "input[1].id")


def test_the_store_is_bounded() -> None:
    store = ResponseStore(most_bytes=2000)
    for number in range(50):
        item = {"id": f"msg_{number}", "text": "x" * 100}
        store.keep({"id": f"resp_{number}", "output": [item]}, [])
    assert 0 < len(store) < 10
    assert store.find("resp_49").items == (item,)
    assert store.item("msg_0") is None
    store.keep({"id": "huge", "output": [{"id": "msg_h", "text": "x" * 3000}]}, [])
    assert len(store) > 0
    assert store.item("msg_h") is None


def test_openai_18_the_form_of_the_text(server: Asked) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    answer = respond(server, "SAY:nonsense", text={"format": form}, max_output_tokens=60)
    assert answer.output_text.lstrip().startswith("{")
    assert respond(server, 'SAY:{"a": 5}', text={"format": form}).output_text == '{"a": 5}'
    for wrong, param in (
        ({"type": "json_schema", "name": "x"}, "text.format.schema"),
        ({"type": "nonsense"}, "text.format.type"),
        (5, "text.format"),
    ):
        server.refused(PATH, body(text={"format": wrong}), param)
    server.refused(PATH, body(text={"verbosity": "low"}), "text.verbosity")


def test_openai_18_logprobs(server: Asked) -> None:
    include = ["message.output_text.logprobs"]
    answer = respond(server, "SAY:Hi there", include=include, top_logprobs=2)
    (item,) = answer.output
    assert item.type == "message"
    (part,) = item.content
    assert part.type == "output_text"
    assert part.logprobs
    assert "".join(each.token for each in part.logprobs).startswith("Hi there")
    assert all(len(each.top_logprobs) == 2 for each in part.logprobs)
    events = stream(server, "SAY:Hi there", include=include)
    found = [each for e in events if e.type.endswith("text.delta") for each in e.logprobs]
    assert [each.token for each in found] == [each.token for each in part.logprobs]


def test_openai_18_an_answer_that_is_cut(server: Asked) -> None:
    events = stream(server, "SAY:Hello world", max_output_tokens=2)
    assert events[-1].type == "response.incomplete"
    response = events[-1].response
    assert response.status == response.output[0].status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"


def test_openai_18_usage_and_counting(server: Asked) -> None:
    items: Any = [{"role": "user", "content": "SAY:Hi"}]
    tools: Any = [FUNCTION]
    counted = server.openai.responses.input_tokens.count(
        model=MODEL, input=items, tools=tools, instructions="Be brief"
    )
    answer = respond(server, items, tools=tools, instructions="Be brief")
    assert answer.usage is not None
    assert counted.input_tokens == answer.usage.input_tokens
    again = respond(server, items, tools=tools, instructions="Be brief").usage
    assert again is not None
    assert again.input_tokens_details.cached_tokens == again.input_tokens - 1


def test_openai_18_what_does_not_fit(server: Asked) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        server.openai.responses.create(model=MODEL, input="x " * 600)
    assert error.value.code == "context_length_exceeded"
    for words in ("exceeds the context window", "maximum context length"):  # as pi and qwen look
        assert words in error.value.message


def test_openai_18_a_probe_with_nothing_to_say(server: Asked) -> None:
    respond(server, "", max_output_tokens=1)
    respond(server, None)


def test_openai_18_errors(server: Asked) -> None:
    user = {"role": "user", "content": "x"}
    for wrong, param in (
        (body(5), "input"),
        (body([5]), "input[0]"),
        (body([{"role": "nobody", "content": "x"}]), "input[0].role"),
        (
            body([{"role": "user", "content": [{"type": "input_image"}]}]),
            "input[0].content[0].type",
        ),
        (body([user, {"type": "function_call_output", "output": "x"}]), "input[1].call_id"),
        (
            body([{"type": "function_call_output", "call_id": "c", "output": "x"}]),
            "input[0].call_id",
        ),
        (
            body([{"type": "function_call", "call_id": "c", "name": "f", "arguments": "["}]),
            "input[0].arguments",
        ),
        (body([{"role": "assistant", "content": "x"}]), "input"),
        (body([]), "input"),
        (body(background=True), "background"),
        (body(truncation="auto"), "truncation"),
        (body(conversation="conv_1"), "conversation"),
        (body(max_output_tokens=0), "max_output_tokens"),
        (body(temperature="hot"), "temperature"),
        (body(tools=[{"type": "function"}]), "tools[0].name"),
    ):
        server.refused(PATH, wrong, param)
    names = (
        "include instructions max_output_tokens metadata previous_response_id reasoning store "
        "stream temperature text tool_choice tools top_logprobs top_p truncation user"
    )
    nothing = dict.fromkeys(names.split())
    assert respond(server, "SAY:Hi", **nothing).output_text == "Hi"
    assert server.http.delete(f"{PATH}/resp_x").status_code == 404
    assert server.http.post(f"{PATH}/resp_x", json={}).status_code == 405


def test_openai_18_a_stream_that_fails(double: Asked) -> None:
    events = stream(double, "SAY(fails=broken):Half")
    assert events[-1].type == "response.failed"
    assert events[-1].response.status == "failed"
    assert events[-1].response.error.code == "server_error"
    (item,) = events[-1].response.output
    assert (item.status, item.content[0].text) == ("incomplete", "Half")
    assert "secret" not in events[-1].response.error.message
    assert double.post(PATH, body("SAY(raises=overloaded):x"), 503)["error"]["code"] == "overloaded"


def said(role: str, text: str) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": [{"type": "input_text", "text": text}]}


def test_openai_18_a_request_as_codex_sends_it(thinker: Asked) -> None:
    request = {
        "model": MODEL,
        "input": [
            said("developer", "Be brief"),
            said("user", f"SAY:{CALL}"),
        ],
        "tools": [FUNCTION, {"type": "web_search", "external_web_access": False}],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "a-thread",
        "client_metadata": {"x": "y"},
    }
    events = [json.loads(event) for event in thinker.events(PATH, request)]
    (call,) = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    assert call["type"] == "function_call"
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"]["usage"]["input_tokens"] > 0
