"""Cases of llama.cpp's tools/server/tests (MIT), in our own words: which apply, and where they are.

Its unit tests run against its own server and look at fields that only it has. What they ask of a
server in general is asked of ours by the tests that the table names.
"""

from __future__ import annotations

import importlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.serve.servers import CALL, TOOLS, Asked, chat_body, content_of, message_body, scripted

CHAT = "/v1/chat/completions"
OTHER = "not asked: "

# Its file and case: the test that asks the same, or why it is not asked.
TABLE: dict[str, dict[str, str]] = {
    "chat_completion": {
        "completion with a system prompt": "test_ported.test_a_chat_has_an_id_a_model_and_usage",
        "stream": "test_ported.test_chunks_of_one_stream_belong_together",
        "with the openai library": "test_openai.test_openai_the_sdk_streams_and_collects",
        "chat template": OTHER + "templates are the model's own, see tests/chat",
        "prefilled assistant turn": "test_anthropic.test_anthropic_1_system_and_roles",
        "apply-template": OTHER + "a path of its own",
        "response format": "test_random_model.test_openai_09_forms_are_held_to",
        "response format, object with a schema": "test_ported.test_an_object_with_a_schema",
        "bad response format": "test_openai.test_openai_09_bad_forms",
        "json_schema beside the messages": OTHER + "a field of its own",
        "grammar beside the messages": OTHER + "GBNF; Lark and regex are response formats here",
        "invalid messages": "test_openai.test_openai_13_bad_messages",
        "timings per token": OTHER + "a field of its own; /metrics has times",
        "logprobs": "test_ported.test_logprobs_spell_the_answer",
        "logprobs in a stream": "test_openai.test_openai_04_logprobs_are_streamed",
        "logit bias": "test_ported.test_banned_tokens_do_not_come",
        "context exceeded": "test_random_model.test_a_prompt_longer_than_the_context_is_refused",
        "context exceeded in a stream": "test_ported.test_too_long_is_said_before_a_stream_begins",
        "return progress": OTHER + "a field of its own",
        "multiple choices": "test_openai.test_openai_02_n",
    },
    "completion": {
        "completion": "test_openai.test_openai_03_prompts_of_four_shapes",
        "stream": "test_ported.test_a_streamed_completion_is_the_same",
        "stream against non-stream": "test_ported.test_a_streamed_completion_is_the_same",
        "with the openai library": "test_ported.test_completions_with_the_sdk",
        "stops with the library": "test_ported.test_stops_with_line_breaks",
        "same seed, same result": "test_random_model."
        "test_openai_10_a_seed_gives_the_same_in_any_company",
        "other seed, other result": "test_random_model."
        "test_openai_10_a_seed_gives_the_same_in_any_company",
        "same result with other batch sizes": "test_ported.test_one_at_a_time_gives_the_same",
        "cache or none": "test_ported.test_the_cache_changes_nothing",
        "long prompt": "test_openai.test_openai_15_errors_as_the_sdk_sees_them",
        "tokens as input": "test_openai.test_openai_03_prompts_of_four_shapes",
        "text and tokens mixed": "test_openai.test_openai_03_prompts_of_four_shapes",  # refused
        "parallel slots": "test_http.test_many_streams_at_a_time",
        "response fields": OTHER + "a field of its own",
        "n_probs": "test_openai.test_openai_04_logprobs_of_completions",
        "n_probs after sampling": OTHER + "a field of its own",
        "logit bias": "test_ported.test_banned_tokens_do_not_come",
        "cancel": "test_faults.test_fault_client_goes_away",
    },
    "compat_anthropic": {
        "basic": "test_anthropic.test_anthropic_3_stop_reasons",
        "system": "test_anthropic.test_anthropic_1_system_and_roles",
        "several blocks": "test_anthropic.test_anthropic_1_a_plain_document_is_text",
        "conversation": "test_anthropic.test_anthropic_1_system_and_roles",
        "streaming": "test_anthropic.test_anthropic_2_events_in_order",
        "count tokens": "test_anthropic.test_anthropic_7_count_is_what_is_used_later",
        "count tokens without max_tokens": "test_anthropic."
        "test_anthropic_7_count_is_what_is_used_later",
        "tool use": "test_random_model.test_anthropic_4_forced_calls",
        "tool result": "test_anthropic.test_anthropic_1_tool_results",
        "tool result after text": "test_ported.test_text_before_a_tool_result",
        "tool result with an error": "test_anthropic.test_anthropic_1_tool_results",
        "tool streaming": "test_anthropic.test_anthropic_2_events_in_order",
        "vision": "test_anthropic.test_anthropic_1_bad_blocks",  # refused, with a reason
        "stop sequences": "test_anthropic.test_anthropic_3_stop_reasons",
        "temperature, top_p, top_k": "test_ported.test_sampling_of_anthropic",
        "no messages": "test_anthropic.test_anthropic_1_what_is_required",
        "empty messages": "test_anthropic.test_anthropic_1_what_is_required",  # refused
        "indices of blocks": "test_anthropic.test_anthropic_2_events_in_order",
        "thinking": "test_anthropic.test_anthropic_5_thinking_is_signed_and_comes_back",
        "thinking in a stream": "test_anthropic.test_anthropic_5_thinking_is_streamed",
        "metadata": "test_ported.test_users_are_clients",
        "differs from openai": "test_ported.test_the_two_protocols_do_not_mix",
    },
    "tool_call": {
        "required tool": "test_random_model.test_openai_06_forced_calls",
        "required tool in a stream": "test_ported.test_a_forced_call_in_a_stream",
        "no tools, or none chosen": "test_openai.test_openai_06_choice_none_gives_text",
        "weather": "test_openai.test_openai_06_a_call",
        "result of a calculation": "test_openai.test_openai_13_roles_parts_and_results",
        "thoughts": "test_openai.test_openai_08_reasoning_tokens",
        "notations of many models": OTHER + "see tests/chat",
    },
    "stream": {
        "resume, and stop by another request": OTHER + "streams that outlive their client",
        "client gone while loading": "test_faults.test_fault_client_goes_away",
    },
    "security": {
        "public paths": "test_http.test_keys",
        "static files": OTHER + "there are none",
        "wrong key": "test_http.test_keys",
        "right key": "test_http.test_keys",
        "key in x-api-key": "test_anthropic.test_anthropic_1_key_in_either_header",
        "right key in the library": "test_ported.test_the_sdk_with_a_key",
        "cors": "test_http.test_cors_for_named_origins",
        "local files as images": "test_ported.test_no_address_is_opened",
    },
    "metrics": {
        "cached tokens of prompts": "test_http.test_metrics_count",
    },
}


