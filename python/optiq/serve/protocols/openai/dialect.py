"""How OpenAI's protocol says what every protocol says."""

from __future__ import annotations

import json
from typing import Any

from ...models import Models
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
        return {
            "error": {
                "message": problem.message,
                "type": _TYPES.get(problem.status, "invalid_request_error"),
                "param": problem.param,
                "code": problem.code,
            }
        }

    def models(self, models: Models) -> dict[str, Any]:
        return {"object": "list", "data": [self.model(models, models.name)]}

    def model(self, models: Models, name: str) -> dict[str, Any]:
        """`context_window` is ours: the most tokens of prompt and answer."""
        return {
            "id": models.find(name),
            "object": "model",
            "created": models.created,
            "owned_by": "optiq",
            "context_window": models.context,
        }

    def error_event(self, problem: Problem, request_id: str) -> str:
        return data(self.error(problem, request_id)) + DONE


DIALECT = OpenAI()
DONE = event("[DONE]")


def data(value: object) -> str:
    """A value as an event."""
    return event(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
