"""Errors as HTTP knows them, before a protocol puts them into its words."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import DeadlineError, OverloadedError, RequestError, ServeError, TooLongError


class Refusal(ServeError):
    """A request that is refused for what it is, not for what its body says."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


@dataclass(frozen=True)
class Problem:
    """A status and a code for programs, a message for people, and the field if one is wrong."""

    status: int
    code: str
    message: str
    param: str | None = None
    retry_after: int | None = None


def problem(error: BaseException) -> Problem:
    """What a client is told of an error. Nothing of an unexpected one."""
    message = str(error)
    if isinstance(error, Refusal):
        return Problem(error.status, error.code, message)
    if isinstance(error, TooLongError):
        return Problem(400, "context_length_exceeded", message, error.param)
    if isinstance(error, RequestError):
        return Problem(400, "invalid_value", message, error.param)
    if isinstance(error, OverloadedError):
        return Problem(503, "overloaded", message, retry_after=error.retry_after)
    if isinstance(error, DeadlineError):
        return Problem(503, "deadline_exceeded", message, retry_after=1)
    if isinstance(error, ServeError):
        return Problem(500, "server_error", message)
    return Problem(500, "server_error", "the server failed at this request; its log says where")
