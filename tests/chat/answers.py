"""The same call in the notation of each model family, and what is read from an answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from optiq.chat.notation import Notation, Span, named
from optiq.chat.reader import CallArguments, CallEnd, CallStart, Part, Reader

ARGUMENTS = {"thing": 'a "red" kite, 3 — é🪁', "count": 3, "ratio": 2.5, "sizes": [1, 2]}
JSON = json.dumps(ARGUMENTS, ensure_ascii=False)
THING = ARGUMENTS["thing"]
TYPES = {"thing": "string", "count": "integer", "ratio": "number"}
PARAMETERS = {
    "type": "object",
    "properties": {
        **{name: {"type": kind} for name, kind in TYPES.items()},
        "sizes": {"type": "array", "items": {"type": "integer"}},
    },
}
TOOLS = [
    {"type": "function", "function": {"name": "price", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]


def _tags(each: str, between: str = "") -> str:
    texts = {key: v if isinstance(v, str) else json.dumps(v) for key, v in ARGUMENTS.items()}
    return between.join(each.replace("K", key).replace("V", v) for key, v in texts.items())


CALLS = {
    "json_tools": f'<tool_call>\n{{"name": "price", "arguments": {JSON}}}\n</tool_call>',
    "mistral": f'[TOOL_CALLS] [{{"name": "price", "arguments": {JSON}}}]',
    "mistral, with a header": f"[TOOL_CALLS]price[ARGS]{JSON}",
    "mistral, with an id": f"[TOOL_CALLS]price[CALL_ID]a1b2c3d4e[ARGS]{JSON}",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.price:0"
    f"<|tool_call_argument_begin|>{JSON}<|tool_call_end|><|tool_calls_section_end|>",
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>price\n"
    f"```json\n{JSON}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>price<｜tool▁sep｜>"
    f"{JSON}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "llama3": f'{{"name": "price", "parameters": {JSON}}}',
    "llama3, tagged": '<|python_tag|>{"type": "function", "name": "price", '
    f'"parameters": {JSON}}}',
    "harmony": "<|channel|>commentary to=functions.price <|constrain|>json<|message|>"
    f"{JSON}<|call|>",
    "harmony, recipient first": " to=functions.price<|channel|>commentary json<|message|>" + JSON,
    "qwen3_coder": "<tool_call>\n<function=price>\n"
    + _tags("<parameter=K>\nV\n</parameter>\n")
    + "</function>\n</tool_call>",
    "gemma4": '<|tool_call>call:price{count:3,ratio:2.5,sizes:[1,2],thing:<|"|>'
    f'{THING}<|"|>}}<tool_call|>',
    "glm47": "<tool_call>price"
    + _tags("<arg_key>K</arg_key><arg_value>V</arg_value>")
    + "</tool_call>",
    "longcat": "<longcat_tool_call>price\n"
    + _tags("<longcat_arg_key>K</longcat_arg_key>\n<longcat_arg_value>V</longcat_arg_value>\n")
    + "</longcat_tool_call>",
    "kimi_k3": '<|open|>tools<|sep|><|open|>call tool="price" index="1"<|sep|>'
    f'<|open|>json type="object"<|sep|>{JSON}<|close|>json<|sep|><|close|>call<|sep|>'
    "<|close|>tools<|sep|>",
    "minicpm5": '<function name="price">' + _tags('<param name="K">V</param>') + "</function>",
    "minimax_m2": '<minimax:tool_call>\n<invoke name="price">\n'
    + _tags('<parameter name="K">V</parameter>\n')
    + "</invoke>\n</minimax:tool_call>",
    "muse_spark": 'to=price<|message|><atem:function_calls>\n<atem:invoke name="price">\n'
    + _tags('<atem:parameter name="K">V</atem:parameter>\n')
    + "</atem:invoke>\n</atem:function_calls>",
    "pythonic": "<|tool_call_start|>[price(thing='a \"red\" kite, 3 — é🪁', count=3, ratio=2.5, "
    "sizes=[1, 2])]<|tool_call_end|>",
    # Its values are scalars.
    "function_gemma": "<start_function_call>call:price{count:3,thing:<escape>"
    f"{THING}<escape>}}<end_function_call>",
}
# Texts that a model may stop in the middle of, be cut off in, or write by mistake.
MARKS = sorted(
    {
        mark
        for name in CALLS
        for form in named(name.partition(",")[0]).calls
        for mark in (form.start, form.end)
        if mark
    }
    | {"<think>", "</think>", "<|channel|>", "<|message|>", "<|end|>", "<|start|>assistant"}
)


def known(case: str, *, reasoning: bool = True) -> Notation:
    """The notation of a case of CALLS, of a model that reasons between <think> and </think>."""
    found = named(case.partition(",")[0])
    if found.channels or not reasoning:
        return found
    return replace(found, reasoning=Span("<think>", "</think>"))


def expected(case: str) -> dict[str, Any]:
    keys = ("thing", "count") if case == "function_gemma" else tuple(ARGUMENTS)
    return {key: ARGUMENTS[key] for key in keys}


def read(
    notation: Notation,
    answer: str | Sequence[str],
    tools: Sequence[dict[str, Any]] = tuple(TOOLS),
    **options: Any,
) -> tuple[list[Part], int]:
    """The parts of an answer, neighbours of one kind joined, and the number of calls."""
    reader = Reader(notation, tools, **options)
    parts: list[Part] = []
    for piece in [answer] if isinstance(answer, str) else answer:
        parts += reader.feed(piece)
    parts += reader.end()
    return joined(parts), reader.calls


def joined(parts: Iterable[Part]) -> list[Part]:
    result: list[Part] = []
    for part in parts:
        last = result[-1] if result else None
        same = type(last) is type(part) and not isinstance(part, (CallStart, CallEnd))
        if same and getattr(last, "index", 0) == getattr(part, "index", 0):
            result[-1] = replace(part, text=last.text + part.text)
        else:
            result.append(part)
    return result


def calls_of(parts: Iterable[Part]) -> list[tuple[str, Any]]:
    """The complete calls: names and arguments."""
    names: dict[int, str] = {}
    texts: dict[int, str] = {}
    calls = []
    for part in parts:
        if isinstance(part, CallStart):
            names[part.index] = part.name
        if isinstance(part, CallArguments):
            texts[part.index] = texts.get(part.index, "") + part.text
        if isinstance(part, CallEnd):
            calls.append((names[part.index], json.loads(texts[part.index])))
    return calls
