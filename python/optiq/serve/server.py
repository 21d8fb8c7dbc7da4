"""The server: from its options to its end."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.nn as nn

from ..base.memory import available_memory
from ..distributed.ranks import launched, world
from ..errors import ServeError, UsageError
from ..kv import KVConfig
from .models import Listed
from .opening import Opened, Ranks, check_libraries, open_model, open_share
from .options import Options, ServeFields
from .ranks import SILENCE, Loss, end_with_rank_0, follow
from .tools.python import Python, open_tool

if TYPE_CHECKING:
    import uvicorn
    from typing_extensions import Unpack

    from .running import Services, Shared

HEADER_BYTES = 64 * 2**10
STARTING_SECONDS = 30.0
FAREWELL_SECONDS = 5  # for clients to read that the server stops


def serve(
    model: str | Path | tuple[nn.Module, Any] | None = None,
    *,
    kv: KVConfig | Path | str | None = None,
    revision: str | None = None,
    show: Callable[[Server], object] = lambda server: print(server.greeting(), flush=True),
    **options: Unpack[ServeFields],
) -> None:
    """Answer OpenAI's and Anthropic's clients until Ctrl-C or SIGTERM.

    `model` and `kv` are as in `optiq.load`, or `model` is what it returned. Without a model those
    in `models_dir` are served by their names, loaded when they are asked for. `options` are the
    fields of `serve.options.Options`, such as `port=8080`. When it is told to stop, answers have
    `drain` seconds to finish; told again, none. `show` is called when it is ready.

    Where mlx.launch has started several ranks, they share the model; rank 0 answers, and the others
    return when it ends. When one is lost, the process ends with exit code 75 in all of them.

    Raises UsageError, SourceError, KVError, ServeError, DistributedError for the ranks, and
    SandboxUnavailable with `tools=("python",)`, before anything is served.
    """
    if launched():
        loss = Loss()
        with world(loss) as here:
            if here.size > 1:
                _serve_in(Ranks(here, loss), model, kv, revision, show, options)
                return
    with Server.open(model, kv=kv, revision=revision, **options) as server:
        show(server)
        server.wait()


def _serve_in(
    ranks: Ranks,
    model: str | Path | tuple[nn.Module, Any] | None,
    kv: KVConfig | Path | str | None,
    revision: str | None,
    show: Callable[[Server], object],
    options: ServeFields,
) -> None:
    """`serve` of a model that several ranks share."""
    read = Options(**options)
    if model is None or read.models_dir is not None:
        raise UsageError("several ranks serve one model; give it, and not --models-dir")
    if ranks.world.rank == 0:
        with Server.open(model, kv=kv, revision=revision, ranks=ranks, **options) as server:
            _begin(ranks)
            show(server)
            server.wait()
    else:
        end_with_rank_0(read.drain + FAREWELL_SECONDS)
        share = open_share(model, read, kv=kv, revision=revision, world=ranks.world)
        _begin(ranks)
        follow(share)


def _begin(ranks: Ranks) -> None:
    """From here on clients wait, and ranks that are lost are started again."""
    ranks.loss.serving = True
    ranks.world.give_up_after(SILENCE)


class Server:
    """A server in threads of its own.

        with Server.open("out", port=0) as server:
            print(server.url)

    `start` begins to answer on `bound`, and `stop` ends it for good.
    """

    @classmethod
    def open(
        cls,
        model: str | Path | tuple[nn.Module, Any] | None = None,
        *,
        kv: KVConfig | Path | str | None = None,
        revision: str | None = None,
        ranks: Ranks | None = None,
        **options: Unpack[ServeFields],
    ) -> Server:
        """Take the port, then load the model; with `ranks`, that of rank 0. Raises as `serve`
        does."""
        check_libraries()
        read = Options(**options)
        if (model is None) == (read.models_dir is None):
            raise UsageError("give a model, or --models-dir with a folder of them, and not both")
        with bind(read) as bound, open_python(read) as python:
            if model is None:
                return cls(partial(routed, read, kv), bound, read, python)
            opened = open_model(model, read, kv=kv, revision=revision, ranks=ranks)
            return cls(partial(one, opened), bound, read, python)

    def __init__(
        self,
        opened: Callable[[Shared], Services],
        bound: socket.socket,
        options: Options,
        python: Python | None = None,
    ) -> None:
        import uvicorn

        from .http.app import State, make_app
        from .http.connection import Connection
        from .metrics import Metrics
        from .preparing import Preparer
        from .protocols.store import ResponseStore
        from .running import Shared

        self.options, self._socket = options, bound
        self.port: int = bound.getsockname()[1]
        self._shared = Shared(
            options,
            Metrics(lambda: self._services.stats()),
            Preparer(options.preparing_seconds),
            ResponseStore(),
            python,
        )
        self._services = opened(self._shared)
        self._state = State(lambda: self._services.ready, lambda: self._services.fault)
        config = uvicorn.Config(
            make_app(self._services, self._shared, self._state),
            loop="asyncio",
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=options.idle_seconds,  # type: ignore[arg-type]  # a float will do
            timeout_graceful_shutdown=int(options.drain) + FAREWELL_SECONDS,
            h11_max_incomplete_event_size=HEADER_BYTES,
        )
        self._http: uvicorn.Server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._http.run, args=([bound],), name="optiq-http", daemon=True
        )
        self._told = threading.Event()
        self._stopped = False

    @property
    def url(self) -> str:
        """Where clients find it; Anthropic's take this, OpenAI's with /v1 behind it."""
        host = self.options.host
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def models(self) -> Sequence[Listed]:
        return self._services.listed()

    def start(self) -> None:
        """Begin to answer. Returns when connections are accepted."""
        try:
            self._services.start()
        except BaseException:
            self.stop(0)
            raise
        self._thread.start()
        waited = threading.Event()
        for _ in range(int(STARTING_SECONDS / 0.01)):
            if self._http.started:
                return
            if not self._thread.is_alive():
                break
            waited.wait(0.01)
        self.stop(0)
        raise ServeError("the HTTP server could not be started; --debug shows why")

    def stop(self, drain: float | None = None) -> None:
        """Accept nothing more, let answers finish for `drain` seconds, and end the rest."""
        if self._stopped:
            return
        self._stopped = True
        self._state.stopping = True
        self._http.should_exit = True
        self._services.close(self.options.drain if drain is None else drain)
        if self._thread.is_alive():
            self._thread.join()
        self._shared.preparer.close()
        if self._shared.python is not None:
            self._shared.python.close()
        self._socket.close()

    def wait(self) -> None:
        """Until SIGINT, SIGTERM or the death of the server, where there are signals."""
        with _signals(self._told):
            while not self._told.wait(0.5):
                if not self._thread.is_alive():
                    raise ServeError("the HTTP server has died; --debug shows why")

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        with _signals(self._told, again=True):
            self.stop()

    def greeting(self) -> str:
        """Lines to paste."""
        models, url = self.models, self.url
        name = models[0].name
        served = ", ".join(model.name for model in models)
        context = f", with a context of {models[0].context} tokens" if models[0].context else ""
        key = "the key" if self.options.api_keys else "none"
        say = 'messages=[{"role": "user", "content": "Hello"}]'
        return f"""\
{served} is served at {url}{context}. Ctrl-C stops it.
The page to talk to it: {url}

