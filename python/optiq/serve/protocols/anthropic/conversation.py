"""Messages, tools and thinking, read from Anthropic's shape into the one that templates take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ...asked import Chat, Form, Interpreter, Thinking
from ...runs import told
from ...tools.rounds import turns
from ..continued import continued
from ..fields import Fields
from ..interpreter import interpreter, with_python
from ..openai.conversation import MAX_MESSAGES, MAX_TOOLS, function_tool
from ..signature import verified

BILLING = "x-anthropic-billing-header"  # differs in each request, so no prefix would ever match
EFFORTS = ("low", "medium", "high", "xhigh", "max")


@dataclass
class Conversation:
    """Reads the messages one by one; `called` has the names of functions by the id of the call."""

    secret: bytes
    messages: list[dict[str, Any]] = field(default_factory=list)
    called: dict[str, str] = field(default_factory=dict)

    def add(self, message: Fields) -> None:
        message.required("role")
        role = message.one_of("role", ("user", "assistant", "system"), "user")
        message.required("content")
        if role == "assistant":
            self._assistant(message)
        elif role == "user":
            self._user(message)
        else:
            self._say("system", list(_texts(message, "content")))

    def _say(self, role: str, texts: list[str]) -> None:
        if texts:
            self.messages.append({"role": role, "content": "\n".join(texts)})

    def _user(self, message: Fields) -> None:
        """Text, and results of tools, which are messages of their own, in their order."""
        texts: list[str] = []
        for block in _blocks(message, "content"):
            if block.text("type") == "tool_result":
                self._say("user", texts)
                texts = []
                self.messages.append(self._result(block))
            else:
                texts.append(_text(block))
        self._say("user", texts)

    def _result(self, block: Fields) -> dict[str, Any]:
        identity = block.text("tool_use_id")
        if not identity:
            raise block.wrong("tool_use_id", "is required")
        if identity not in self.called:
            raise block.wrong("tool_use_id", "answers no tool_use of an earlier message")
        content = "\n".join(_texts(block, "content")) if "content" in block else ""
        if block.flag("is_error"):
            content = f"Error: {content}"
        name = self.called[identity]
        return {"role": "tool", "tool_call_id": identity, "name": name, "content": content}

    def _assistant(self, message: Fields) -> None:
        texts: list[str] = []
        reasoning: list[str] = []
        calls: list[dict[str, Any]] = []
        runs: dict[str, str] = {}  # programs that the server has run, by their ids
        ran = False
        for block in _blocks(message, "content"):
            sort = block.text("type")
            if sort == "thinking":
                ours = verified(
                    self.secret, block.text("thinking") or "", block.text("signature") or ""
                )
                reasoning += [ours] if ours else []
            elif sort == "tool_use":
                calls.append(self._call(block))
            elif sort == "server_tool_use":
                given = block.object("input")
                runs[block.text("id") or ""] = (given.text("code") if given else "") or ""
            elif sort == "code_execution_tool_result":
                code = runs.pop(block.text("tool_use_id") or "", "")
                run = [("", code, _told(block))]
                self.messages += turns("\n".join(texts), "\n".join(reasoning), run)
                texts, reasoning, ran = [], [], True
            elif sort != "redacted_thinking":  # that of another model, which only it can read
                texts.append(_text(block))
        if ran and not (texts or reasoning or calls):
            return
        read: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
        if reasoning:
            read["reasoning_content"] = "\n".join(reasoning)
        if calls:
            read["tool_calls"] = calls
        self.messages.append(read)

    def _call(self, block: Fields) -> dict[str, Any]:
        identity, name = block.text("id"), block.text("name")
        if not identity or not name:
            raise block.wrong("id" if not identity else "name", "is required")
        block.required("input")
        arguments = block.object("input")
        assert arguments is not None
        self.called[identity] = name
        return {
            "id": identity,
            "type": "function",
            "function": {"name": name, "arguments": dict(arguments.values)},
        }


def read_answer(secret: bytes, content: list[dict[str, Any]]) -> dict[str, Any]:
    """An answer of ours, as it is read when it comes back."""
    read = Conversation(secret)
    read.add(Fields({"role": "assistant", "content": content}))
    return read.messages[-1]


def _told(block: Fields) -> str:
    """What the model was told of a program."""
    content = block.object("content")
    if content is None:
        return told("", "")
    return told(content.text("stdout") or "", content.text("stderr") or "")


def conversation(body: Fields, secret: bytes, python: bool = False) -> Chat:
    """The conversation, for an answer or to be counted. `python`: the server has Python."""
    body.required("messages")
    read = Conversation(secret)
    if "system" in body:
        texts = [_without_billing(text) for text in _texts(body, "system")]
        read._say("system", [text for text in texts if text])
    count = len(read.messages)
    for message in body.objects("messages", MAX_MESSAGES):
        read.add(message)
    if len(read.messages) == count:
        raise body.wrong("messages", "is empty; give at least one message")
    runs: Interpreter | None = None
    tools: list[dict[str, Any]] = []
    for tool in body.objects("tools", MAX_TOOLS):
        if python and (tool.text("type") or "").startswith("code_execution_"):
            runs = interpreter(tool, body.text("container"), (), tool.integer("max_uses", 1))
            with_python(tools, tool)
        else:
            tools.append(_tool(tool))
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) != len(names):
        raise body.wrong("tools", "has two tools of one name")
    choice, parallel = _tool_choice(body, names)
    chat = Chat(
        messages=tuple(read.messages),
        tools=tuple(tools),
        tool_choice=choice,
        parallel=parallel,
        form=_form(body),
        thinking=_thinking(body),
        interpreter=runs,
    )
    return continued(body, chat) if read.messages[-1]["role"] == "assistant" else chat


def _blocks(holder: Fields, name: str) -> Iterator[Fields]:
    """Content blocks; a string is one block of text."""
    value = holder.values.get(name)
    if isinstance(value, str):
        yield Fields({"type": "text", "text": value}, holder.where(name))
        return
    for block in holder.objects(name, MAX_MESSAGES):
        block.required("type")
        yield block


def _texts(holder: Fields, name: str) -> Iterator[str]:
    for block in _blocks(holder, name):
        yield _text(block)


def _text(block: Fields) -> str:
    sort = block.text("type")
    if sort == "text":
        block.required("text")
        return block.text("text") or ""
    if sort == "image":
        raise block.wrong("type", "is an image; this server's model reads text only")
    if sort == "document":
        source = block.object("source")
        if source is not None and source.text("type") == "text":
            return source.text("data") or ""
        raise block.wrong("source", "must be plain text; this server's model reads text only")
    raise block.wrong("type", f"is {(sort or '')[:50]!r}, which cannot be honoured here")


def _without_billing(text: str) -> str:
    while text.startswith(BILLING):
        text = text.partition("\n")[2]
    return text


def _tool(tool: Fields) -> dict[str, Any]:
    if tool.text("type", "custom") != "custom":
        raise tool.wrong(
            "type",
            "must be 'custom', or 'code_execution_...' where the server runs with --tools python",
        )
    tool.required("input_schema")
    return function_tool(tool, "input_schema", strict=tool.flag("strict"), name=tool.text("name"))


def _tool_choice(body: Fields, names: list[str]) -> tuple[str, bool]:
    """The choice in OpenAI's words, and whether calls may be parallel."""
    chosen = body.object("tool_choice")
    if chosen is None:
        return "auto", True
    chosen.required("type")
    sort = chosen.one_of("type", ("auto", "any", "tool", "none"), "auto")
    parallel = not chosen.flag("disable_parallel_tool_use")
    if sort == "any":
        if not names:
            raise chosen.wrong("type", "is 'any', and there are no 'tools'")
        return "required", parallel
    if sort == "tool":
        name = chosen.text("name")
        if name not in names:
            raise chosen.wrong("name", "is not among 'tools'")
        return str(name), parallel
    return sort, parallel


def _form(body: Fields) -> Form:
    config = body.object("output_config")
    form = config.object("format") if config else None
    if form is None:
        return Form()
    if form.text("type") != "json_schema":
        raise form.wrong("type", "must be 'json_schema'")
    form.required("schema")
    schema = form.object("schema")
    return Form("json_schema", dict(schema.values) if schema else {})


def _thinking(body: Fields) -> Thinking:
    effort = None
    config = body.object("output_config")
    if config is not None and "effort" in config:
        effort = config.one_of("effort", EFFORTS, "high")
        effort = None if effort == "high" else effort  # which is what leaving it out means
    thinking = body.object("thinking")
    if thinking is None:
        return Thinking(effort=effort)
    thinking.required("type")
    sort = thinking.one_of("type", ("enabled", "disabled", "adaptive"), "adaptive")
    if sort == "disabled":
        return Thinking(False)
    if sort == "adaptive":
        return Thinking(effort=effort)
    thinking.required("budget_tokens")
    budget = thinking.integer("budget_tokens", 1)
    most = body.integer("max_tokens")
    if most is not None and budget is not None and budget >= most:
        raise thinking.wrong("budget_tokens", f"is {budget}; it must be less than 'max_tokens'")
    return Thinking(True, effort, budget)
