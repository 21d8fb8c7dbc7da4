"""The application: which path is answered by what, and how every request ends."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from inspect import isawaitable
from time import perf_counter
from typing import Any

from starlette.datastructures import Headers, QueryParams
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...errors import OverloadedError
from ..metrics import Metrics
from ..preparing import Preparer
from ..protocols import anthropic, openai, responses
from ..protocols.fields import read_json
from ..protocols.problems import Problem, Refusal, problem
from ..protocols.protocol import Dialect, Endpoint, Reply
from ..protocols.store import Stored
from ..running import Services, Shared
from ..tools.python import Python
from . import log
from .body import Bodies, ClientGone
from .guard import Guard
from .page import page
from .sending import Stream, send_body, send_json, start, unless_gone

LARGE_BODY = 64 * 2**10  # from here on parsing is left to a thread

POSTED: dict[str, tuple[Endpoint, Dialect]] = {
    "/v1/chat/completions": (openai.chat, openai.DIALECT),
    "/v1/completions": (openai.complete, openai.DIALECT),
    "/v1/responses": (responses.respond, openai.DIALECT),
    "/v1/responses/input_tokens": (responses.count_input, openai.DIALECT),
    "/v1/messages": (anthropic.messages, anthropic.DIALECT),
    "/v1/messages/count_tokens": (anthropic.count_tokens, anthropic.DIALECT),
    "/v1/load_lora_adapter": (openai.load, openai.DIALECT),
    "/v1/unload_lora_adapter": (openai.unload, openai.DIALECT),
}

# A file that a model's program has written is never shown as a page of this server's.
FILE_HEADERS = {"content-disposition": "attachment", "x-content-type-options": "nosniff"}
# Of the engine's Stats, at /status.
SHOWN = (
    "running", "waiting", "kv_bytes", "prompt_tokens", "cached_tokens", "generated_tokens",
    "accepted_tokens",
)  # fmt: skip
EVENT_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


Found = dict[str, Any] | Response


class State:
    """Whether requests are accepted, and why none is ever again."""

    def __init__(self, ready: Callable[[], bool], fault: Callable[[], str]) -> None:
        self._ready, self._fault = ready, fault
        self.stopping = False

    @property
    def ready(self) -> bool:
        return self._ready() and not self.stopping

    @property
    def fault(self) -> str:
        return self._fault()


class Posted:
    """A path that a body is posted to. ASGI, so that it sees the client go away at any time."""

    def __init__(
        self,
        endpoint: Endpoint,
        dialect: Dialect,
        services: Services,
        preparer: Preparer,
        bodies: Bodies,
        metrics: Metrics,
        state: State,
        ping_seconds: float,
    ) -> None:
        self._endpoint, self._dialect = endpoint, dialect
        self._services, self._preparer = services, preparer
        self._bodies, self._metrics, self._state = bodies, metrics, state
        self._ping_seconds = ping_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["optiq.dialect"] = self._dialect
        _check_method(scope, "POST")
        if self._state.stopping:
            raise OverloadedError("the server is stopping", 5)
        async with self._bodies.read(Headers(scope=scope), receive) as body:
            work = asyncio.create_task(self._respond(scope, body, send))
            await unless_gone(work, receive)

    async def _respond(self, scope: Scope, body: bytes, send: Send) -> None:
        if len(body) < LARGE_BODY:
            parsed = read_json(body)
        else:
            parsed = await self._preparer.prepare(lambda: read_json(body))
        async with self._services.use(parsed.text("model")) as service:
            reply = await self._endpoint(service, parsed, _client(scope))
            await self._reply(reply, scope, send)

    async def _reply(self, reply: Reply | dict[str, Any], scope: Scope, send: Send) -> None:
        if isinstance(reply, dict):
            await send_json(reply, scope, send)
            return
        async with reply.answering:
            try:
                if reply.stream:
                    await self._stream(reply, scope, send)
                else:
                    await send_json(await reply.whole(), scope, send)
            finally:
                _note(scope, reply)

    async def _stream(self, reply: Reply, scope: Scope, send: Send) -> None:
        await send(start(200, "text/event-stream; charset=utf-8", EVENT_HEADERS))
        stream = Stream(send, self._dialect.ping, self._ping_seconds)
        try:
            async for text in reply.events():
                await stream.write(text)
        except (asyncio.CancelledError, ClientGone):
            raise
        except Exception as error:
            told = _told(error, scope, self._metrics)
            await stream.write(reply.error_event(told, scope["optiq.id"]))
        finally:
            await stream.close()
        await send_body(send, b"", more=False)


def _client(scope: Scope) -> str:
    address = scope.get("client")
    return address[0] if address else ""


def _note(scope: Scope, reply: Reply) -> None:
    """For the log line of this request."""
    answering = reply.answering
    scope["optiq.notes"].update(
        stream=reply.stream,
        first_token_ms=_ms(answering.first_token),
        prompt_tokens=answering.usage.prompt,
        cached_tokens=answering.usage.cached,
        generated_tokens=answering.usage.generated,
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 1)


def _told(error: BaseException, scope: Scope, metrics: Metrics) -> Problem:
    """The problem that the client is told of, counted and noted."""
    told = problem(error)
    if told.status == 500:
        log.failure(error, scope["optiq.id"])
    metrics.told(told.code)
    scope["optiq.notes"]["error"] = told.code
    return told


class Told:
    """Asks the guard, and tells clients of errors in their protocol's words."""

    def __init__(self, app: ASGIApp, guard: Guard, metrics: Metrics) -> None:
        self._app, self._guard, self._metrics = app, guard, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            self._guard.check(scope["path"], Headers(scope=scope))
            await self._app(scope, receive, watched)
        except ClientGone:
            raise
        except Exception as error:
            told = _told(error, scope, self._metrics)
            if started:  # the client has half of a response, and sees the connection close
                raise ClientGone from error
            await _send_error(told, scope, send)


