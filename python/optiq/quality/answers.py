"""Answers of several models to one prompt. They show what a KL looks like, and measure nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

# One of each kind: knowledge, explanation, code, translation, reasoning.
PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Translate into German: The train leaves at seven in the morning.",
    "Three pens cost 2 euros. What do 12 pens cost?",
)
TOKENS = 48  # of an answer, at most


@dataclass(frozen=True)
class Answers:
    """What the source, the plan and stock uniform 4-bit answer."""

    prompt: str
    source: str
    optiq: str
    uniform4: str
    tokens: int

    @property
    def answers(self) -> tuple[str, str, str]:
        return self.source, self.optiq, self.uniform4

    def to_json(self) -> Mapping[str, Any]:
        return asdict(self)
