"""A model that does a task with the tools of a coding agent, step by step."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache

from optiq.serve.engine.request import Event, Finished, Request
from tests.serve.scripted import START
from tests.tiny import EOS

TASK = "Copy what notes.txt says into copy.txt."
TITLE = "Copying notes"
CONTEXT = 400_000  # the tokens of the tiny tokenizer are short


def call(name: str, **arguments: Any) -> str:
    """A call as the tiny model's template has it."""
    body = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{body}\n</tool_call>"


class AgentModel(nn.Module):
    """Says `steps` one after the other, one in each turn after the task, and a title where `mark`
    is not in the prompt. Its caches hold tokens in the place of keys."""

    def __init__(self, tokenizer: Any, steps: Sequence[str], mark: str) -> None:
        super().__init__()
        self.args = SimpleNamespace(max_position_embeddings=CONTEXT)
        self.layers: list[nn.Module] = []
        self._tokenizer, self._steps, self._mark = tokenizer, steps, mark
        self._start = tokenizer.encode(START, add_special_tokens=False)
        self._going: dict[int, list[int]] = {}  # what is still to be said, by length

    def make_cache(self) -> list[KVCache]:
        return [KVCache()]

    def __call__(self, inputs: mx.array, cache: list[Any]) -> mx.array:
        tokens = inputs[:, None, :, None].astype(mx.float32)
        rows = getattr(cache[0], "rows", cache)
        logits = np.zeros((*inputs.shape, 384), np.float32)
        for i, row in enumerate(rows):
            keys = row.update_and_fetch(tokens[i : i + 1], tokens[i : i + 1])[0]
            if inputs.shape[1] == 1:
                logits[i, -1, self._next(keys)] = 100.0
        return mx.array(logits)

    def _next(self, keys: mx.array) -> int:
        length = keys.shape[2]
        said = self._going.pop(length, None)
        if said is None:
            said = self._answer([int(t) for t in np.array(keys).ravel()])
        if not said:
            return EOS
        self._going[length + 1] = said[1:]
        return said[0]

    def _answer(self, history: list[int]) -> list[int]:
        if history[-len(self._start) :] != self._start:  # the model is only measured
            return []
        text = self._tokenizer.decode(history)
        turn = text.rpartition(TASK)[2].count(START) - 1
        step = self._steps[min(turn, len(self._steps) - 1)] if self._mark in text else TITLE
        return list(self._tokenizer.encode(step, add_special_tokens=False))


class Watched:
    """An engine, and how much of each prompt with tools came from the cache."""

    def __init__(self, engine: Any, tools: Callable[[Request], bool]) -> None:
        self._engine, self._tools = engine, tools
        self.requests: list[Request] = []
        self.turns: list[Finished] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, request: Request, listener: Callable[[Event], None]) -> int:
        self.requests.append(request)

        def heard(event: Event) -> None:
            if isinstance(event, Finished) and self._tools(request):
                self.turns.append(event)
            listener(event)

        ticket: int = self._engine.submit(request, heard)
        return ticket
