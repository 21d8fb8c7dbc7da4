"""Anthropic's protocol, line by line. The numbers are those of docs/serving-reference.md."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pytest

from optiq.serve.protocols.signature import sign, verified
from tests.serve.servers import CALL, MODEL, WEATHER, Asked, message_body, tiny_tokenizer

MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
TOOLS: list[dict[str, Any]] = [
    {"name": "get_weather", "input_schema": WEATHER["parameters"], "description": "The weather"}
]
THOUGHT = "SAY:<think>\nLet me see\n</think>\n\nParis"


def prompt_of(server: Asked) -> str:
    return str(server.tokenizer.decode(list(server.engine.requests[-1].tokens)))


def test_anthropic_1_what_is_required(server: Asked) -> None:
    for name in ("max_tokens", "messages", "model"):
        body = message_body()
        del body[name]
        assert f"'{name}' is required" in server.refused_message(body)
    for wrong in ("x", [], [5], {}, 5):
        server.refused_message({**message_body(), "messages": wrong})
    for wrong in (0, -1, "5", 1.5, True):
        server.refused_message({**message_body(), "max_tokens": wrong})


def test_anthropic_1_null_is_absent(server: Asked) -> None:
    names = (
        "system tools tool_choice thinking stop_sequences temperature top_p top_k metadata stream "
        "cache_control container output_config service_tier"
    )
    answer = server.message("SAY:Hi", **dict.fromkeys(names.split()))
    assert answer.content[0].model_dump()["text"] == "Hi"


def test_anthropic_1_system_and_roles(server: Asked) -> None:
    blocks = [{"type": "text", "text": "Be brief", "cache_control": {"type": "ephemeral"}}]
    for system in ("Be brief", blocks):
        server.message("SAY:Hi", system=system)
        assert "system\nBe brief<|im_end|>" in prompt_of(server)
    messages = [
        {"role": "user", "content": "one"},
        {"role": "user", "content": [{"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "SAY:Hi"},
    ]
    server.post(MESSAGES, {**message_body(), "messages": messages})
    assert all(f"\n{word}<|im_end|>" in prompt_of(server) for word in ("one", "two", "three"))


def test_anthropic_1_an_answer_goes_on_from_its_beginning(server: Asked) -> None:
    asked = {"role": "user", "content": "SAY:Hello world"}
    for content in ("Hello", [{"type": "text", "text": "Hello"}]):
        begun = {**message_body(), "messages": [asked, {"role": "assistant", "content": content}]}
        answer = server.post(MESSAGES, begun)
        assert prompt_of(server).endswith("assistant\nHello")
        assert answer["content"] == [{"type": "text", "text": " world"}]
        counted = server.post(COUNT, begun)["input_tokens"]
        assert counted == len(server.engine.requests[-1].tokens)
    use = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Rome"}}
    schema = {"type": "json_schema", "schema": {"type": "object"}}
    for fields, reason in (
        ({"messages": [asked, {"role": "assistant", "content": [use]}]}, "must end with text"),
        ({"messages": [asked, {"role": "assistant", "content": ""}]}, "must end with text"),
        ({"output_config": {"format": schema}}, "of a given form"),
        ({"tools": TOOLS, "tool_choice": {"type": "any"}}, "calls that are forced"),
        ({"thinking": {"type": "enabled", "budget_tokens": 20}}, "excludes reasoning"),
    ):
        assert reason in server.refused_message({**begun, **fields})


def test_anthropic_1_tool_results(server: Asked) -> None:
    use = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Rome"}}
    result: dict[str, Any] = {"type": "tool_result", "tool_use_id": "toolu_1"}
    for content, error, shown in (
        ("sunny", False, "tool\nsunny<"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], False, "tool\na\nb<"),
        ("no such city", True, "tool\nError: no such city<"),
        (None, False, "tool\n<"),
    ):
        messages = [
            {"role": "user", "content": "What is it?"},
            {"role": "assistant", "content": [{"type": "text", "text": "Well"}, use]},
            {
                "role": "user",
                "content": [
                    {**result, "content": content, "is_error": error},
                    {"type": "text", "text": "SAY:Fine"},
                ],
            },
        ]
        server.post(MESSAGES, {**message_body(tools=TOOLS), "messages": messages})
        assert shown in prompt_of(server)
        assert '{"name": "get_weather", "arguments": {"city": "Rome"}}' in prompt_of(server)
    messages[2] = {"role": "user", "content": [{**result, "tool_use_id": "nobody"}]}
    assert "answers no" in server.refused_message({**message_body(), "messages": messages})


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/x.png"}},
        {"type": "document", "source": {"type": "base64", "data": "x"}},
        {"type": "server_tool_use", "id": "a", "name": "b", "input": {}},
        {"type": "text"},
        {"type": "text", "text": 5},
        {"text": "no type"},
        {"type": 5},
        "text",
        5,
    ],
)
def test_anthropic_1_bad_blocks(server: Asked, block: Any) -> None:
    message = server.refused_message(message_body([block]))
    assert "messages[0].content" in message


def test_anthropic_1_a_plain_document_is_text(server: Asked) -> None:
    document = {"type": "document", "source": {"type": "text", "data": "From a file"}}
    server.message([document, {"type": "text", "text": "SAY:Hi"}])
    assert "From a file\nSAY:Hi" in prompt_of(server)


def test_anthropic_1_key_in_either_header(keyed: Asked) -> None:
    for headers in ({"x-api-key": "a-good-key"}, {"authorization": "Bearer a-good-key"}):
        keyed.post(MESSAGES, message_body(), **headers)
    for headers in ({}, {"x-api-key": "wrong-key"}, {"authorization": "Basic a-good-key"}):
        answer = keyed.post(MESSAGES, message_body(), 401, **headers)
        assert answer["error"]["type"] == "authentication_error"


def test_anthropic_2_events_in_order(server: Asked) -> None:
    events = server.message_events(f"SAY:Well, {CALL}", tools=TOOLS)
    kinds = [event.type for event in events]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    open_index, following = None, 0
    for event in events[1:-2]:
        if event.type == "content_block_start":
            assert open_index is None
            assert event.index == following
            open_index, following = event.index, following + 1
        else:
            assert event.index == open_index
            open_index = None if event.type == "content_block_stop" else open_index
    assert open_index is None
    assert following == 2
    start = events[0].message
    assert (start.stop_reason, start.content, start.model) == (None, [], MODEL)
    assert events[-2].delta.stop_reason == "tool_use"
    partial = [
        e.delta.partial_json
        for e in events
        if e.type == "content_block_delta" and e.delta.type == "input_json_delta"
    ]
    assert json.loads("".join(partial)) == {"city": "Paris"}


def test_anthropic_2_eager_input_is_streamed(server: Asked) -> None:
    tools = [{**TOOLS[0], "eager_input_streaming": True}]
    events = server.message_events(f"SAY:{CALL}", tools=tools)
    partial = [e.delta.partial_json for e in events if e.type == "content_block_delta"]
    assert len(partial) > 2
    assert json.loads("".join(partial)) == {"city": "Paris"}


def test_anthropic_2_ping_while_the_prompt_is_read(server: Asked) -> None:
    events = server.message_events("SAY(reading=0.5):Hi")
    pings = [event for event in events if isinstance(event, dict)]
    assert pings
    assert all(ping == {"type": "ping"} for ping in pings)


def test_anthropic_2_error_within_a_stream(double: Asked) -> None:
    body = message_body("SAY(fails=overloaded):Hi", stream=True)
    events = [json.loads(event) for event in double.events(MESSAGES, body)]
    assert events[-1]["type"] == "error"
    assert events[-1]["error"]["type"] == "overloaded_error"
    with (
        pytest.raises(anthropic.APIStatusError) as error,
        double.anthropic.messages.stream(
            model=MODEL,
            max_tokens=100,
            messages=[{"role": "user", "content": "SAY(fails=broken):Hi"}],
        ) as stream,
    ):
        list(stream)
    assert "api_error" in str(error.value)
    assert "secret" not in str(error.value)


def test_anthropic_3_stop_reasons(server: Asked) -> None:
    answer = server.message("SAY:Hello world")
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    answer = server.message("SAY:Hello world", stop_sequences=["zzz", "o w"])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "o w")
    assert answer.content[0].model_dump()["text"] == "Hell"
    assert server.message("SAY:Hello world", max_tokens=2).stop_reason == "max_tokens"
    assert server.message(f"SAY:{CALL}", tools=TOOLS).stop_reason == "tool_use"
    long = "SAY:" + "Hello world, " * 30
    prompt = server.post(COUNT, message_body(long))["input_tokens"]
    answer = server.message(long, max_tokens=500)
    assert answer.stop_reason == "model_context_window_exceeded"
    assert prompt + answer.usage.output_tokens == server.engine.context


def test_anthropic_4_tool_choice(server: Asked) -> None:
    answer = server.message(f"SAY:{CALL}", tools=TOOLS, tool_choice={"type": "none"})
    assert [block.type for block in answer.content] == ["text"]
    for choice in ({"type": "auto"}, {"type": "auto", "disable_parallel_tool_use": True}):
        answer = server.message(f"SAY:{CALL}", tools=TOOLS, tool_choice=choice)
        assert answer.content[0].model_dump()["input"] == {"city": "Paris"}
    for wrong in ("any", {}, {"type": "maybe"}, {"type": "tool", "name": "nobody"}):
        server.refused_message(message_body(tools=TOOLS, tool_choice=wrong))
    server.refused_message(message_body(tool_choice={"type": "any"}))
    search = {"type": "web_search_20250305", "name": "web_search"}
    for wrong in ("x", [5], [{"name": "a"}], [search], TOOLS * 2, [{"input_schema": {}}]):
        server.refused_message(message_body(tools=wrong))


def test_anthropic_4_a_malformed_call_is_text(server: Asked) -> None:
    text = 'Well <tool_call>\n{"name": "get_weather", "arguments": {"city": Paris}}\n</tool_call>'
    answer = server.message(f"SAY:{text}", tools=TOOLS)
    assert answer.stop_reason == "end_turn"
    assert "".join(block.model_dump()["text"] for block in answer.content) == text
    for eager in (False, True):
        tools: Any = [{**TOOLS[0], "eager_input_streaming": eager}]
        events = server.message_events(f"SAY:{text}", tools=tools)
        assert events[-2].delta.stop_reason == "end_turn"
        kinds = [e.content_block.type for e in events if e.type == "content_block_start"]
        assert "text" in kinds
        assert eager or "tool_use" not in kinds


def test_anthropic_5_thinking_is_signed_and_comes_back(thinker: Asked) -> None:
    answer = thinker.message(THOUGHT, thinking={"type": "enabled", "budget_tokens": 50})
    thinking, text = answer.content
    assert (thinking.type, text.type) == ("thinking", "text")
    assert thinking.model_dump()["thinking"] == "Let me see"
    assert thinking.model_dump()["signature"]
    assert answer.usage.output_tokens_details is not None
    assert answer.usage.output_tokens_details.thinking_tokens > 0
    blocks = [block.model_dump(exclude_none=True) for block in answer.content]

    def again(blocks: list[dict[str, Any]]) -> str:
        messages = [
            {"role": "user", "content": "Where?"},
            {"role": "assistant", "content": blocks},
            {"role": "user", "content": "SAY:Fine"},
        ]
        thinker.post(MESSAGES, {**message_body(), "messages": messages})
        return prompt_of(thinker)

    assert "<think>\nLet me see\n</think>\nParis" in again(blocks)
    foreign = {**blocks[0], "signature": "c29tZWJvZHkgZWxzZSdz"}
    changed = {**blocks[0], "thinking": "Let me lie"}
    redacted = {"type": "redacted_thinking", "data": "xyz"}
    for other in (foreign, changed, redacted, {"type": "thinking", "thinking": "x"}):
        assert "assistant\nParis<|im_end|>" in again([other, blocks[1]])


def test_anthropic_5_thinking_is_streamed(thinker: Asked) -> None:
    events = thinker.message_events(THOUGHT)
    deltas = [event.delta for event in events if event.type == "content_block_delta"]
    kinds = list(dict.fromkeys(delta.type for delta in deltas))
    assert kinds == ["thinking_delta", "signature_delta", "text_delta"]
    text = "".join(delta.thinking for delta in deltas if delta.type == "thinking_delta")
    assert text == "Let me see"
    with thinker.anthropic.messages.stream(
        model=MODEL, max_tokens=100, messages=[{"role": "user", "content": THOUGHT}]
    ) as stream:
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "text"]


def test_anthropic_5_thinking_that_is_not_shown_comes_back_too(thinker: Asked) -> None:
    answer = thinker.message(THOUGHT, thinking={"type": "adaptive", "display": "omitted"})
    block = answer.content[0].model_dump()
    assert block["thinking"] == ""
    messages = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": [block]},
        {"role": "user", "content": "SAY:Fine"},
    ]
    thinker.post(MESSAGES, {**message_body(), "messages": messages})
    assert "<think>\nLet me see\n</think>" in prompt_of(thinker)


def test_anthropic_5_thinking_is_switched(thinker: Asked, server: Asked) -> None:
    thinker.message(thinking={"type": "disabled"})
    assert prompt_of(thinker).endswith("</think>\n\n")
    for wrong in (
        "enabled",
        {},
        {"type": "maybe"},
        {"type": "enabled"},
        {"type": "enabled", "budget_tokens": 100},
        {"type": "enabled", "budget_tokens": 0},
    ):
        thinker.refused_message(message_body(thinking=wrong))
    enabled = {"type": "enabled", "budget_tokens": 50}
    assert "does not reason" in server.refused_message(message_body(thinking=enabled))
    server.message(thinking={"type": "adaptive"})
    server.message(thinking={"type": "disabled"})


def test_signatures() -> None:
    secret = b"s" * 32
    for text in ("", "Let me see", "naïve ☕"):
        assert verified(secret, text, sign(secret, text)) == text
        assert verified(secret, "", sign(secret, text, carry=True)) == text
        if text:
            assert verified(secret, text + "!", sign(secret, text)) is None
            assert verified(b"other", text, sign(secret, text)) is None
    for junk in ("", "x", "☕", "AAAA", "=" * 100, sign(secret, "x")[:-4]):
        assert verified(secret, "x", junk) is None


def test_anthropic_6_cache_control_and_cached_tokens(double: Asked) -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    content = [{"type": "text", "text": "SAY(cached=5):Hi", **mark}]
    total = double.post(COUNT, message_body(content))["input_tokens"]
    for fields in ({}, {"tools": [{**TOOLS[0], **mark}]}, mark):
        usage = double.message(content, **fields).usage
        assert usage.cache_read_input_tokens == 5
    usage = double.message(content).usage
    created = usage.cache_creation_input_tokens
    assert created is not None
    assert created == max(double.engine.requests[-1].boundaries) - 5
    assert usage.input_tokens + 5 + created == total
    usage = double.message("SAY(cached=5):Hi").usage  # nothing is said of caching
    assert (usage.cache_creation_input_tokens, usage.input_tokens) == (0, total - 5)
    events = double.message_events("SAY(cached=5):Hi")
    for usage in (events[0].message.usage, events[-2].usage):
        assert (usage.cache_read_input_tokens, usage.input_tokens) == (5, total - 5)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"system": "Be brief"},
        {"tools": TOOLS},
        {"tools": TOOLS, "tool_choice": {"type": "any"}, "system": "x"},
        {"thinking": {"type": "disabled"}},
    ],
)
def test_anthropic_7_count_is_what_is_used_later(thinker: Asked, fields: dict[str, Any]) -> None:
    body = message_body("SAY(cached=3):Hello", **fields)
    counted = thinker.post(COUNT, {k: v for k, v in body.items() if k != "max_tokens"})
    usage = thinker.post(MESSAGES, body)["usage"]
    assert counted == {
        "input_tokens": usage["input_tokens"]
        + usage["cache_read_input_tokens"]
        + usage["cache_creation_input_tokens"]
    }


def test_anthropic_7_errors(double: Asked) -> None:
    full = message_body("SAY(raises=overloaded):x")
    answer = double.http.post(MESSAGES, json=full)
    assert answer.status_code == 529
    assert answer.headers["retry-after"] == "7"
    assert answer.json()["error"]["type"] == "overloaded_error"
    assert answer.json()["request_id"] == answer.headers["request-id"]
    double.refused_message(message_body(model="other"), 404, "not_found_error")
    double.refused_message(message_body("SAY(fails=broken):x"), 500, "api_error")
    assert "prompt is too long" in double.refused_message(message_body("word " * 600))
    for path in ("/v1/messages/batches", "/v1/messages/"):
        answer = double.post(path, {}, 404)
        assert answer["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError) as bad:
        double.anthropic.messages.create(
            model=MODEL,
            max_tokens=5,
            messages=[{"role": "user", "content": "x"}],
            stop_sequences=[""],
        )
    assert "stop_sequences" in str(bad.value)
    with pytest.raises(anthropic.OverloadedError):
        double.anthropic.messages.create(
            model=MODEL,
            max_tokens=5,
            messages=[{"role": "user", "content": "SAY(raises=overloaded):x"}],
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("container", "x"),
        ("mcp_servers", [{"type": "url", "url": "http://x", "name": "x"}]),
        ("speed", "fast"),
        ("context_management", {"edits": [{"type": "x"}]}),
    ],
)
def test_anthropic_7_what_cannot_be_honoured_is_named(server: Asked, name: str, value: Any) -> None:
    assert f"'{name}' cannot be honoured" in server.refused_message(message_body(**{name: value}))


def test_anthropic_7_nothing_is_taken_out_of_the_conversation(thinker: Asked) -> None:
    """As Claude Code asks for it."""
    edits = [{"type": "clear_thinking_20251015", "keep": "all"}]
    thinking = {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}
    answer = thinker.message("SAY:Hi", context_management={"edits": edits}, **thinking)
    assert answer.content[0].text == "Hi"  # type: ignore[union-attr]
    edits[0]["keep"] = {"type": "thinking_turns", "value": 1}  # type: ignore[assignment]
    body = message_body(context_management={"edits": edits})
    assert "'context_management' cannot be honoured" in thinker.refused_message(body)


def test_anthropic_8_the_billing_block_is_dropped(server: Asked) -> None:
    header = "x-anthropic-billing-header: cc_version=2.1; cch=12345;"
    prompts = []
    for system in (
        [{"type": "text", "text": header}, {"type": "text", "text": "Be brief"}],
        [{"type": "text", "text": f"{header}\nBe brief"}],
        f"{header}\nBe brief",
        "Be brief",
    ):
        server.message("SAY:Hi", system=system)
        prompts.append(prompt_of(server))
    assert len(set(prompts)) == 1


def test_anthropic_8_other_names_of_the_model(server: Asked) -> None:
    assert server.message(model="claude-opus-4-6").model == MODEL
    assert server.anthropic.models.retrieve("claude-opus-4-6").id == MODEL
    (model,) = server.anthropic.models.list().data
    assert (model.id, model.max_input_tokens) == (MODEL, server.engine.context)


def test_anthropic_9_structured_output_is_read(server: Asked) -> None:
    for wrong in (
        5,
        {"format": 5},
        {"format": {"type": "regex"}},
        {"format": {"type": "json_schema"}},
        {"effort": "extreme"},
    ):
        server.refused_message(message_body(output_config=wrong))
    server.message(output_config={"effort": "high"})


def test_anthropic_the_tokens_are_counted_as_the_engine_does(server: Asked) -> None:
    answer = server.message("SAY:Hello world")
    tokens = tiny_tokenizer().encode("Hello world", add_special_tokens=False)
    assert answer.usage.output_tokens == len(tokens) + 1  # the end of the turn is one
