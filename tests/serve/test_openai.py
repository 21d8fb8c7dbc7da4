"""OpenAI's protocol, point by point. The numbers are those of docs/serving-reference.md."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.serve.servers import (
    CALL,
    MODEL,
    TOOLS,
    Asked,
    chat_body,
    content_of,
    tiny_tokenizer,
)

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"

OPTIONAL = {
    "audio",
    "add_generation_prompt",
    "chat_template_kwargs",
    "continue_final_message",
    "frequency_penalty",
    "function_call",
    "functions",
    "logit_bias",
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "metadata",
    "min_p",
    "modalities",
    "n",
    "parallel_tool_calls",
    "prediction",
    "presence_penalty",
    "prompt_cache_key",
    "reasoning_effort",
    "repetition_penalty",
    "response_format",
    "safety_identifier",
    "seed",
    "service_tier",
    "stop",
    "store",
    "stream",
    "stream_options",
    "temperature",
    "thinking_budget",
    "tool_choice",
    "tools",
    "top_k",
    "top_logprobs",
    "top_p",
    "user",
    "verbosity",
    "web_search_options",
}


def test_openai_01_null_is_absent(server: Asked) -> None:
    nothing = dict.fromkeys(OPTIONAL)
    assert server.chat("SAY:Hi", **nothing).choices[0].message.content == "Hi"
    with_nulls = server.engine.requests[-1]
    server.chat("SAY:Hi")
    assert server.engine.requests[-1] == with_nulls
    nothing |= dict.fromkeys(("echo", "suffix", "best_of"))
    assert server.complete("SAY:Hi\n", **nothing).choices[0].text == "Hi"


def test_openai_01_null_in_messages_is_absent(server: Asked) -> None:
    message = {"role": "user", "content": "SAY:Hi", "name": None, "tool_calls": None}
    body = {"model": None, "messages": [message]}
    assert server.post(CHAT, body)["choices"][0]["message"]["content"] == "Hi"


def test_openai_01_an_answer_goes_on_from_its_beginning(server: Asked) -> None:
    """As vLLM has it. Without the field the assistant's turn is over, and another one begins."""
    asked = {"role": "user", "content": "SAY:Hello world"}
    body = {"model": MODEL, "messages": [asked, {"role": "assistant", "content": "Hello"}]}
    for fields, text in (
        ({}, "Hello world"),
        ({"continue_final_message": False, "add_generation_prompt": True}, "Hello world"),
        ({"continue_final_message": True}, " world"),
        ({"continue_final_message": True, "add_generation_prompt": False}, " world"),
    ):
        answer = server.post(CHAT, {**body, **fields})
        assert answer["choices"][0]["message"]["content"] == text
    *events, _ = server.events(CHAT, {**body, "continue_final_message": True, "stream": True})
    deltas = [json.loads(event)["choices"][0]["delta"].get("content") for event in events]
    assert "".join(filter(None, deltas)) == " world"
    for fields, param, reason in (
        ({"add_generation_prompt": True}, "add_generation_prompt", "must be the opposite"),
        ({"messages": [asked]}, "messages", "must end with text of the assistant's"),
        ({"response_format": {"type": "json_object"}}, "messages", "excludes an answer of a given"),
        ({"tools": TOOLS, "parallel_tool_calls": False}, "messages", "excludes calls"),
    ):
        asked_for = {**body, "continue_final_message": True, **fields}
        assert reason in server.refused(CHAT, asked_for, param)
    refused = {**body, "add_generation_prompt": False}
    assert "must be the opposite" in server.refused(CHAT, refused, "add_generation_prompt")


def test_openai_02_n(server: Asked) -> None:
    answer = server.chat("SAY:Hi there", n=3)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert {c.message.content for c in answer.choices} == {"Hi there"}
    assert answer.usage is not None
    one = server.chat("SAY:Hi there").usage
    assert one is not None
    assert answer.usage.prompt_tokens == one.prompt_tokens
    assert answer.usage.completion_tokens == 3 * one.completion_tokens
    chunks = server.chunks("SAY:Hi there", n=2)
    assert [content_of(chunks, i) for i in range(2)] == ["Hi there"] * 2


