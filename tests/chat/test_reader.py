"""An answer is read the same wherever it is cut, and nothing of it is lost."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiq.chat.notation import named
from optiq.chat.reader import CallArguments, CallEnd, CallStart, Reader, Reasoning, Text
from tests.chat.answers import (
    ARGUMENTS,
    CALLS,
    JSON,
    MARKS,
    calls_of,
    expected,
    joined,
    known,
    read,
)

HERMES = CALLS["json_tools"]


def call(index: int, name: str, arguments: str) -> list[Any]:
    return [CallStart(index, name), CallArguments(index, arguments), CallEnd(index)]


@pytest.mark.parametrize("case", CALLS)
def test_a_call_in_each_notation(case: str) -> None:
    parts, calls = read(known(case), CALLS[case])
    assert calls_of(parts) == [("price", expected(case))]
    assert calls == 1
    assert len(parts) == 3
    assert read(known(case), list(CALLS[case])) == (parts, calls)


@pytest.mark.parametrize("fence", ["```json\n", "```\n", "\n```json "])
def test_a_call_in_a_fence(fence: str) -> None:
    """As Qwen2.5-Coder writes it: at the beginning of an answer, and of a tool that is there."""
    answer = f'{fence}{{\n  "name": "price",\n  "arguments": {JSON}\n}}\n```'
    parts, calls = read(known("json_tools"), answer)
    assert (calls_of(parts), calls) == ([("price", ARGUMENTS)], 1)
    assert len(parts) == 3
    assert read(known("json_tools"), list(answer)) == (parts, calls)
    for text in (
        answer.replace("price", "cost"),
        f"So:\n{answer}",
        f'{fence}{{"temperature": 21}}\n```',
        "```python\nprint({})\n```",
    ):
        parts, calls = read(known("json_tools"), list(text))
        assert (joined(parts), calls) == ([Text(text)], 0)
    streamed = Reader(known("json_tools")).feed('```json\n{"temperature": 21, ')
    assert joined(streamed) == [Text('```json\n{"temperature": 21,')]


@pytest.mark.parametrize("case", [case for case in CALLS if "llama3" not in case])
def test_two_calls_in_each_notation(case: str) -> None:
    between = "<|start|>assistant" if known(case).channels else "\n"
    answer = between.join([CALLS[case]] * 2)
    parts, calls = read(known(case), list(answer))
    assert calls_of(parts) == [("price", expected(case))] * 2
    assert calls == 2
    assert len(parts) == 6
    assert read(known(case), answer) == (parts, calls)


@pytest.mark.parametrize("case", [case for case in CALLS if not known(case).channels])
def test_reasoning_text_and_a_call(case: str) -> None:
    said = "" if case == "llama3" else "I look it up.\n\n"
    answer = f"<think>\nThe price?\nOf a kite.\n</think>\n\n{said}{CALLS[case]}"
    parts, _ = read(known(case), list(answer))
    assert parts[0] == Reasoning("The price?\nOf a kite.")
    assert parts[1:-3] == ([Text("I look it up.")] if said else [])
    assert calls_of(parts) == [("price", expected(case))]
    # As above, with the reasoning opened by the prompt.
    rest = answer.removeprefix("<think>")
    assert read(known(case), rest, reasoning=True)[0] == parts


@pytest.mark.parametrize("case", CALLS)
def test_without_calls_all_is_text(case: str) -> None:
    parts, calls = read(known(case), CALLS[case], calls=False)
    assert calls == 0
    assert all(isinstance(part, Text) for part in parts)
    assert "kite, 3 — é🪁" in parts[0].text


@pytest.mark.parametrize("case", CALLS)
def test_a_call_in_reasoning_that_never_ends(case: str) -> None:
    """Models forget to close their thought, and call."""
    if known(case).channels or case == "llama3":  # a message has its end; a bare call no mark
        return
    parts, calls = read(known(case), f"<think>So I look.\n{CALLS[case]}")
    assert parts[0] == Reasoning("So I look.")
    assert calls_of(parts) == [("price", expected(case))]
    assert calls == 1


@pytest.mark.parametrize("case", CALLS)
def test_a_call_in_reasoning_that_ends_is_a_thought(case: str) -> None:
    if known(case).channels:
        return
    thought = f"I could write {CALLS[case]} but no."
    parts, calls = read(known(case), list(f"<think>{thought}</think>It costs 3."))
    assert parts == [Reasoning(thought), Text("It costs 3.")]
    assert calls == 0


def test_only_tools_are_called_from_reasoning() -> None:
    answer = f"<think>Like {HERMES.replace('price', 'other')}?"
    assert read(known("json_tools"), answer) == ([Reasoning(answer.removeprefix("<think>"))], 0)


def test_calls_before_and_after_a_closed_thought_are_numbered_in_order() -> None:
    answer = f"{HERMES}<think>{HERMES}</think>{HERMES}"
    parts, calls = read(known("json_tools"), answer)
    assert [part.index for part in parts if isinstance(part, CallEnd)] == [0, 1]
    assert calls == 2


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("before", ["ice", "count", "kite"])
def test_a_call_that_is_cut_off_is_text(case: str, before: str) -> None:
    answer = CALLS[case][: CALLS[case].index(before)]
    parts, calls = read(known(case), list(answer))
    assert calls == 0
    assert not any(isinstance(part, CallEnd) for part in parts)
    text = parts[-1]
    assert isinstance(text, Text)
    # The header of a message is never part of it.
    assert text.text.strip() in (answer.strip(), answer.partition("to=price<|message|>")[2].strip())


def test_a_call_that_is_whole_but_for_its_mark_is_a_call() -> None:
    for case in ("json_tools", "qwen3_coder", "kimi_k2", "harmony", "minimax_m2"):
        answer = CALLS[case]
        form = known(case).calls
        mark = form[0].end if form else "<|call|>"
        assert calls_of(read(known(case), answer.removesuffix(mark))[0]) == [("price", ARGUMENTS)]


@pytest.mark.parametrize(
    "broken",
    [
        "<tool_call>I would rather not</tool_call>",
        '<tool_call>{"name": "price", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "price", "arguments": {"a": 1,}}</tool_call>',
        '<tool_call>{"name": "price", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"answer": 5}</tool_call>',
        "<tool_call>" + "[" * 2000 + "</tool_call>",
        '<tool_call>{"name": "price", "arguments": ' + '{"a":' * 5000 + "1" + "}" * 5000 + "!",
    ],
)
def test_a_malformed_call_is_text_and_the_next_is_a_call(broken: str) -> None:
    parts, calls = read(known("json_tools"), broken + HERMES)
    assert next(part for part in parts if isinstance(part, Text)) == Text(broken)
    assert calls_of(parts) == [("price", ARGUMENTS)]
    assert calls == 1


def test_what_follows_a_whole_call_is_text() -> None:
    parts, calls = read(known("json_tools"), HERMES.replace("}\n</tool", "}}, so\n</tool"))
    assert calls_of(parts) == [("price", ARGUMENTS)]
    assert parts[-1] == Text("}, so\n</tool_call>")
    assert calls == 1


def test_a_mark_within_an_argument_ends_nothing() -> None:
    inside = 'see </tool_call> and <tool_call>, "quoted" \\ and </function> too'
    text = json.dumps({"thing": inside})
    answer = f'<tool_call>{{"name": "price", "arguments": {text}}}</tool_call>'
    assert read(known("json_tools"), list(answer))[0] == call(0, "price", text)
    xml = f"<tool_call>\n<function=price>\n<parameter=thing>\n{inside}\n</parameter>\n"
    xml += "</function>\n</tool_call>"
    parts, _ = read(known("qwen3_coder"), list(xml))
    assert calls_of(parts) == [("price", {"thing": inside})]


def test_arguments_are_passed_on_while_they_are_written() -> None:
    reader = Reader(known("json_tools"))
    assert reader.feed('<tool_call>{"name": "price", "arguments": {"thing": "a ') == [
        CallStart(0, "price"),
        CallArguments(0, '{"thing": "a '),
    ]
    assert reader.feed("kite") == [CallArguments(0, "kite")]
    assert reader.feed('"}') == [CallArguments(0, '"}')]
    assert reader.feed("}") == [CallEnd(0)]
    assert reader.calls == 1


def test_text_is_passed_on_but_for_what_may_be_a_mark() -> None:
    reader = Reader(known("json_tools"))
    assert reader.feed("Hello <tool") == [Text("Hello")]
    assert reader.feed("box> you ") == [Text(" <toolbox> you")]
    assert reader.feed("all\n") == [Text(" all")]
    assert reader.end() == [Text("\n")]


@pytest.mark.parametrize(
    "members",
    [
        '"arguments": JSON, "name": "price"',
        '"name": "price", "arguments": TEXT',
        '"type": "function", "function": {"name": "price", "arguments": JSON}',
        '"name": "price", "arguments": JSON, "id": "a}"',
        '"id": "x", "name": "price", "parameters": JSON',
    ],
)
def test_other_shapes_of_json(members: str) -> None:
    text = members.replace("JSON", JSON).replace("TEXT", json.dumps(JSON))
    parts, _ = read(known("json_tools"), list(f"<tool_call>{{{text}}}</tool_call>"))
    assert calls_of(parts) == [("price", ARGUMENTS)]


def test_an_answer_in_json_is_no_call() -> None:
    """Llama 3 writes its calls without a mark."""
    for text in ['{"price": 3}', '{"name": "other", "parameters": {}}', '{"name": "price"}', "{"]:
        assert read(named("llama3"), list(text)) == ([Text(text)], 0)
    streamed = Reader(named("llama3")).feed('{"temperature": 21, ')
    assert joined(streamed) == [Text('{"temperature": 21,')]


def test_harmony_has_messages_for_everyone() -> None:
    answer = (
        "<|channel|>analysis<|message|>They want a price.<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>I look it up.<|end|>"
        f"<|start|>assistant{CALLS['harmony']}"
    )
    parts, calls = read(named("harmony"), list(answer))
    assert parts[:2] == [Reasoning("They want a price."), Text("I look it up.")]
    assert calls_of(parts) == [("price", ARGUMENTS)]
    assert calls == 1
    final = "<|channel|>analysis<|message|>2+2<|end|><|start|>assistant<|channel|>final<|message|>4"
    assert read(named("harmony"), list(final)) == ([Reasoning("2+2"), Text("4")], 0)
    assert read(named("harmony"), "no channel at all") == ([Text("no channel at all")], 0)


def test_muse_spark_thinks_to_itself() -> None:
    answer = (
        "to=self<|message|>Hm.<|eom|><|start|>assistant to=user<|message|>Let me see.<|eom|>"
        f"<|start|>assistant {CALLS['muse_spark']}"
    )
    parts, _ = read(named("muse_spark"), list(answer))
    assert parts[:2] == [Reasoning("Hm."), Text("Let me see.")]
    assert calls_of(parts) == [("price", ARGUMENTS)]


FRAGMENTS = [
    *MARKS,
    *CALLS.values(),
    '{"name": "price", "arguments": {"a": "',
    '"}}',
    "{",
    "}",
    '"',
    "\\",
    "price",
    " ",
    "\n",
    "<",
    "é🪁",
    "text",
    "to=",
]


@settings(deadline=None, max_examples=250)
@given(
    case=st.sampled_from(sorted(CALLS)),
    pieces=st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=5)), max_size=8),
    reasoning=st.booleans(),
    data=st.data(),
)
def test_any_cutting_gives_the_same(
    case: str, pieces: list[str], reasoning: bool, data: st.DataObject
) -> None:
    answer = "".join(pieces)
    whole = read(known(case), answer, reasoning=reasoning)
    assert read(known(case), list(answer), reasoning=reasoning) == whole
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=5)))
    edges = [0, *cuts, len(answer)]
    cut = [answer[a:b] for a, b in pairwise(edges)]
    assert read(known(case), cut, reasoning=reasoning) == whole
    for _, arguments in calls_of(whole[0]):
        assert isinstance(arguments, dict)


@settings(deadline=None, max_examples=100)
@given(st.text(alphabet=st.characters(exclude_characters="<[{"), max_size=200))
def test_plain_text_is_passed_on_as_it_is(text: str) -> None:
    for case in ("json_tools", "mistral", "llama3", "harmony"):
        if not text.lstrip().startswith("to="):
            assert "".join(part.text for part in read(named(case), list(text))[0]) == text


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("unit", ["x", "\n", "<", "{", '"', "start", "end", "opening", "call"])
def test_long_answers_take_linear_time(case: str, unit: str) -> None:
    """A broken call of 20,000 characters, in pieces: where the work grows with the square, that
    takes many seconds."""
    notation, call = known(case), CALLS[case]
    form = notation.calls[0] if notation.calls else None
    start = form.start if form else "<|channel|>"
    begin = call.index("thing" if case != "pythonic" else "(") + 8
    units = {
        "start": start,
        "end": (form.end if form else "") or "<|end|>",
        "opening": call[len(start) : call.index("thing")],
        "call": call,
    }
    repeated = units.get(unit, unit) or "x"
    answer = call[:begin] + repeated * (20_000 // len(repeated)) + call[-40:]
    pieces = [answer[i : i + 7] for i in range(0, len(answer), 7)]
    begun = time.process_time()
    read(notation, pieces)
    assert time.process_time() - begun < 5
