"""A turn that comes back is the tokens that the model has said, in every protocol."""

from __future__ import annotations

from typing import Any

import pytest

from optiq.chat.prompt import Replay
from optiq.serve.asked import Chat, Thinking
from optiq.serve.replays import Replays
from tests.serve.servers import MODEL, TOOLS, WEATHER, Asked

THOUGHT = "<think>\nLet me see\n</think>\n\n"
ODD = '<tool_call>{"arguments":  {"city":"Paris"}, "name":"get_weather"}</tool_call>'
SAID = f"{THOUGHT}Well \n then {ODD}"


def check(server: Asked, cached: int) -> None:
    """The second prompt begins with the first one and with what was said, and none of it is read
    again."""
    first, second = (request.tokens for request in server.engine.requests[-2:])
    said = tuple(server.tokenizer.encode(SAID, add_special_tokens=False))
    assert second[: len(first) + len(said)] == (*first, *said)
    assert cached == len(first) + len(said)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_chat_completions(thinker: Asked, stream: bool, keep: bool) -> None:
    question = {"role": "user", "content": f"{stream}{keep} SAY:{SAID}"}
    ask: Any = {"model": MODEL, "messages": [question], "tools": TOOLS}
    if stream:
        with thinker.openai.chat.completions.stream(**ask) as streamed:
            message: Any = streamed.get_final_completion().choices[0].message
    else:
        message = thinker.openai.chat.completions.create(**ask).choices[0].message
    answer = message.model_dump(exclude_none=True, exclude={"parsed", "refusal"})
    for call in answer["tool_calls"]:
        call["function"].pop("parsed_arguments", None)
    if not keep:
        answer.pop("reasoning_content", None)
    result = {"role": "tool", "tool_call_id": answer["tool_calls"][0]["id"], "content": "SAY:Sun"}
    body = {"messages": [question, answer, result], "tools": TOOLS}
    usage = thinker.post("/v1/chat/completions", body)["usage"]
    check(thinker, usage["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.parametrize("stream", [False, True])
def test_anthropic(thinker: Asked, stream: bool) -> None:
    question: Any = {"role": "user", "content": f"{stream} SAY:{SAID}"}
    tools: Any = [{"name": "get_weather", "input_schema": WEATHER["parameters"]}]
    ask: Any = {"model": MODEL, "max_tokens": 90, "messages": [question], "tools": tools}
    if stream:
        with thinker.anthropic.messages.stream(**ask) as streamed:
            message = streamed.get_final_message()
    else:
        message = thinker.anthropic.messages.create(**ask)
    content = [
        block.model_dump(exclude_none=True, exclude={"parsed_output"}) for block in message.content
    ]
    use = next(block for block in content if block["type"] == "tool_use")
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": "SAY:Sun"}
    ask["messages"] = [
        question,
        {"role": "assistant", "content": content},
        {"role": "user", "content": [result]},
    ]
    check(thinker, thinker.anthropic.messages.create(**ask).usage.cache_read_input_tokens or 0)


@pytest.mark.parametrize("stored", [False, True])
def test_responses(thinker: Asked, stored: bool) -> None:
    question = {"role": "user", "content": f"{stored} SAY:{SAID}"}
    tools: Any = [{"type": "function", **WEATHER, "strict": False}]
    create: Any = thinker.openai.responses.create
    first = create(model=MODEL, input=[question], tools=tools)
    call = first.output[-1]
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "SAY:Sun"}
    if stored:
        second = create(model=MODEL, input=[output], tools=tools, previous_response_id=first.id)
    else:
        items = [item.model_dump(exclude_none=True) for item in first.output]
        second = create(model=MODEL, input=[question, *items, output], tools=tools)
    check(thinker, second.usage.input_tokens_details.cached_tokens)


def test_another_answer_is_not_replayed(thinker: Asked) -> None:
    """What was changed, in the answer or before it, is read as it is written."""
    thinker.chat("changed SAY:Hello  there")
    for question, answer in (("changed SAY:Hello  there", "Bye"), ("another", "Hello  there")):
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "SAY:x"},
        ]
        thinker.post("/v1/chat/completions", {"messages": messages})
        prompt = thinker.tokenizer.decode(list(thinker.engine.requests[-1].tokens))
        assert f"assistant\n{answer}<|im_end|>" in prompt


def chat(*words: str, **fields: Any) -> Chat:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": word} for i, word in enumerate(words)]
    return Chat(tuple(messages), **fields)


def test_what_is_remembered_is_bounded_and_exact() -> None:
    replays = Replays(most_tokens=100)
    answer = {"role": "assistant", "content": "b", "reasoning_content": "r"}
    replays.keep(chat("a"), answer, (1, 2, 3))
    found = replays.find(chat("a", "b", "c"))
    assert found is not None
    assert (found.index, found.tokens) == (1, (1, 2, 3))
    assert replays.find(chat("a", "b ", "c", "d", "e")) == found
    assert replays.find(chat("x", "b", "c")) is None
    assert replays.find(chat("a", "b", "c", thinking=Thinking(False))) is None
    other = {"role": "assistant", "content": "b", "reasoning_content": "other"}
    assert replays.find(Chat((*chat("a").messages, other))) is None
    for n in range(50):
        replays.keep(chat(str(n)), answer, tuple(range(10)))
    assert replays.find(chat("a", "b", "c")) is None
    assert replays.find(chat("49", "b", "c")) is not None
    assert replays.find(chat("30", "b", "c")) is None


def test_an_answer_that_went_on_comes_back_as_one() -> None:
    replays = Replays()
    begun = {"role": "assistant", "content": "Hello"}
    asked = chat("a").messages
    replays.keep(
        Chat((*asked, begun), continues=True),
        {"role": "assistant", "content": " world"},
        (1, 2, 3),
    )
    whole = {"role": "assistant", "content": "Hello world"}
    assert replays.find(Chat((*asked, whole))) == Replay(1, (1, 2, 3))
    assert replays.find(Chat((*asked, begun))) is None