def test_openai_02_n_answers_have_seeds_of_their_own(server: Asked) -> None:
    server.chat("SAY:Hi", n=2, seed=7)
    seeds = [request.sampling.seed for request in server.engine.requests[-2:]]
    assert seeds == [7, 8]


def test_openai_02_best_of(server: Asked) -> None:
    answer = server.complete("SAY:Hi\n", n=1, best_of=3)
    assert len(answer.choices) == 1
    assert answer.choices[0].logprobs is None
    assert [r.top_logprobs for r in server.engine.requests[-3:]] == [0, 0, 0]
    body = {"prompt": "SAY:Hi\n"}
    server.refused(COMPLETE, {**body, "n": 2, "best_of": 1}, "best_of")
    server.refused(COMPLETE, {**body, "best_of": 2, "stream": True}, "best_of")


def test_openai_02_echo_and_suffix(server: Asked) -> None:
    assert server.complete("SAY:Hi\n", echo=True).choices[0].text == "SAY:Hi\nHi"
    tokens = tiny_tokenizer().encode("SAY:Hi\n", add_special_tokens=False)
    assert server.complete(tokens, echo=True).choices[0].text == "SAY:Hi\nHi"
    stream = server.events(COMPLETE, {"prompt": "SAY:Hi\n", "echo": True, "stream": True})
    texts = [json.loads(event)["choices"][0]["text"] for event in stream[:-1]]
    assert "".join(texts) == "SAY:Hi\nHi"
    server.refused(COMPLETE, {"prompt": "SAY:Hi\n", "echo": True, "logprobs": 1}, "echo")
    server.refused(COMPLETE, {"prompt": "SAY:Hi\n", "suffix": "!"}, "suffix")
    assert server.complete("SAY:Hi\n", suffix="").choices[0].text == "Hi"


def test_openai_03_prompts_of_four_shapes(server: Asked) -> None:
    encode = tiny_tokenizer().encode
    a, b = encode("SAY:one\n"), encode("SAY:two\n")
    assert [c.text for c in server.complete("SAY:one\n").choices] == ["one"]
    assert [c.text for c in server.complete(["SAY:one\n", "SAY:two\n"]).choices] == ["one", "two"]
    assert [c.text for c in server.complete(a).choices] == ["one"]
    answer = server.complete([a, b], n=2)
    assert [(c.index, c.text) for c in answer.choices] == [
        (0, "one"),
        (1, "one"),
        (2, "two"),
        (3, "two"),
    ]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(a) + len(b)
    for wrong in ([], [1, "a"], [[1], "a"], [[]], 5, {"a": 1}, [1.5], [True], [["a"]]):
        server.refused(COMPLETE, {"prompt": wrong}, "prompt")
    server.refused(COMPLETE, {}, "prompt")


@pytest.mark.parametrize("tokens", [[384], [-1], [2**40], [3, 999999999]])
def test_openai_03_tokens_outside_the_vocabulary_are_refused(
    server: Asked, tokens: list[int]
) -> None:
    assert "model's 384" in server.refused(COMPLETE, {"prompt": tokens}, "prompt")
    server.refused(COMPLETE, {"prompt": [[5], tokens]}, "prompt")


