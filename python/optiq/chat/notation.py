"""How a model marks its reasoning and writes its tool calls.

The notation is found as mlx-lm finds it, in the chat template and the vocabulary; Llama 3, DeepSeek
and harmony (gpt-oss), which mlx-lm does not know, are found here.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .time_limit import LIMIT, within

_NOTHING = r"(?!)"  # matches no text


@dataclass(frozen=True)
class Span:
    """The texts between which something stands."""

    start: str
    end: str


@dataclass(frozen=True)
class JsonCalls:
    """Calls whose arguments are JSON, so that they can be passed on while they are written.

    `start` opens a section of calls; "" if they may stand at the very beginning of the answer only.
    Of each call, `opening` matches what stands before its "{": its group "name", where it matches,
    is the function, and the JSON its arguments; otherwise the JSON has both. `close` may follow
    each call, and `end` the last.
    """

    start: str
    opening: str
    close: str = ""
    end: str = ""


@dataclass(frozen=True)
class TaggedCalls:
    """Calls in a notation of their own, read as a whole.

    `opening` matches the beginning of what stands between `start` and `end`. The call is complete
    where `closing` stands right before `end`; an `end` anywhere else is part of an argument. A call
    without arguments is what `bare` matches, its group "name" the function. `read` is mlx-lm's
    parser: text and tools in, calls (dicts with "name" and "arguments") out. It may take hours over
    long texts that are not `sound`.
    """

    start: str
    end: str
    read: Callable[[str, Any], Any]
    opening: str
    closing: str
    bare: str = _NOTHING
    sound: Callable[[str], bool] = lambda text: True


@dataclass(frozen=True)
class Channels:
    """An answer of several messages, each with a header that says for whom it is.

    `begins` matches the beginning of a header, and one of `starts` stands there, wherever a message
    is not ended. `body` ends the header, and one of `ends` the message. What `channel` matches in
    a header (its group 1) says what the message is: reasoning, if it is `reasoning`, else text.
    `recipient` matches in the header of a call; its group "name" is the function.
    """

    begins: str
    starts: tuple[str, ...]
    body: str
    ends: tuple[str, ...]
    channel: str
    reasoning: str
    recipient: str | None = None


@dataclass(frozen=True)
class Notation:
    """`calls` are tried in order. `dropped` are marks of structure that no client should see."""

    name: str
    calls: tuple[JsonCalls | TaggedCalls, ...]
    reasoning: Span | None = None
    channels: Channels | None = None
    dropped: tuple[str, ...] = ()


_JSON_TOOLS = JsonCalls("<tool_call>", r"[\s,;\[]*(?=\{)", end="</tool_call>")
# As Qwen2.5-Coder writes calls, whatever its template asks for.
_FENCED = JsonCalls("", r"\s*```(?:json)?\s*(?=\{)", close="```")
_MISTRAL = JsonCalls(
    "[TOOL_CALLS]",
    r"[\s,;\[]*(?:(?P<name>[\w.-]+)\s*(?:\[CALL_ID\]\s*\w*\s*)?(?:\[ARGS\])?\s*)?(?=\{)",
)
_KIMI_K2 = JsonCalls(
    "<|tool_calls_section_begin|>",
    r"\s*<\|tool_call_begin\|>\s*(?:functions\.)?(?P<name>[\w.-]+)(?::\d+)?\s*"
    r"<\|tool_call_argument_begin\|>\s*(?=\{)",
    "<|tool_call_end|>",
    "<|tool_calls_section_end|>",
)
# DeepSeek V3 writes "function", a separator, and the arguments in a fence; V3.1 the name alone.
_DEEPSEEK = JsonCalls(
    "<｜tool▁calls▁begin｜>",
    r"\s*<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>(?P<name>[\w.-]+)\s*```json\s*"
    r"|(?P<name>[\w.-]+)\s*<｜tool▁sep｜>\s*)(?=\{)",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)
_LLAMA3 = (
    JsonCalls("<|python_tag|>", r"[\s,;\[]*(?=\{)"),
    JsonCalls("", r"[\s,;]*(?=\{)"),
)
_HARMONY = Channels(
    begins=r"\s*(?:<\|start\|>|<\|channel\|>|to=)",
    starts=("<|start|>", "<|channel|>"),
    body="<|message|>",
    ends=("<|end|>", "<|call|>", "<|return|>"),
    channel=r"<\|channel\|>\s*(\w+)",
    reasoning="analysis",
    recipient=r"\bto=functions\.(?P<name>[\w.-]+)",
)
_MUSE_SPARK = Channels(
    begins=r"\s*(?:<\|start\|>|to=)",
    starts=("<|start|>",),
    body="<|message|>",
    ends=("<|eom|>", "<|eot|>"),
    channel=r"\bto=(\w+)",
    reasoning="self",
)


def _balanced(text: str) -> bool:
    """Whether each brace of Gemma's notation, outside of strings, has its other half."""
    depth = 0
    for brace in re.findall(r"[{}]", re.sub(r'<\|"\|>.*?<\|"\|>', "", text, flags=re.DOTALL)):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
    return depth == 0


