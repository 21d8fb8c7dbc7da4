"""BFCL-v3 "simple": one question, one function; the call the model makes is read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...chat.calls import ParseError
from ...chat.forms import Chat
from ...chat.template import chat_text
from ...chat.template_calls import read_calls
from .. import bfcl
from ..data import Questions
from ..engine import Engine, Prompt
from ..records import Metrics
from ..task import Item
from .generation import Generation

MAX_TOKENS = 512

# BFCL's names of types, which are Python's, as JSON Schema has them.
_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}


class Bfcl(Generation):
    """Tools go through the chat template; as a system message if it drops them or there is none."""

    name = "bfcl"

    def __init__(self, questions: Questions, ids: Sequence[str], tokenizer: Any) -> None:
        super().__init__(questions, ids)
        self._tokenizer = tokenizer
        messages, tools = _chat(self.waves[0][0].data)
        form = chat_text(messages, tokenizer, tools, answer=True).form
        self.protocol = (
            f"bfcl/2: v3 simple, tools in the form {form!r}, greedy, at most {MAX_TOKENS} tokens"
        )

    def prompt(self, engine: Engine, item: Item) -> Prompt:
        return Prompt(engine.chat(*_chat(item.data)), MAX_TOKENS)

    def score(self, item: Item, answer: str) -> tuple[Metrics, str]:
        _, tools = _chat(item.data)
        calls = read_calls(answer, self._tokenizer, tools)
        if isinstance(calls, ParseError):
            return {"ast": False}, str(calls)
        (function,), (possible,) = item.data["function"], item.data["ground_truth"]
        reason = bfcl.check(function, possible, calls)
        return {"ast": reason is None}, reason or ""

    def failed(self, item: Item) -> Metrics:
        return {"ast": False}


def _chat(row: Mapping[str, Any]) -> Chat:
    """The messages and tools of a case in OpenAI's shape."""
    tools = [
        {"type": "function", "function": {**f, "parameters": json_schema(f["parameters"])}}
        for f in row["function"]
    ]
    return row["question"][0], tools


def json_schema(parameter: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter of BFCL as JSON Schema: types renamed, all else as it is."""
    schema = dict(parameter)
    if isinstance(kind := schema.get("type"), str):
        schema["type"] = _TYPES.get(kind, kind)
    if isinstance(schema.get("items"), Mapping):
        schema["items"] = json_schema(schema["items"])
    if isinstance(schema.get("properties"), Mapping):
        schema["properties"] = {k: json_schema(v) for k, v in schema["properties"].items()}
    return schema