def test_openai_04_logprobs_of_chats(server: Asked) -> None:
    for top in (None, 0, 3, 20):
        answer = server.chat("SAY:Héllo", logprobs=True, top_logprobs=top)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert all(len(token.top_logprobs) == (top or 0) for token in logprobs.content)
        assert b"".join(bytes(t.bytes or []) for t in logprobs.content).decode() == "Héllo"
        assert all(token.logprob == 0 for token in logprobs.content)  # the model is certain
    assert server.chat("SAY:Hi").choices[0].logprobs is None
    for wrong in ({"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 21}):
        server.refused(CHAT, chat_body(**wrong), "top_logprobs")
    server.refused(CHAT, chat_body(logprobs=3), "logprobs")


def test_openai_04_logprobs_are_streamed(server: Asked) -> None:
    chunks = server.chunks("SAY:Héllo", logprobs=True, top_logprobs=2)
    tokens = [
        token
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs
        for token in choice.logprobs.content or []
    ]
    assert b"".join(bytes(token.bytes or []) for token in tokens).decode() == "Héllo"
    assert all(len(token.top_logprobs) == 2 for token in tokens)


def test_openai_04_logprobs_of_completions(server: Asked) -> None:
    (choice,) = server.complete("SAY:Hello there\n", logprobs=2).choices
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == "Hello there"
    assert logprobs.text_offset is not None
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert "Hello there"[offset:].startswith(token)
    assert all(len(top) == 2 for top in logprobs.top_logprobs or [])
    stream = server.events(COMPLETE, {"prompt": "SAY:Hello\n", "logprobs": 0, "stream": True})
    tokens = [
        token
        for event in stream[:-1]
        for choice in json.loads(event)["choices"]
        for token in (choice["logprobs"] or {"tokens": []})["tokens"]
    ]
    assert "".join(tokens) == "Hello"
    server.refused(COMPLETE, {"prompt": "a", "logprobs": 21}, "logprobs")
    server.refused(COMPLETE, {"prompt": "a", "logprobs": True}, "logprobs")


@pytest.mark.parametrize("stop", ["orld", ["xyz", "orld"], ["o w", "never"]])
def test_openai_05_stop_is_honoured_and_never_emitted(server: Asked, stop: Any) -> None:
    text = "Hello world, goodbye"
    words = [stop] if isinstance(stop, str) else stop
    kept = min((text.split(word)[0] for word in words), key=len)
    (choice,) = server.chat(f"SAY:{text}", stop=stop).choices
    assert (choice.message.content, choice.finish_reason) == (kept, "stop")
    chunks = server.chunks(f"SAY:{text}", stop=stop)
    assert content_of(chunks) == kept
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stop", [5, [5], "", [""], ["a"] * 5, {"a": 1}, [None]])
def test_openai_05_bad_stops(server: Asked, stop: Any) -> None:
    body = chat_body(stop=stop)
    error = server.post(CHAT, body, 400)["error"]
    assert error["param"].startswith("stop")


def test_openai_06_a_call(server: Asked) -> None:
    (choice,) = server.chat(f"SAY:Let me see. {CALL}", tools=TOOLS).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    (choice,) = server.chat(f"SAY:{CALL}", tools=TOOLS).choices
    assert choice.message.content is None


def test_openai_06_arguments_are_streamed(server: Asked) -> None:
    chunks = server.chunks(f"SAY:{CALL}\n{CALL}", tools=TOOLS)
    calls: dict[int, dict[str, Any]] = {}
    fragments = 0
    for delta in (choice.delta for chunk in chunks for choice in chunk.choices):
        for call in delta.tool_calls or []:
            if call.id:
                assert call.index not in calls
                assert call.function is not None
                calls[call.index] = {"id": call.id, "name": call.function.name, "text": ""}
            assert call.function is not None
            calls[call.index]["text"] += call.function.arguments or ""
            fragments += 1
    assert sorted(calls) == [0, 1]
    assert calls[0]["id"] != calls[1]["id"]
    assert all(json.loads(call["text"]) == {"city": "Paris"} for call in calls.values())
    assert fragments > 4
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_openai_06_choice_none_gives_text(server: Asked) -> None:
    (choice,) = server.chat(f"SAY:{CALL}", tools=TOOLS, tool_choice="none").choices
    assert choice.finish_reason == "stop"
    assert choice.message.tool_calls is None
    assert "get_weather" in (choice.message.content or "")


def test_openai_06_a_malformed_call_is_text(server: Asked) -> None:
    broken = '<tool_call>\n{"name": "get_weather", "arguments": {"city": Paris}}\n</tool_call>'
    for text in (broken, '<tool_call>\n{"name": "get_weather", "argum'):
        (choice,) = server.chat(f"SAY:Well {text}", tools=TOOLS).choices
        assert choice.finish_reason == "stop"
        assert choice.message.tool_calls is None
        assert choice.message.content == f"Well {text}"
        chunks = server.chunks(f"SAY:Well {text}", tools=TOOLS)
        assert content_of(chunks).endswith(text[-10:])
        assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": "x"}, "tools"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": TOOLS + TOOLS}, "tools"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom"}}, "tool_choice.type"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
        ),
        ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls"),
    ],
)
def test_openai_06_bad_tools(server: Asked, fields: dict[str, Any], param: str) -> None:
    server.refused(CHAT, chat_body(**fields), param)


