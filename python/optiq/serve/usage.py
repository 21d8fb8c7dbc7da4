"""How many tokens an answer took."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Usage:
    """Tokens; `prompt` includes `cached`, and `generated` includes `reasoning`."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0
    reasoning: int = 0

    def __add__(self, other: Usage) -> Usage:
        """Of two prompts, or of one prompt and more answers to it."""
        return Usage(
            self.prompt + other.prompt,
            self.cached + other.cached,
            self.generated + other.generated,
            self.reasoning + other.reasoning,
        )
