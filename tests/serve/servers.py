"""Servers for tests, and the SDKs as their clients."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from anthropic import Anthropic
from anthropic.types import Message, RawMessageStreamEvent
from mlx_lm.tokenizer_utils import load as load_tokenizer
from openai import OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import TypeAdapter

from optiq.serve.engine.request import Request
from optiq.serve.models import Models
from optiq.serve.opening import Opened, open_model
from optiq.serve.options import Options
from optiq.serve.server import Server, bind, one, open_python
from tests.serve.scripted import ScriptedEngine, ScriptedModel
from tests.tiny import CHAT_TEMPLATE, EOS, write_tokenizer

MODEL = "tiny"

# The tiny template with reasoning: what the assistant thought, and a switch.
THINKING_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ message.content or '' }}",
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n"
    "{% endif %}{{ message.content or '' }}",
).replace(
    "<|im_start|>assistant\n{% endif %}",
    "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n"
    "</think>\n\n{% endif %}{% endif %}",
)

WEATHER = {
    "name": "get_weather",
    "description": "The weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOLS = [{"type": "function", "function": WEATHER}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@cache
def tiny_tokenizer(thinking: bool = False) -> Any:
    with TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        if thinking:
            config = Path(folder) / "tokenizer_config.json"
            settings = json.loads(config.read_text())
            config.write_text(json.dumps({**settings, "chat_template": THINKING_TEMPLATE}))
            file = Path(folder) / "tokenizer.json"
            tokenizer = json.loads(file.read_text())
            for token, id in _marks(tokenizer):
                tokenizer["added_tokens"].append(
                    {"id": id, "content": token, "single_word": False, "lstrip": False}
                    | {"rstrip": False, "normalized": False, "special": False}
                )
            file.write_text(json.dumps(tokenizer))
        return load_tokenizer(Path(folder), eos_token_ids=[EOS])


def _marks(tokenizer: Any) -> Iterator[tuple[str, int]]:
    """`<think>` and `</think>` take the places of the last two words of the vocabulary."""
    vocabulary = tokenizer["model"]["vocab"]
    for mark in ("</think>", "<think>"):
        word = max(vocabulary, key=vocabulary.__getitem__)
        yield mark, vocabulary.pop(word)
        tokenizer["model"]["merges"] = [
            merge for merge in tokenizer["model"]["merges"] if "".join(merge) != word
        ]


class Asked:
    """A running server, asked by httpx; responses are held strictly to the SDKs' types."""

    def __init__(self, server: Server, engine: Any, tokenizer: Any) -> None:
        self.server, self.engine, self.tokenizer = server, engine, tokenizer
        self.http = httpx.Client(base_url=server.url, timeout=60, trust_env=False)
        self.openai = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        self.anthropic = Anthropic(base_url=server.url, api_key="none", max_retries=0)

    def close(self) -> None:
        for client in (self.http, self.openai, self.anthropic):
            client.close()

    def post(self, path: str, body: Any, status: int = 200, **headers: str) -> Any:
        answer = self.http.post(path, json=body, headers=headers)
        assert answer.status_code == status, answer.text
        return answer.json()

    def chat(self, content: Any = "SAY:Hello", **fields: Any) -> ChatCompletion:
        body = self.post("/v1/chat/completions", chat_body(content, **fields))
        return ChatCompletion.model_validate_json(json.dumps(body), strict=True)

    def chunks(self, content: Any = "SAY:Hello", **fields: Any) -> list[ChatCompletionChunk]:
        body = chat_body(content, stream=True, **fields)
        *events, done = self.events("/v1/chat/completions", body)
        assert done == "[DONE]"
        return [ChatCompletionChunk.model_validate_json(event, strict=True) for event in events]

    def complete(self, prompt: Any = "SAY:Hello", **fields: Any) -> Completion:
        body = self.post("/v1/completions", {"model": MODEL, "prompt": prompt, **fields})
        return Completion.model_validate_json(json.dumps(body), strict=True)

    def message(self, content: Any = "SAY:Hello", **fields: Any) -> Message:
        body = self.post("/v1/messages", message_body(content, **fields))
        return Message.model_validate_json(json.dumps(body), strict=True)

    def message_events(self, content: Any = "SAY:Hello", **fields: Any) -> list[Any]:
        events = self.events("/v1/messages", message_body(content, stream=True, **fields))
        read = TypeAdapter(RawMessageStreamEvent)
        return [
            json.loads(event) if '"ping"' in event else read.validate_json(event, strict=True)
            for event in events
        ]

    def events(self, path: str, body: Any) -> list[str]:
        """The data of each server-sent event."""
        with self.http.stream("POST", path, json=body) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            return [
                line.removeprefix("data: ")
                for line in answer.iter_lines()
                if line.startswith("data: ")
            ]

    def refused(self, path: str, body: Any, param: str | None, status: int = 400) -> str:
        """The message of an error in OpenAI's words, whose shape is checked."""
        error = self.post(path, body, status)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["param"] == param
        assert error["message"]
        return str(error["message"])

    def refused_message(self, body: Any, status: int = 400, kind: str | None = None) -> str:
        """The message of an error in Anthropic's words, whose shape is checked."""
        answer = self.post("/v1/messages", body, status)
        assert answer.keys() == {"type", "error", "request_id"}
        assert answer["type"] == "error"
        assert answer["error"]["type"] == (kind or "invalid_request_error")
        return str(answer["error"]["message"])