def test_openai_07_one_finish_reason_and_it_is_last(server: Asked) -> None:
    for fields in ({}, {"tools": TOOLS}, {"n": 2}, {"logprobs": True}, {"max_tokens": 3}):
        for text in ("Hi there", CALL, ""):
            chunks = server.chunks(f"SAY:{text}", **fields)
            for index in range(fields.get("n", 1)):
                mine = [c for chunk in chunks for c in chunk.choices if c.index == index]
                assert [c.finish_reason for c in mine[:-1]] == [None] * (len(mine) - 1)
                assert mine[-1].finish_reason
                assert mine[0].delta.role == "assistant"


def test_openai_08_usage(double: Asked) -> None:
    usage = double.chat("SAY(cached=5):Hello").usage
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 5
    tokens = tiny_tokenizer().encode("Hello", add_special_tokens=False)
    assert usage.completion_tokens == len(tokens) + 1  # the end of the turn is one
    *chunks, last = double.chunks("SAY(cached=5):Hello", stream_options={"include_usage": True})
    assert last.usage == usage
    assert last.choices == []
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in chunks)
    for options in (None, {}, {"include_usage": False}, {"include_usage": None}):
        chunks = double.chunks("SAY:Hello", stream_options=options)
        assert all("usage" not in chunk.model_fields_set for chunk in chunks)
    double.refused(CHAT, chat_body(stream=True, stream_options=5), "stream_options")


def test_openai_08_reasoning_tokens(thinker: Asked) -> None:
    answer = thinker.chat("SAY:<think>\nLet me see\n</think>\n\nParis")
    message = answer.choices[0].message
    assert message.content == "Paris"
    assert message.model_extra == {"reasoning_content": "Let me see"}
    assert answer.usage is not None
    details = answer.usage.completion_tokens_details
    assert details is not None
    assert details.reasoning_tokens is not None
    assert 0 < details.reasoning_tokens < answer.usage.completion_tokens
    chunks = thinker.chunks("SAY:<think>\nLet me see\n</think>\n\nParis")
    assert content_of(chunks) == "Paris"
    reasoning = [
        (choice.delta.model_extra or {}).get("reasoning_content", "")
        for chunk in chunks
        for choice in chunk.choices
    ]
    assert "".join(reasoning) == "Let me see"


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ("json", "response_format"),
        ({}, "response_format.type"),
        ({"type": "nonsense"}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": 5}, "response_format.json_schema"),
        (
            {"type": "json_schema", "json_schema": {"schema": 5}},
            "response_format.json_schema.schema",
        ),
        ({"type": "regex"}, "response_format.regex"),
        ({"type": "choice", "choice": [5]}, "response_format.choice[0]"),
    ],
)
def test_openai_09_bad_forms(server: Asked, form: Any, param: str) -> None:
    before = len(server.engine.requests)
    server.refused(CHAT, chat_body(response_format=form), param)
    assert len(server.engine.requests) == before


def test_openai_09_text_is_a_form(server: Asked) -> None:
    answer = server.chat("SAY:Hi", response_format={"type": "text"})
    assert answer.choices[0].message.content == "Hi"


def test_openai_10_seed(server: Asked) -> None:
    server.chat(seed=5)
    assert server.engine.requests[-1].sampling.seed == 5
    for wrong in ("5", 1.5, True, 2**63, [1]):
        server.refused(CHAT, chat_body(seed=wrong), "seed")


