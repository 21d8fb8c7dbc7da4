"""Messages, tools and the form of the answer, read from a chat completion request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ...asked import Chat, Form, Interpreter, Thinking
from ...tools.rounds import turns
from ..continued import continued
from ..fields import Fields
from ..interpreter import interpreter, with_python

MAX_MESSAGES = 10_000
MAX_TOOLS = 1024
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
ROLES = ("system", "developer", "user", "assistant", "tool")


def conversation(body: Fields, python: bool = False) -> Chat:
    """`python`: the server has Python, and the tool `code_interpreter` asks for it."""
    seen: list[str] = []
    messages = _messages(body, seen)
    runs: Interpreter | None = None
    tools: list[dict[str, Any]] = []
    for tool in body.objects("tools", MAX_TOOLS):
        if python and tool.text("type") == "code_interpreter":
            runs = interpreter(tool, tool.text("container"), seen, None)
            with_python(tools, tool)
        else:
            tools.append(_tool(tool))
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) != len(names):
        raise body.wrong("tools", "has two functions of one name")
    given = body.object("chat_template_kwargs")
    arguments = dict(given.values) if given else {}
    chat = Chat(
        messages=messages,
        tools=tuple(tools),
        tool_choice=_tool_choice(body, names),
        parallel=body.flag("parallel_tool_calls", True),
        form=_form(body),
        thinking=_thinking(body, arguments),
        arguments=arguments,
        interpreter=runs,
    )
    return continued(body, chat) if _continues(body) else chat


def _continues(body: Fields) -> bool:
    """As vLLM and transformers have it."""
    continues = body.flag("continue_final_message")
    if body.flag("add_generation_prompt", not continues) == continues:
        raise body.wrong(
            "add_generation_prompt",
            "must be the opposite of 'continue_final_message'; leave it out",
        )
    return continues


def _messages(body: Fields, containers: list[str]) -> tuple[dict[str, Any], ...]:
    body.required("messages")
    called: dict[str, str] = {}  # names of functions by the id of the call
    found = []
    for message in body.objects("messages", MAX_MESSAGES):
        found += read_turns(message, called)
        for run in message.objects("code_interpreter_calls", MAX_MESSAGES):
            containers.append(run.text("container_id") or "")
    if not found:
        raise body.wrong("messages", "is empty; give at least one message")
    return tuple(found)


def read_turns(message: Fields, called: dict[str, str]) -> list[dict[str, Any]]:
    """A message; an answer in which the server has run programs was made in several rounds."""
    read, found = _message(message, called), []
    text, thought = read["content"], read.get("reasoning_content", "")
    text_at = thought_at = 0
    for run in message.objects("code_interpreter_calls", MAX_MESSAGES):
        text_to = run.integer("content_offset", 0) or 0
        thought_to = run.integer("reasoning_offset", 0) or 0
        outputs = run.objects("outputs", MAX_MESSAGES)
        told = "\n".join(o.text("logs") or "" for o in outputs if o.text("type") == "logs")
        program = (run.text("id") or "", run.text("code") or "", told)
        found += turns(text[text_at:text_to], thought[thought_at:thought_to], [program])
        text_at, thought_at = text_to, thought_to
    read["content"] = text[text_at:]
    if thought[thought_at:]:
        read["reasoning_content"] = thought[thought_at:]
    elif "reasoning_content" in read:
        del read["reasoning_content"]
    if found and len(read) == 2 and not read["content"]:
        return found
    return [*found, read]


def _message(message: Fields, called: dict[str, str]) -> dict[str, Any]:
    message.required("role")
    role = message.one_of("role", ROLES, "user")
    read: dict[str, Any] = {"role": role, "content": _content(message)}
    if role == "assistant":
        reasoning = message.text("reasoning_content") or message.text("reasoning")
        if reasoning:
            read["reasoning_content"] = reasoning
        calls = [_call(call, called) for call in message.objects("tool_calls", MAX_TOOLS)]
        if calls:
            read["tool_calls"] = calls
        elif (
            message.values.get("content") is None
            and not reasoning
            and "code_interpreter_calls" not in message
        ):
            raise message.wrong("content", "is required unless there are 'tool_calls'")
    elif message.values.get("content") is None:
        raise message.wrong("content", "is required")
    if role == "tool":
        identity = message.text("tool_call_id")
        if not identity:
            raise message.wrong("tool_call_id", "is required")
        if identity not in called:
            raise message.wrong("tool_call_id", "answers no call of an earlier message")
        read |= {"tool_call_id": identity, "name": called[identity]}
    return read


def _content(message: Fields) -> str:
    """The text of a message: a string, or parts of which all are text."""
    value = message.values.get("content")
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise message.wrong("content", "must be a string or an array of content parts")
    return "\n".join(_parts(message))


def _parts(message: Fields) -> Iterator[str]:
    for part in message.objects("content", MAX_MESSAGES):
        part.required("type")
        sort = part.text("type")
        if sort == "text":
            yield str(part.required("text")) if part.text("text") is not None else ""
        elif sort == "refusal":
            yield part.text("refusal") or ""
        elif sort in ("image_url", "input_image"):
            raise part.wrong("type", "is an image; this server's model reads text only")
        elif sort in ("input_audio", "file"):
            raise part.wrong("type", f"is {sort!r}; this server's model reads text only")
        else:
            raise part.wrong("type", "must be 'text'")


def _call(call: Fields, called: dict[str, str]) -> dict[str, Any]:
    if call.text("type", "function") != "function":
        raise call.wrong("type", "must be 'function'")
    identity = call.text("id")
    if not identity:
        raise call.wrong("id", "is required")
    call.required("function")
    function = call.object("function")
    assert function is not None
    name = function.text("name")
    if not name:
        raise function.wrong("name", "is required")
    called[identity] = name
    text = function.text("arguments") or "{}"
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise function.wrong("arguments", "must be the JSON text of an object")
    return {
        "id": identity,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _tool(tool: Fields) -> dict[str, Any]:
    tool.required("type")
    if tool.text("type") != "function":
        raise tool.wrong(
            "type",
            "must be 'function', or 'code_interpreter' where the server runs with --tools python",
        )
    tool.required("function")
    function = tool.object("function")
    assert function is not None
    return function_tool(
        function, "parameters", strict=function.flag("strict"), name=function.text("name")
    )


def function_tool(
    function: Fields, schema_field: str, *, strict: bool, name: str | None
) -> dict[str, Any]:
    """A tool in the shape that chat templates take."""
    if not name or len(name) > 128 or not name.isprintable() or any(c.isspace() for c in name):
        raise function.wrong("name", "must be a name of at most 128 characters without spaces")
    schema = function.object(schema_field)
    written: dict[str, Any] = {"name": name}
    if "description" in function:
        written["description"] = function.text("description")
    written["parameters"] = dict(schema.values) if schema else {"type": "object", "properties": {}}
    if strict:
        written["strict"] = True
    return {"type": "function", "function": written}


def _tool_choice(body: Fields, names: list[str]) -> str:
    value = body.values.get("tool_choice")
    if value is None:
        return "auto"
    if isinstance(value, str):
        choice = body.one_of("tool_choice", ("auto", "none", "required"), "auto")
        if choice == "required" and not names:
            raise body.wrong("tool_choice", "is 'required', and there are no 'tools'")
        return choice
    chosen = body.object("tool_choice")
    assert chosen is not None
    if chosen.text("type") != "function":
        raise chosen.wrong("type", "must be 'function'")
    function = chosen.object("function")
    name = function.text("name") if function else None
    if name not in names:
        raise body.wrong("tool_choice", "names a function that is not among 'tools'")
    return str(name)


def _form(body: Fields) -> Form:
    form = body.object("response_format")
    if form is None:
        return Form()
    form.required("type")
    sort = form.one_of(
        "type", ("text", "json_object", "json_schema", "regex", "choice", "lark"), "text"
    )
    if sort == "json_schema":
        form.required("json_schema")
        wrapper = form.object("json_schema")
        assert wrapper is not None
        schema = wrapper.object("schema")
        return Form("json_schema", dict(schema.values) if schema else {})
    if sort in ("regex", "lark"):
        form.required(sort)
        return Form("regex" if sort == "regex" else "lark", form.text(sort))
    if sort == "choice":
        form.required("choice")
        return Form("choice", form.texts("choice", MAX_TOOLS))
    if sort == "json_object" and "schema" in form:  # as llama.cpp has it
        schema = form.object("schema")
        return Form("json_schema", dict(schema.values) if schema else {})
    return Form("json_object" if sort == "json_object" else "text")


def _thinking(body: Fields, arguments: dict[str, Any]) -> Thinking:
    """From `reasoning_effort`, and Qwen's `enable_thinking` and `thinking_budget`."""
    effort: str | None = (
        body.one_of("reasoning_effort", EFFORTS, "") if ("reasoning_effort" in body) else None
    )
    on = None
    if "enable_thinking" in body:
        on = body.flag("enable_thinking")
    if type(arguments.get("enable_thinking")) is bool:
        on = arguments.pop("enable_thinking")
    budget = body.integer("thinking_budget", 0)
    if effort == "none":
        return Thinking(False)
    if effort is not None:
        on = True
    return Thinking(on, effort, budget)