class Logged:
    """Around everything: the request's id, its line in the log, and the count of requests."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise Refusal(404, "not_found", "only HTTP is spoken here")
        scope["optiq.id"] = request_id = f"req_{secrets.token_hex(12)}"
        scope["optiq.notes"] = notes = {}
        scope["optiq.dialect"] = _dialect_of(scope)
        began, status = perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                named = (b"x-request-id", b"request-id")
                extra = [(name, request_id.encode()) for name in named]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientGone:
            self._metrics.aborts.inc()
            notes["aborted"] = True
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(path, str(status)).inc()
            log.line(
                id=request_id,
                method=scope["method"],
                path=scope["path"][:200],
                status=status,
                ms=_ms(perf_counter() - began),
                **notes,
            )


def _dialect_of(scope: Scope) -> Dialect:
    """The protocol of a request that no path has said it of."""
    if scope["path"].startswith("/v1/messages") or "anthropic-version" in Headers(scope=scope):
        return anthropic.DIALECT
    return openai.DIALECT


async def _send_error(told: Problem, scope: Scope, send: Send) -> None:
    dialect: Dialect = scope["optiq.dialect"]
    headers = {}
    if told.retry_after is not None:
        headers["retry-after"] = str(told.retry_after)
    if told.status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is not read
    if told.status == 401:
        headers["www-authenticate"] = "Bearer"
    content = dialect.error(told, scope["optiq.id"])
    await send_json(content, scope, send, dialect.status(told), headers)


class Got:
    """A path that is asked for without a body: it is read, and perhaps deleted."""

    def __init__(
        self,
        work: Callable[[Scope], Found | Awaitable[Found]],
        methods: Sequence[str] = ("GET", "HEAD"),
    ) -> None:
        self._work, self._methods = work, methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        _check_method(scope, *self._methods)
        found = self._work(scope)
        if isawaitable(found):
            found = await found
        if isinstance(found, Response):
            await found(scope, receive, send)
        else:
            await send_json(found, scope, send)


def _query(scope: Scope) -> QueryParams:
    return QueryParams(scope["query_string"])


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    path = scope["path"][:200]
    hint = ""
    if f"/v1{path}" in POSTED:
        hint = "; the base URL of OpenAI's clients ends in /v1"
    elif path.startswith("/v1/v1/"):
        hint = "; the base URL of Anthropic's clients ends before /v1"
    raise Refusal(404, "not_found", f"there is nothing at {path!r}{hint}")


def _python(shared: Shared) -> Python:
    if shared.python is None:
        raise Refusal(404, "not_found", "this server runs no Python; start it with --tools python")
    return shared.python


def _check_method(scope: Scope, *methods: str) -> None:
    if scope["method"] not in methods:
        raise Refusal(405, "method_not_allowed", f"{scope['method']} is not answered here")


def make_app(services: Services, shared: Shared, state: State) -> ASGIApp:
    options, metrics = shared.options, shared.metrics
    bodies = Bodies(options)

    def health(scope: Scope) -> Found:
        if state.fault:
            return JSONResponse({"status": "failed", "reason": state.fault}, 503)
        return {"status": "ok"}

    def ready(scope: Scope) -> Response:
        if state.ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready"}, 503, {"retry-after": "1"})

    def counts(scope: Scope) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def models(scope: Scope) -> dict[str, Any]:
        dialect: Dialect = scope["optiq.dialect"]
        return dialect.models(services.listed())

    def model(scope: Scope) -> dict[str, Any]:
        dialect: Dialect = scope["optiq.dialect"]
        return dialect.model(services.find(scope["path_params"]["name"]))

    def stored(scope: Scope) -> Stored:
        return shared.store.find(scope["path_params"]["id"])

    def response(scope: Scope) -> dict[str, Any]:
        found = stored(scope)
        if scope["method"] == "DELETE":
            shared.store.delete(found.response["id"])
            return {"id": found.response["id"], "object": "response", "deleted": True}
        return responses.retrieve(found, _query(scope))

    def response_input(scope: Scope) -> dict[str, Any]:
        return responses.list_input(stored(scope), _query(scope))

    def cancelled(scope: Scope) -> dict[str, Any]:
        return responses.cancel(stored(scope))

    async def files(scope: Scope) -> dict[str, Any]:
        container = scope["path_params"]["id"]
        found = await _python(shared).files(container)
        listed = [{"name": name, "bytes": size} for name, size in sorted(found.items())]
        return {"object": "list", "data": listed, "has_more": False}

    async def file(scope: Scope) -> Response:
        named = scope["path_params"]
        data = await _python(shared).read(named["id"], named["name"])
        return Response(data, media_type="application/octet-stream", headers=FILE_HEADERS)

    def status(scope: Scope) -> dict[str, Any]:
        models = [
            {"name": model, **{name: getattr(stats, name) for name in SHOWN}}
            for model, stats in services.stats().items()
        ]
        errors = [{"time": when, "code": code} for when, code in metrics.last_errors]
        return {
            "models": models,
            "tools": list(options.tools),
            "errors": errors[::-1],
        }

    got: dict[str, Callable[[Scope], Found | Awaitable[Found]]] = {
        "/": lambda scope: page(),
        "/status": status,
        "/health": health,
        "/ready": ready,
        "/metrics": counts,
        "/v1/models": models,
        "/v1/models/{name:path}": model,
        "/v1/responses/{id}/input_items": response_input,
        "/v1/containers/{id}/files": files,
        "/v1/containers/{id}/files/{name:path}/content": file,
    }
    routes = [Route(path, Got(work)) for path, work in got.items()]
    for path, (endpoint, dialect) in POSTED.items():
        app = Posted(
            endpoint, dialect, services, shared.preparer, bodies, metrics, state,
            options.ping_seconds,
        )  # fmt: skip
        routes.append(Route(path, app))
    routes.append(Route("/v1/responses/{id}", Got(response, ("GET", "HEAD", "DELETE"))))
    routes.append(Route("/v1/responses/{id}/cancel", Got(cancelled, ("POST",))))
    router = Router(routes, redirect_slashes=False, default=_not_found)
    told: ASGIApp = Told(router, Guard(options), metrics)
    if options.cors_origins:
        told = CORSMiddleware(
            told,
            allow_origins=options.cors_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "request-id", "retry-after"),
        )
    return Logged(told, metrics, frozenset(route.path for route in routes))