def test_openai_11_the_smaller_limit_holds(server: Asked) -> None:
    tokens = tiny_tokenizer().encode("Hello world", add_special_tokens=False)
    for fields in (
        {"max_tokens": 3},
        {"max_completion_tokens": 3},
        {"max_tokens": 3, "max_completion_tokens": 99},
        {"max_tokens": 99, "max_completion_tokens": 3},
    ):
        (choice,) = server.chat("SAY:Hello world", **fields).choices
        assert choice.finish_reason == "length"
        assert choice.message.content == tiny_tokenizer().decode(tokens[:3])
    server.chat("SAY:Hi", max_tokens=10**9)  # clamped by the engine
    for name in ("max_tokens", "max_completion_tokens"):
        for wrong in (0, -1, 1.5, "3", True):
            server.refused(CHAT, chat_body(**{name: wrong}), name)


def test_openai_12_effort_and_template_arguments(thinker: Asked) -> None:
    def prompt() -> str:
        return str(thinker.tokenizer.decode(list(thinker.engine.requests[-1].tokens)))

    for fields in (
        {"reasoning_effort": "none"},
        {"enable_thinking": False},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ):
        thinker.chat(**fields)
        assert prompt().endswith("</think>\n\n")
    thinker.chat(reasoning_effort="high")
    assert not prompt().endswith("</think>\n\n")
    for wrong in ("extreme", 5):
        thinker.refused(CHAT, chat_body(reasoning_effort=wrong), "reasoning_effort")
    thinker.refused(CHAT, chat_body(chat_template_kwargs={"chat_template": "{{ x }}"}), "messages")


def test_openai_12_a_model_that_does_not_reason_says_so(server: Asked) -> None:
    server.refused(CHAT, chat_body(reasoning_effort="high"), "reasoning_effort")
    server.refused(CHAT, chat_body(thinking_budget=100), "thinking")
    assert server.chat("SAY:Hi", reasoning_effort="none").choices[0].message.content == "Hi"


def test_openai_13_roles_parts_and_results(server: Asked) -> None:
    messages = [
        {"role": "developer", "content": "Be brief"},
        {"role": "user", "content": [{"type": "text", "text": "What"}, _text("is it?")]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": [_text("sunny")]},
        {"role": "user", "content": "SAY:Fine"},
    ]
    body = {"model": MODEL, "messages": messages, "tools": TOOLS}
    assert server.post(CHAT, body)["choices"][0]["message"]["content"] == "Fine"
    prompt = server.tokenizer.decode(list(server.engine.requests[-1].tokens))
    for part in ("Be brief", "What\nis it?", '"city": "Rome"', "sunny"):
        assert part in prompt


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("hello", "messages"),
        ({"role": "user"}, "messages"),
        ([5], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "wizard", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"text": "x"}]}], "messages[0].content[0].type"),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "http://x"}}],
                }
            ],
            "messages[0].content[0].type",
        ),
        ([{"role": "assistant"}], "messages[0].content"),
        ([{"role": "tool", "content": "x"}], "messages[0].tool_call_id"),
        (
            [{"role": "tool", "tool_call_id": "nobody", "content": "x"}],
            "messages[0].tool_call_id",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f"}}, 5]}],
            "messages[0].tool_calls[1]",
        ),
        (
            [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{"}}],
                }
            ],
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_openai_13_bad_messages(server: Asked, messages: Any, param: str) -> None:
    server.refused(CHAT, {"model": MODEL, "messages": messages}, param)


def test_openai_14_unknown_fields_are_ignored(server: Asked) -> None:
    answer = server.chat("SAY:Hi", best_friend=5, nested={"a": [1, {"b": None}]})
    assert answer.choices[0].message.content == "Hi"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("model", [5, [], {}]),
        ("temperature", ["1", True, [], -0.1, 2.1]),
        ("top_p", ["1", -0.1, 1.1]),
        ("top_k", [1.5, -2, "3"]),
        ("min_p", [-0.1, 2, "x"]),
        ("presence_penalty", [3, -3, "x"]),
        ("frequency_penalty", [3, -3, "x"]),
        ("repetition_penalty", [0, -1, "x"]),
        ("n", [0, -1, 1.5, "2", 129]),
        ("stream", [1, "true"]),
        ("logprobs", [1, "true"]),
        ("user", [5, []]),
        ("chat_template_kwargs", [5, "x"]),
    ],
)
def test_openai_14_wrong_types_are_named(server: Asked, name: str, values: list[Any]) -> None:
    for value in values:
        server.refused(CHAT, chat_body(**{name: value}), name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("audio", {"voice": "x", "format": "wav"}),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("modalities", ["text", "audio"]),
        ("store", True),
        ("verbosity", "high"),
        ("web_search_options", {}),
    ],
)
def test_openai_14_what_cannot_be_honoured_is_named(server: Asked, name: str, value: Any) -> None:
    assert "cannot be honoured" in server.refused(CHAT, chat_body(**{name: value}), name)


