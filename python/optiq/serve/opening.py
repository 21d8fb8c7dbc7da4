"""From a model's name to what is served."""

from __future__ import annotations

import time
from dataclasses import dataclass
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
from ..runtime.loading import open_source
from ..sources import resolve
from ..version import __version__
from . import answering
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


def open_model(
    model: str | Path | tuple[nn.Module, Any],
    options: Options,
    *,
    kv: KVConfig | Path | str | None = None,
    revision: str | None = None,
) -> Opened:
    """Load a model and make its engine. Raises SourceError, KVError, UsageError."""
    if isinstance(model, tuple):
        if kv is not None or revision is not None:
            raise UsageError("kv and revision are for a model given by its name")
        loaded, tokenizer = model
        name, key = "model", None
    else:
        source = resolve(str(model), revision=revision)
        loaded, tokenizer = open_source(source, kv=kv)
        name = _name(str(model), source.kind)
        dtype = "float16" if halvable(loaded) else ""
        key = Key(source.fingerprint, config=digest(loaded) + dtype)
    prefix = _prefix_cache(key, options)
    limits = EngineOptions(
        running=options.max_concurrent, memory=options.memory, beside=options.prefix_bytes
    )
    try:
        engine = Engine(loaded, tokenizer, limits, prefix)
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
    return Opened(engine, tokenizer, models, key.model if key else "", prefix)


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


def _prefix_cache(key: Key | None, options: Options) -> PrefixCache:
    if options.prefix_cache is None:
        return PrefixCache(key or Key(""), options.prefix_bytes)
    if key is None:
        raise UsageError("a prefix cache on disk is for a model given by its name")
    return PrefixCache(key, options.prefix_bytes, options.prefix_cache, options.prefix_cache_bytes)