def chat_body(content: Any = "SAY:Hello", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}


def message_body(content: Any = "SAY:Hello", **fields: Any) -> dict[str, Any]:
    return {"max_tokens": 100, **chat_body(content, **fields)}


def content_of(chunks: list[ChatCompletionChunk], choice: int = 0) -> str:
    deltas = (c.delta for chunk in chunks for c in chunk.choices if c.index == choice)
    return "".join(delta.content or "" for delta in deltas)


def wait_until(condition: Callable[[], object]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen in thirty seconds")


class Recorded:
    """An engine, and what it was asked."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.requests: list[Request] = []
        self.cancelled: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, request: Request, listener: Any) -> int:
        self.requests.append(request)
        ticket: int = self._engine.submit(request, listener)
        return ticket

    def cancel(self, ticket: int) -> None:
        self.cancelled.append(ticket)
        self._engine.cancel(ticket)


@contextmanager
def served(opened: Opened, options: Options) -> Iterator[Asked]:
    opened = replace(opened, engine=Recorded(opened.engine))  # type: ignore[arg-type]
    with bind(options) as bound, open_python(options) as python:
        server = Server(partial(one, opened), bound, options, python)
    with server:
        asked = Asked(server, opened.engine, opened.tokenizer)
        try:
            yield asked
        finally:
            asked.close()


def read_options(options: dict[str, Any]) -> Options:
    return Options(**{"port": 0, "drain": 0.0, "name": MODEL, **options})


@contextmanager
def doubled(tokenizer: Any = None, **options: Any) -> Iterator[Asked]:
    """A server around the double of the engine."""
    tokenizer, read = tokenizer or tiny_tokenizer(), read_options(options)
    engine = ScriptedEngine(tokenizer)
    models = Models(MODEL, 1_700_000_000, engine.context, "fp_test", read.aliases)
    with served(Opened(engine, tokenizer, models, "tiny"), read) as asked:
        yield asked


@contextmanager
def scripted(tokenizer: Any = None, context: int = 512, **options: Any) -> Iterator[Asked]:
    """A server around the engine, with a model that follows the script."""
    tokenizer, read = tokenizer or tiny_tokenizer(), read_options(options)
    with served(open_model((ScriptedModel(tokenizer, context), tokenizer), read), read) as asked:
        yield asked
