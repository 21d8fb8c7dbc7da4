"""How Anthropic's protocol says what every protocol says."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from ...models import Listed
from ..problems import Problem
from ..protocol import event

OVERLOADED = 529  # where others say 503

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    OVERLOADED: "overloaded_error",
}


class Anthropic:
    ping = event('{"type":"ping"}', "ping")

    def status(self, problem: Problem) -> int:
        return OVERLOADED if problem.status == 503 else problem.status

    def error(self, problem: Problem, request_id: str) -> dict[str, Any]:
        kind = _TYPES.get(self.status(problem), "invalid_request_error")
        message = problem.message
        if problem.code == "context_length_exceeded":
            message = f"prompt is too long: {message}"  # clients look for these words
        return {
            "type": "error",
            "error": {"type": kind, "message": message},
            "request_id": request_id,
        }

    def models(self, listed: Sequence[Listed]) -> dict[str, Any]:
        ends = {"first_id": listed[0].name, "last_id": listed[-1].name}
        return {"data": [self.model(model) for model in listed], "has_more": False, **ends}

    def model(self, listed: Listed) -> dict[str, Any]:
        created = datetime.fromtimestamp(listed.created, timezone.utc)
        return {
            "type": "model",
            "id": listed.name,
            "display_name": listed.name,
            "lifecycle": "active",
            "created_at": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "max_input_tokens": listed.context,
            "max_tokens": listed.context,
        }


DIALECT = Anthropic()