@pytest.mark.parametrize(
    "place",
    sorted({p for cases in TABLE.values() for p in cases.values() if not p.startswith(OTHER)}),
)
def test_the_table_names_tests(place: str) -> None:
    module, name = place.split(".")
    assert callable(getattr(importlib.import_module(f"tests.serve.{module}"), name))


def test_a_chat_has_an_id_a_model_and_usage(server: Asked) -> None:
    body = chat_body("SAY:Hello", max_tokens=3)
    body["messages"].insert(0, {"role": "system", "content": "Book"})
    answer = server.post(CHAT, body)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["system_fingerprint"].startswith("fp_")
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["choices"][0]["finish_reason"] == "length"


def test_chunks_of_one_stream_belong_together(server: Asked) -> None:
    chunks = server.chunks("SAY:Hello world")
    assert len({(c.id, c.created, c.model, c.system_fingerprint) for c in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(chunks) - 1)
    assert "content" not in deltas[-1].model_fields_set


def test_an_object_with_a_schema(server: Asked) -> None:
    for form in ({"const": "42"}, {"type": "string", "enum": ["42"]}):
        answer = server.chat(response_format={"type": "json_object", "schema": form})
        assert answer.choices[0].message.content == '"42"'
    for wrong in (123, {"type": 123}, {"type": "hiccup"}):
        body = chat_body(response_format={"type": "json_object", "schema": wrong})
        assert server.post(CHAT, body, 400)["error"]["param"].startswith("response_format")


def test_logprobs_spell_the_answer(server: Asked) -> None:
    (choice,) = server.chat("SAY:Once upon a time", logprobs=True, top_logprobs=10).choices
    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    assert "".join(token.token for token in tokens) == choice.message.content
    assert all(len(token.top_logprobs) == 10 and token.logprob <= 0 for token in tokens)


def test_banned_tokens_do_not_come(server: Asked) -> None:
    (banned,) = server.tokenizer.encode("x", add_special_tokens=False)
    for path, body in (
        (CHAT, chat_body("SAY:xyz")),
        ("/v1/completions", {"prompt": "SAY:xyz\n"}),
    ):
        answer = server.post(path, {**body, "logit_bias": {str(banned): -100}, "max_tokens": 3})
        choice = answer["choices"][0]
        assert "x" not in (choice.get("text") or choice.get("message", {}).get("content"))


def test_too_long_is_said_before_a_stream_begins(server: Asked) -> None:
    body = chat_body("word " * 600, stream=True)
    assert server.post(CHAT, body, 400)["error"]["code"] == "context_length_exceeded"
    assert "too long" in server.refused_message(message_body("word " * 600, stream=True))


def test_a_streamed_completion_is_the_same(server: Asked) -> None:
    body = {"prompt": ["SAY:Hello\n", "SAY:world\n"], "max_tokens": 3}
    whole = server.post("/v1/completions", body)
    *events, done = server.events("/v1/completions", {**body, "stream": True})
    texts = ["", ""]
    reasons: list[Any] = [None, None]
    for event in events:
        for choice in json.loads(event)["choices"]:
            texts[choice["index"]] += choice["text"]
            reasons[choice["index"]] = choice["finish_reason"]
    assert done == "[DONE]"
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert reasons == [choice["finish_reason"] for choice in whole["choices"]]


def test_completions_with_the_sdk(server: Asked) -> None:
    whole = server.openai.completions.create(model="gpt-3.5-turbo-instruct", prompt="SAY:Hello\n")
    assert whole.choices[0].text == "Hello"
    stream = server.openai.completions.create(model="tiny", prompt="SAY:Hello\n", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "Hello"


def test_stops_with_line_breaks(server: Asked) -> None:
    text = "Hey there!\nUser:\nTell me"
    chunks = server.chunks(f"SAY:{text}", stop=["User:\n", "Assistant:\n"])
    assert content_of(chunks) == "Hey there!\n"


def test_one_at_a_time_gives_the_same(server: Asked) -> None:
    prompts = [f"SAY:answer number {i}" for i in range(6)]

    def ask(asked: Asked) -> list[str | None]:
        with ThreadPoolExecutor(6) as pool:
            return [a.choices[0].message.content for a in pool.map(asked.chat, prompts)]

    with scripted(max_concurrent=1) as one:
        assert ask(one) == ask(server) == [p.removeprefix("SAY:") for p in prompts]


def test_the_cache_changes_nothing(server: Asked) -> None:
    body = "SAY:What is remembered is answered alike, " * 3
    answers = [server.chat(body, logprobs=True) for _ in range(2)]
    details = [a.usage.prompt_tokens_details for a in answers if a.usage]
    assert details[1]
    assert details[1].cached_tokens
    assert answers[0].choices == answers[1].choices


def test_text_before_a_tool_result(server: Asked) -> None:
    use = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "Sunny, 25°C"}
    messages = [
        {"role": "user", "content": "What is it like?"},
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [{"type": "text", "text": "SAY:Here it is"}, result]},
    ]
    server.post("/v1/messages", {**message_body(), "messages": messages})
    prompt = server.tokenizer.decode(list(server.engine.requests[-1].tokens))
    assert prompt.index("SAY:Here it is<|im_end|>") < prompt.index("tool\nSunny, 25°C<|im_end|>")


