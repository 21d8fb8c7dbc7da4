"""How OpenAI's protocol says what every protocol says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ...models import Listed
from ..problems import Problem
from ..protocol import event

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class OpenAI:
    ping = ": ping\n\n"

    def status(self, problem: Problem) -> int:
        return problem.status

    def error(self, problem: Problem, request_id: str) -> dict[str, Any]:
        message = problem.message
        if problem.code == "context_length_exceeded":
            # Clients look for one or the other of these words.
            words = "the input exceeds the context window, the maximum context length of this model"
            message = f"{words}: {message}"
        return {
            "error": {
                "message": message,
                "type": _TYPES.get(problem.status, "invalid_request_error"),
                "param": problem.param,
                "code": problem.code,
            }
        }

    def models(self, listed: Sequence[Listed]) -> dict[str, Any]:
        return {"object": "list", "data": [self.model(model) for model in listed]}

    def model(self, listed: Listed) -> dict[str, Any]:
        """Ours: `context_window`, the most tokens of prompt and answer, `loaded` and `pinned`."""
        return {
            "id": listed.name,
            "object": "model",
            "created": listed.created,
            "owned_by": "optiq",
            "context_window": listed.context,
            "loaded": listed.loaded,
            "pinned": listed.pinned,
        }

    def error_event(self, problem: Problem, request_id: str) -> str:
        return data(self.error(problem, request_id)) + DONE


DIALECT = OpenAI()
DONE = event("[DONE]")


def data(value: object) -> str:
    """A value as an event."""
    return event(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