def test_openai_15_errors_as_the_sdk_sees_them(double: Asked) -> None:
    def ask(content: str, **fields: Any) -> Any:
        messages: Any = [{"role": "user", "content": content}]
        return double.openai.chat.completions.create(model=MODEL, messages=messages, **fields)

    with pytest.raises(openai.BadRequestError) as bad:
        ask("hi", temperature=9)
    assert bad.value.param == "temperature"
    assert bad.value.request_id is not None
    with pytest.raises(openai.NotFoundError) as missing:
        double.openai.chat.completions.create(
            model="another", messages=[{"role": "user", "content": "hi"}]
        )
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        ask("word " * 600)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.InternalServerError) as full:
        ask("SAY(raises=overloaded):x")
    assert full.value.status_code == 503
    assert full.value.response.headers["retry-after"] == "7"
    with pytest.raises(openai.InternalServerError) as broken:
        ask("SAY(fails=broken):x")
    assert broken.value.status_code == 500
    assert "secret" not in str(broken.value)


def test_openai_15_a_text_that_cannot_fit_is_not_even_made_into_tokens(server: Asked) -> None:
    text = "x" * 100_000
    for path, body in ((CHAT, chat_body(text)), (COMPLETE, {"prompt": ["a", text]})):
        error = server.post(path, body, 400)["error"]
        assert error["code"] == "context_length_exceeded"
        assert "100000 characters" in error["message"]


def test_openai_15_errors_within_a_stream(double: Asked) -> None:
    for name, code in (("overloaded", "overloaded"), ("broken", "server_error")):
        events = double.events(CHAT, chat_body(f"SAY(fails={name}):Hello", stream=True))
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["error"]["code"] == code
        messages: Any = [{"role": "user", "content": f"SAY(fails={name}):Hello"}]
        stream = double.openai.chat.completions.create(model=MODEL, messages=messages, stream=True)
        with pytest.raises(openai.APIError):
            list(stream)
    assert double.chat("SAY:Still here").choices[0].message.content == "Still here"


def test_openai_16_models(server: Asked) -> None:
    assert [model.id for model in server.openai.models.list()] == [MODEL]
    assert server.openai.models.retrieve(MODEL).id == MODEL
    assert server.openai.models.retrieve("gpt-5").id == MODEL  # an alias
    with pytest.raises(openai.NotFoundError) as missing:
        server.openai.models.retrieve("org/other")
    assert missing.value.code == "model_not_found"


def test_openai_16_the_true_model_is_reported(server: Asked) -> None:
    assert server.chat(model="gpt-5-turbo").model == MODEL
    assert {chunk.model for chunk in server.chunks(model="gpt-5-turbo")} == {MODEL}
    server.refused(CHAT, chat_body(model="other"), None, 404)
    server.refused(CHAT, chat_body(model=""), None, 404)


def test_openai_the_sdk_streams_and_collects(server: Asked) -> None:
    messages: Any = [{"role": "user", "content": f"SAY:Well, {CALL}"}]
    tools: Any = TOOLS
    with server.openai.chat.completions.stream(
        model=MODEL, messages=messages, tools=tools
    ) as stream:
        final = stream.get_final_completion()
    message = final.choices[0].message
    assert message.content == "Well,"
    assert message.tool_calls is not None
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Paris"}