def _as_many(one: str, other: str) -> Callable[[str], bool]:
    return lambda text: text.count(one) == text.count(other)


# By the name of mlx-lm's parser: opening, closing, bare and sound.
_NAME = r"\s*(?P<name>[\w.-]+)\s*"
_TAGGED: dict[str, tuple[Any, ...]] = {
    "qwen3_coder": (r"\s*<function=[^\s<>]+>", "</function>"),
    "gemma4": (r"\s*call:[\w-]+\{", "}", _NOTHING, _balanced),
    "function_gemma": (r"\s*call:\w+\{", "}"),
    "glm47": (
        rf"{_NAME}(?:<arg_key>|</tool_call>)",
        "</arg_value>",
        _NAME,
        _as_many("<arg_key>", "<arg_value>"),
    ),
    "longcat": (
        rf"{_NAME}(?:<longcat_arg_key>|</longcat_tool_call>)",
        "</longcat_arg_value>",
        _NAME,
    ),
    "kimi_k3": (
        r"\s*<\|open\|>call\s",
        "<|close|>call<|sep|>",
        _NOTHING,
        _as_many("<|open|>call ", "<|close|>call<|sep|>"),
    ),
    "minicpm5": (
        r"\s*[\"']?[\w.-]+[\"']?\s*>",
        "</param>",
        r"\s*[\"']?(?P<name>[\w.-]+)[\"']?\s*>\s*",
    ),
    "minimax_m2": (r"\s*<invoke name=[\"']?[\w.-]+[\"']?>", "</invoke>"),
    "muse_spark": (r"\s*<atem:invoke\s", "</atem:invoke>"),
    "pythonic": (r"\s*\[\s*[\w.]+\(", "]"),
}
# Those that need no parser: what stands in a Notation after its name.
_OWN: dict[str, tuple[Any, ...]] = {
    "json_tools": ((_JSON_TOOLS, _FENCED),),
    "mistral": ((_MISTRAL,),),
    "kimi_k2": ((_KIMI_K2,),),
    "deepseek_v3": ((_DEEPSEEK,),),
    "deepseek_v31": ((_DEEPSEEK,),),
    "llama3": (_LLAMA3,),
    "harmony": ((), None, _HARMONY),
}


def notation(tokenizer: Any) -> Notation:
    """The notation of the model that `tokenizer` (mlx-lm's TokenizerWrapper) belongs to.

    Where the template has no place for tools they are given as text, which asks for `<tool_call>`
    with JSON; a conversation that is given as text asks for it of any model.
    """
    found = native_notation(tokenizer)
    if found.channels is not None:
        return found
    if all(form.start != _JSON_TOOLS.start for form in found.calls):
        found = replace(found, calls=(*found.calls, _JSON_TOOLS))
    return found if _takes_tools(tokenizer) else replace(found, name="json_tools")


def native_notation(tokenizer: Any) -> Notation:
    """The notation that the model's template and vocabulary show."""
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    found = replace(named(_name(tokenizer, template)), dropped=tuple(tokenizer.structural_markers))
    if tokenizer.has_thinking and found.channels is None:
        return replace(found, reasoning=Span(tokenizer.think_start, tokenizer.think_end))
    return found


def named(name: str) -> Notation:
    """The notation of this name: that of one of mlx-lm's parsers, or one of `_OWN`."""
    if name in _OWN:
        return Notation(name, *_OWN[name])
    parser = importlib.import_module(f"mlx_lm.tool_parsers.{name}")
    start, end, read = parser.tool_call_start, parser.tool_call_end, parser.parse_tool_call
    calls = TaggedCalls(start, end, read, *_TAGGED[name])
    return Notation(name, (calls,), channels=_MUSE_SPARK if name == "muse_spark" else None)


def _takes_tools(tokenizer: Any) -> bool:
    """Whether the template writes the tools it is given."""
    system, user = ({"role": role, "content": "Hello"} for role in ("system", "user"))
    tool = {"type": "function", "function": {"name": "zqmark", "parameters": {"type": "object"}}}
    for messages in ([system, user], [user]):
        apply = partial(tokenizer.apply_chat_template, messages, tools=[tool], tokenize=False)
        with suppress(Exception):  # of a template, which is foreign code
            if "zqmark" in within(LIMIT, apply):
                return True
    return False


def _name(tokenizer: Any, template: str) -> str:
    if "<|channel|>" in template and "<|message|>" in template:
        return "harmony"
    if tokenizer.tool_parser is not None:
        # Laguna's parser is GLM's.
        return str(tokenizer.tool_parser.__module__).rpartition(".")[2]
    if "<|python_tag|>" in template:
        return "llama3"
    if "<｜tool▁calls▁begin｜>" in template:
        return "deepseek_v3" if "```json" in template else "deepseek_v31"
    return "json_tools"
