"""How a server is run."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypedDict

from ..errors import UsageError

PREFIX_BYTES = 2 * 10**9
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class ServeFields(TypedDict, total=False):
    """The options of `Options`, as keyword arguments."""

    host: str
    port: int
    name: str | None
    aliases: tuple[str, ...]
    api_keys: tuple[str, ...]
    admin_keys: tuple[str, ...]
    adapters: tuple[tuple[str, str], ...]
    adapter_memory: int
    allowed_hosts: tuple[str, ...]
    cors_origins: tuple[str, ...]
    max_concurrent: int
    memory: int | None
    expert_memory: int | None
    draft: str | None
    prefix_memory: int | None
    answer_tokens: int
    prefix_cache: Path | None
    prefix_cache_bytes: int
    drain: float
    deadline: float
    body_bytes: int
    body_seconds: float
    idle_seconds: float
    preparing_seconds: float
    ping_seconds: float
    tools: tuple[str, ...]
    sandbox_packages: tuple[str, ...] | None
    models_dir: Path | None
    alias_map: tuple[tuple[str, str], ...]
    pinned: tuple[str, ...]
    model_memory: int | None
    unload_after: float | None


@dataclass(frozen=True)
class Options:
    """How a server is run. Seconds, bytes and numbers.

    `name` is that of the model, by default the one it was loaded by; `aliases` are others, with
    `*` for anything. `api_keys` are needed where `host` is not a loopback address.
    `allowed_hosts` are names of this server beside `host` and those of loopback; `cors_origins`
    are origins whose web pages may use it.

    `adapters` are mounted at the start, each a name and a folder. Who has one of `admin_keys` may
    mount others. All together take at most `adapter_memory` bytes, and as much again beside the
    model; their prompts share half of `prefix_memory`.

    `max_concurrent` answers are made at a time, in `memory` bytes, by default what the machine has.
    With `expert_memory` experts stay on disk, and so many bytes of `memory` hold those in use.
    `draft` is a small model of the same tokens, which guesses what comes next.
    Room for the longest answer is kept free from its start, so one without a limit of its own ends
    after `answer_tokens`.
    Prompts that were read are kept in `prefix_memory` bytes of it (by default a quarter, 2 GB at
    most) and, for after a restart, in the folder `prefix_cache`, in `prefix_cache_bytes` at most.
    When the server stops, answers have `drain` seconds to finish. An answer may take `deadline`
    seconds.

    A body may have `body_bytes` and take `body_seconds` to arrive, headers `idle_seconds`, and
    rendering a conversation `preparing_seconds`. `ping_seconds` is how often a silent stream shows
    that it is alive.

    `tools` are what the server runs itself for requests that ask for it: "python", in the sandbox,
    with `sandbox_packages` to import (by default numpy, pandas and matplotlib, if installed).

    The models in the folder `models_dir` are served by their names, loaded when they are asked for.
    Each takes its weights and `model_memory` (by default an eighth) of `memory`; the one that was
    not used for longest makes room. `pinned` ones are loaded at the start and stay, others go after
    `unload_after` seconds without a request. `alias_map` has (pattern, name), and `name` is the
    model of requests that name none.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    name: str | None = None
    aliases: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    adapters: tuple[tuple[str, str], ...] = ()
    adapter_memory: int = 500 * 10**6
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_concurrent: int = 16
    answer_tokens: int = 8192
    memory: int | None = None
    expert_memory: int | None = None
    draft: str | None = None
    prefix_memory: int | None = None
    prefix_cache: Path | None = None
    prefix_cache_bytes: int = 8 * 10**9
    drain: float = 30.0
    deadline: float = 3600.0
    body_bytes: int = 32 * 2**20
    body_seconds: float = 30.0
    idle_seconds: float = 30.0
    preparing_seconds: float = 30.0
    ping_seconds: float = 10.0
    tools: tuple[str, ...] = ()
    sandbox_packages: tuple[str, ...] | None = None
    models_dir: Path | None = None
    alias_map: tuple[tuple[str, str], ...] = ()
    pinned: tuple[str, ...] = ()
    model_memory: int | None = None
    unload_after: float | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in _AT_LEAST and value is not None and not value >= _AT_LEAST[f.name]:
                raise UsageError(f"{f.name} is {value}; give at least {_AT_LEAST[f.name]:g}")
        if self.port > 65535:
            raise UsageError(f"port is {self.port}; give at most 65535")
        for tool in self.tools:
            if tool != "python":
                raise UsageError(f"there is no tool {tool!r} to run; --tools takes python")
        if not self.api_keys and not self.loopback:
            raise UsageError(
                f"{self.host} can be reached from other machines, so the server needs a key: "
                "--api-key-file FILE, or OPTIQ_API_KEY in the environment"
            )
        keys = (*self.api_keys, *self.admin_keys)
        if any(len(key) < 8 or not key.isascii() or not key.isprintable() for key in keys):
            raise UsageError("an API key must be 8 or more printable ASCII characters")
        if self.models_dir is not None and (self.adapters or self.admin_keys):
            raise UsageError(
                "adapters belong to one model: give the model instead of --models-dir, or leave "
                "--adapter and --admin-key-file out"
            )
        if self.models_dir is not None and self.expert_memory is not None:
            raise UsageError(
                "--expert-memory belongs to one model: give the model instead of --models-dir"
            )
        if self.models_dir is not None and self.draft is not None:
            raise UsageError("--draft belongs to one model: give the model instead of --models-dir")
        if "*" in self.cors_origins and not self.api_keys:
            raise UsageError(
                "--cors-origin '*' lets every web page use this server; give it a key, or name "
                "the origins"
            )

    @property
    def prefix_bytes(self) -> int:
        """Memory for prompts that were read."""
        if self.prefix_memory is not None:
            return self.prefix_memory
        return PREFIX_BYTES if self.memory is None else min(PREFIX_BYTES, self.memory // 4)

    @property
    def adaptable(self) -> bool:
        """Whether adapters are there, or may come."""
        return bool(self.adapters or self.admin_keys)

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


_AT_LEAST: dict[str, float] = {
    "port": 0,
    "max_concurrent": 1,
    "answer_tokens": 1,
    "adapter_memory": 1,
    "prefix_memory": 0,
    "memory": 1,
    "expert_memory": 1,
    "model_memory": 1,
    "unload_after": 0.01,
    "prefix_cache_bytes": 1,
    "drain": 0,
    "deadline": 0.001,
    "body_bytes": 1024,
    "body_seconds": 0.1,
    "idle_seconds": 0.1,
    "preparing_seconds": 0.1,
    "ping_seconds": 0.01,
}