from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="{key}")
print(client.chat.completions.create(model="{name}", {say}).choices[0].message.content)

from anthropic import Anthropic
client = Anthropic(base_url="{url}", api_key="{key}")
print(client.messages.create(model="{name}", max_tokens=256, {say}).content)
"""


def one(opened: Opened, shared: Shared) -> Services:
    """A server of one model."""
    from .running import OneModel, Running

    return OneModel(Running(opened, shared))


def routed(options: Options, kv: KVConfig | Path | str | None, shared: Shared) -> Services:
    """A server of the models in `options.models_dir`. Raises UsageError."""
    from .router import Place, Router, places_in
    from .running import Running

    assert options.models_dir is not None
    memory = options.memory or available_memory() * 3 // 4
    share = options.model_memory or memory // 8

    def load(place: Place) -> Running:
        own = replace(
            options, name=place.name, aliases=("*",), memory=place.nbytes + share,
            prefix_memory=min(options.prefix_bytes, share // 3),
        )  # fmt: skip
        opened = open_model(place.path, own, kv=kv)
        running = Running(opened, shared)
        running.engine.start()
        return running

    return Router(
        places_in(options.models_dir), load,
        memory=memory, share=share, aliases=options.alias_map, pinned=options.pinned,
        default=options.name, idle=options.unload_after,
    )  # fmt: skip


@contextmanager
def bind(options: Options) -> Iterator[socket.socket]:
    """The socket, taken before the model is loaded; given back where that fails."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((options.host, options.port))
            bound.listen(0)  # a port that another one listens on is refused here at the latest
        except OSError as error:
            raise UsageError(
                f"{options.host}:{options.port} cannot be listened on "
                f"({error.strerror or error}); choose another --port or --host"
            ) from None
        yield bound
    except BaseException:
        bound.close()
        raise


@contextmanager
def open_python(options: Options) -> Iterator[Python | None]:
    """The sandbox, before the model is loaded; closed where that fails."""
    python = open_tool(options.sandbox_packages) if "python" in options.tools else None
    try:
        yield python
    except BaseException:
        if python is not None:
            python.close()
        raise


@contextmanager
def _signals(told: threading.Event, *, again: bool = False) -> Iterator[None]:
    """SIGINT and SIGTERM set `told`; with `again`, they interrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def tell(number: int, frame: Any) -> None:
        if again:
            raise KeyboardInterrupt
        told.set()

    before = {number: signal.signal(number, tell) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