def test_sampling_of_anthropic(server: Asked) -> None:
    server.message(temperature=0.5, top_p=0.9, top_k=40)
    sampling = server.engine.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 40)
    for wrong in ({"temperature": 1.1}, {"top_p": 2}, {"top_k": -1}, {"top_k": 1.5}):
        server.refused_message(message_body(**wrong))


def test_users_are_clients(server: Asked) -> None:
    """Each takes turns with the others."""
    server.message(metadata={"user_id": "ann"})
    server.chat(user="bob")
    server.chat()
    clients = [request.client for request in server.engine.requests[-3:]]
    assert clients == ["127.0.0.1/ann", "127.0.0.1/bob", "127.0.0.1/"]
    server.refused_message(message_body(metadata={"user_id": 5}))


def test_the_two_protocols_do_not_mix(server: Asked) -> None:
    chat = server.post(CHAT, chat_body())
    message = server.post("/v1/messages", message_body())
    assert not {"type", "content", "stop_reason"} & chat.keys()
    assert not {"object", "choices", "created"} & message.keys()


def test_a_forced_call_in_a_stream(server: Asked) -> None:
    chunks = server.chunks(
        f"SAY:{CALL}", tools=TOOLS, tool_choice="required", parallel_tool_calls=False
    )
    assert content_of(chunks) == ""
    calls = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
    assert [call.function.name for call in calls if call.function and call.id] == ["get_weather"]
    arguments = "".join(c.function.arguments or "" for c in calls if c.function)
    assert json.loads(arguments) == {"city": "Paris"}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_the_sdk_with_a_key(keyed: Asked) -> None:
    with keyed.openai.with_options(api_key="a-good-key") as client:
        assert client.models.list().data
    with keyed.anthropic.with_options(api_key="a-good-key") as client:
        assert client.models.list().data


@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://127.0.0.1:9/x.png", "data:,x"])
def test_no_address_is_opened(server: Asked, url: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    assert "text only" in server.refused(CHAT, chat_body([part]), "messages[0].content[0].type")


def test_base_urls_that_are_a_little_wrong(server: Asked) -> None:
    answer = server.http.post("/chat/completions", json=chat_body())
    assert "ends in /v1" in answer.json()["error"]["message"]
    answer = server.http.post("/v1/v1/messages", json=message_body())
    assert "ends before /v1" in answer.json()["error"]["message"]
