"""From a model's name to what is served."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..errors import ServeError, UsageError
from ..kv import KVConfig
from ..kv.half import halvable
from ..kv.model import digest
from ..kv.prefix import Key
from ..kv.rows import Caches
from ..lora.adapter import Base
from ..lora.mounting import opened
from ..runtime.loading import open_source
from ..sources import resolve
from ..version import __version__
from . import answering
from .engine.adapters import Adapters
from .engine.engine import Engine, EngineOptions
from .engine.prefix import PrefixCache
from .models import Models
from .options import Options

_LIBRARIES = ("starlette", "uvicorn", "h11", "llguidance", "prometheus_client")


def check_libraries() -> None:
    missing = [name for name in _LIBRARIES if find_spec(name) is None]
    if missing:
        raise ServeError(
            f"the server needs {', '.join(missing)}; pip install 'optiq-mlx[serve]' brings what "
            "it needs"
        )


@dataclass(frozen=True)
class Opened:
    """A model that is ready to answer. `identity` is that of its weights.

    `prefix` is closed when the engine is.
    """

    engine: answering.Engine
    tokenizer: Any
    models: Models
    identity: str
    prefix: PrefixCache | None = None
    adapters: Adapters | None = None


def open_model(
    model: str | Path | tuple[nn.Module, Any],
    options: Options,
    *,
    kv: KVConfig | Path | str | None = None,
    revision: str | None = None,
) -> Opened:
    """Load a model and make its engine. Raises SourceError, KVError, UsageError."""
    if isinstance(model, tuple):
        if any(given is not None for given in (kv, revision, options.expert_memory)):
            raise UsageError("kv, revision and expert_memory are for a model given by its name")
        loaded, tokenizer = model
        name, key, base = "model", None, None
    else:
        source = resolve(str(model), revision=revision)
        loaded, tokenizer = open_source(source, kv=kv, expert_memory=options.expert_memory)
        name = _name(str(model), source.kind)
        dtype = "float16" if halvable(loaded) else ""
        key = Key(source.fingerprint, config=digest(loaded) + dtype)
        base = Base(source.name, source.fingerprint)
    nbytes = options.prefix_bytes // 2 if options.adaptable else options.prefix_bytes
    prefix = _prefix_cache(key, options, nbytes)
    limits = EngineOptions(
        running=options.max_concurrent,
        memory=options.memory,
        beside=options.prefix_bytes + (2 * options.adapter_memory if options.adaptable else 0),
    )
    try:
        engine = Engine(loaded, tokenizer, limits, prefix)
        engine.adapters = _adapters(loaded, base, key or Key(""), engine.make_caches, options)
    except BaseException:
        prefix.close()
        raise
    models = Models(
        name=options.name or name,
        created=int(time.time()),
        context=engine.context,
        fingerprint=_fingerprint(key),
        aliases=options.aliases,
    )
    return Opened(engine, tokenizer, models, key.model if key else "", prefix, engine.adapters)


def _adapters(
    model: nn.Module,
    base: Base | None,
    key: Key,
    make_caches: Callable[[], Caches],
    options: Options,
) -> Adapters | None:
    """What can be mounted on `model`, with what is to be from the start. Raises AdapterError."""
    if not options.adaptable:
        return None
    share = options.prefix_bytes // 2 // options.max_concurrent
    found = Adapters(
        model,
        base,
        make_caches,
        slots=options.max_concurrent,
        nbytes=options.adapter_memory,
        prefix=lambda digest: PrefixCache(replace(key, adapter=digest), share),
    )
    for name, folder in options.adapters:
        found.mount(name, opened(folder))
    return found


def _fingerprint(key: Key | None) -> str:
    """Of all that decides what is answered: the weights, how the cache is kept, and this code."""
    named = f"{key.model} {key.config}" if key else "in memory"
    return f"fp_{sha256(f'{named} {__version__}'.encode()).hexdigest()[:12]}"


def _name(given: str, kind: str) -> str:
    """What clients call it: the id on the hub, or the name of the folder or file."""
    if kind == "hub":
        return given
    path = Path(given).expanduser().resolve()
    return path.stem if kind == "gguf" else path.name


def _prefix_cache(key: Key | None, options: Options, nbytes: int) -> PrefixCache:
    if options.prefix_cache is None:
        return PrefixCache(key or Key(""), nbytes)
    if key is None:
        raise UsageError("a prefix cache on disk is for a model given by its name")
    return PrefixCache(key, nbytes, options.prefix_cache, options.prefix_cache_bytes)
