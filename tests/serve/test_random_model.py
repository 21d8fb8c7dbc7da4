"""The protocols over a real, random model: sampling, grammars, company and the prefix cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest

from optiq.serve.opening import open_model
from tests.serve.cases import NEVER_ENDS, model_and_tokenizer
from tests.serve.servers import TOOLS, Asked, chat_body, read_options, served

CHAT = "/v1/chat/completions"
ON = {str(token): bias for token, bias in NEVER_ENDS.items()}  # the answer does not end by itself
COLOUR = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "n": {"type": "integer", "maximum": 3}},
    "required": ["colour", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def random(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    options = read_options({})
    loaded = model_and_tokenizer(tmp_path_factory.mktemp("random"), tie_word_embeddings=False)
    with served(open_model(loaded, options), options) as asked:
        yield asked


def text_of(asked: Asked, content: str = "Tell me", **fields: Any) -> str:
    body = {"max_tokens": 16, "logit_bias": ON, **fields}
    return str(asked.chat(content, **body).choices[0].message.content)


def test_openai_10_a_seed_gives_the_same_in_any_company(random: Asked) -> None:
    alone = [text_of(random, seed=seed) for seed in range(6)]
    assert len(set(alone)) > 1
    with ThreadPoolExecutor(12) as pool:
        others = [
            pool.submit(text_of, random, f"Other {i}", temperature=2, seed=i) for i in range(6)
        ]
        mine = [pool.submit(text_of, random, seed=seed) for seed in range(6)]
        bad = pool.submit(random.http.post, CHAT, json=chat_body(n="x"))
        assert [one.result() for one in mine] == alone
        assert bad.result().status_code == 400
        assert all(one.result() for one in others)


def test_openai_10_several_answers_to_one_seed_are_made_again(random: Asked) -> None:
    def ask() -> list[str | None]:
        answer = random.chat("Tell me", n=3, seed=11, max_tokens=12, logit_bias=ON)
        return [choice.message.content for choice in answer.choices]

    first = ask()
    assert len(set(first)) == 3
    assert ask() == first


def test_temperature_zero_is_greedy(random: Asked) -> None:
    answer = random.chat(
        "Tell me", temperature=0, max_tokens=8, logprobs=True, top_logprobs=1, logit_bias=ON
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    greedy = text_of(random, temperature=0, max_tokens=8)
    assert {text_of(random, temperature=0, max_tokens=8) for _ in range(3)} == {greedy}
    assert all(token.logprob <= token.top_logprobs[0].logprob for token in logprobs.content)


def test_logit_bias_forces_a_token(random: Asked) -> None:
    (token,) = random.tokenizer.encode("x", add_special_tokens=False)
    body = {"logit_bias": {**ON, str(token): 100}, "max_tokens": 5}
    assert text_of(random, **body) == "xxxxx"


@pytest.mark.parametrize(
    ("form", "check"),
    [
        ({"type": "json_schema", "json_schema": {"name": "c", "schema": COLOUR}}, COLOUR),
        ({"type": "regex", "regex": "[ab]{3}c"}, {"pattern": "^[ab]{3}c$"}),
        ({"type": "choice", "choice": ["yes", "no"]}, {"enum": ["yes", "no"]}),
        ({"type": "lark", "lark": 'start: "a" "b"+ "c"'}, {"pattern": "^ab+c$"}),
    ],
)
def test_openai_09_forms_are_held_to(random: Asked, form: Any, check: Any) -> None:
    for seed in range(5):
        text = random.chat(response_format=form, seed=seed, max_tokens=300).choices[0].message
        value = json.loads(text.content or "") if check is COLOUR else text.content
        jsonschema.validate(value, check)


def test_openai_09_json_object(random: Asked) -> None:
    """Cut off it may be, but it is the beginning of an object, and nothing else."""
    for seed in range(5):
        answer = random.chat(response_format={"type": "json_object"}, seed=seed, max_tokens=40)
        text = answer.choices[0].message.content or ""
        assert text.lstrip().startswith("{")
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}},
        {"type": "json_schema", "json_schema": {"schema": {"not": {"type": "string"}}}},
        {"type": "regex", "regex": "("},
        {"type": "lark", "lark": "start: nobody"},
    ],
)
def test_openai_09_what_cannot_be_held_to_is_refused(random: Asked, form: Any) -> None:
    random.refused(CHAT, chat_body(response_format=form), "response_format")


def test_anthropic_9_structured_output(random: Asked) -> None:
    config = {"format": {"type": "json_schema", "schema": COLOUR}}
    answer = random.message(output_config=config, max_tokens=300)
    jsonschema.validate(json.loads(answer.content[0].model_dump()["text"]), COLOUR)


STRICT = {"name": "paint", "strict": True, "parameters": COLOUR}


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "paint"}}]
)
def test_openai_06_forced_calls(random: Asked, choice: Any) -> None:
    tools = [{"type": "function", "function": STRICT}]
    if choice != "required":
        tools = tools + TOOLS
    body = {"tools": tools, "tool_choice": choice, "max_tokens": 200}
    for seed in range(3):
        asked = {**body, "parallel_tool_calls": False, "seed": seed}
        (answer,) = random.chat(**asked).choices
        (call,) = answer.message.tool_calls or []
        assert call.type == "function"
        assert call.function.name == "paint"
        jsonschema.validate(json.loads(call.function.arguments), COLOUR)
        assert answer.finish_reason == "tool_calls"


@pytest.mark.parametrize(
    "choice",
    [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "paint"}],
)
def test_anthropic_4_forced_calls(random: Asked, choice: Any) -> None:
    tools = [{"name": "paint", "strict": True, "input_schema": COLOUR}]
    answer = random.message(tools=tools, tool_choice=choice, max_tokens=200)
    assert answer.stop_reason == "tool_use"
    (block,) = answer.content
    jsonschema.validate(block.model_dump()["input"], COLOUR)


def test_a_prompt_that_was_read_is_not_read_again(random: Asked) -> None:
    """Turn by turn: what was said is in the cache, and both protocols say so."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": "A new thing " * 6}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 8, "logit_bias": ON}
    first = random.post(CHAT, body)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    read = first["usage"]["prompt_tokens"]
    messages += [first["choices"][0]["message"], {"role": "user", "content": "And then?"}]
    second = random.post(CHAT, body)["usage"]
    assert second["prompt_tokens_details"]["cached_tokens"] >= read - 4
    del body["logit_bias"]
    for message in messages:
        message.pop("refusal", None)
    third = random.post("/v1/messages", body)["usage"]
    assert third["cache_read_input_tokens"] >= second["prompt_tokens"] - 1
    total = third["input_tokens"] + third["cache_read_input_tokens"]
    assert total == second["prompt_tokens"]


def test_a_prompt_longer_than_the_context_is_refused(random: Asked) -> None:
    body = chat_body("word " * 600)
    assert random.post(CHAT, body, 400)["error"]["code"] == "context_length_exceeded"
    assert random.chat("Fine", max_tokens=4).choices[0].message is not None
