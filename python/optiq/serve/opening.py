"""From a model's name to what is served."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..distributed.ranks import World
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
from .engine.drafting import DraftModel
from .engine.engine import Engine, EngineOptions
from .engine.model import measure
from .engine.prefix import PrefixCache
from .models import Models
from .options import Options
from .ranks import Leading, Loss, Ranked

_LIBRARIES = ("starlette", "uvicorn", "h11", "llguidance", "prometheus_client")


def check_libraries() -> None:
    missing = [name for name in _LIBRARIES if find_spec(name) is None]
    if missing:
        raise ServeError(
            f"the server needs {', '.join(missing)}; pip install 'optiq-mlx[serve]' brings what "
            "it needs"
        )


@dataclass(frozen=True)
class Ranks:
    """The ranks that a model is shared by, and what happens when one is lost."""

    world: World
    loss: Loss


@dataclass(frozen=True)
class _Loaded:
    """A model, or a rank's share of it. Without a name it was given in memory."""

    model: nn.Module
    tokenizer: Any
    name: str = "model"
    key: Key | None = None
    base: Base | None = None


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
    ranks: Ranks | None = None,
) -> Opened:
    """Load a model and make its engine; with `ranks`, that of rank 0.

    Raises SourceError, KVError, UsageError, and DistributedError for `ranks`.
    """
    of = _load(model, options, kv, revision, ranks.world if ranks else None)
    draft = _draft(options, of.tokenizer, alone=ranks is None)
    prefix = _prefix_cache(of.key, options)
    limits = EngineOptions(
        running=options.max_concurrent,
        memory=options.memory,
        beside=options.prefix_bytes
        + (2 * options.adapter_memory if options.adaptable else 0)
        + (draft.weight_bytes if draft else 0),
    )
    try:
        if ranks is None:
            engine = Engine(of.model, of.tokenizer, limits, prefix, draft=draft)
        else:
            lead = partial(Leading, world=ranks.world, loss=ranks.loss)
            engine = Engine(of.model, of.tokenizer, limits, prefix, lead)
            ranks.loss.engine = engine
        key = of.key or Key("")
        engine.adapters = _adapters(of.model, of.base, key, engine.make_caches, options)
    except BaseException:
        prefix.close()
        raise
    models = Models(
        name=options.name or of.name,
        created=int(time.time()),
        context=engine.context,
        fingerprint=_fingerprint(of.key),
        aliases=options.aliases,
    )
    identity = of.key.model if of.key else ""
    return Opened(engine, of.tokenizer, models, identity, prefix, engine.adapters)


def _draft(options: Options, tokenizer: Any, alone: bool) -> DraftModel | None:
    """Raises SourceError, UsageError, ServeError."""
    if options.draft is None:
        return None
    if not alone:
        raise UsageError("--draft is for a model on one rank; leave it out")
    draft = DraftModel(*open_source(resolve(options.draft)))
    draft.check(tokenizer)
    return draft


def open_share(
    model: str | Path | tuple[nn.Module, Any],
    options: Options,
    *,
    kv: KVConfig | Path | str | None,
    revision: str | None,
    world: World,
) -> Ranked:
    """What another rank than 0 has of a model, measured as the engine does. Raises as `open_model`
    does."""
    of = _load(model, options, kv, revision, world)
    measured = measure(of.model, options.max_concurrent)
    sequences = Ranked(of.model, measured, _prefix_cache(of.key, options), world=world)
    sequences.agreed(measured.room(options.memory, options.prefix_bytes))
    return sequences


def _load(
    model: str | Path | tuple[nn.Module, Any],
    options: Options,
    kv: KVConfig | Path | str | None,
    revision: str | None,
    world: World | None,
) -> _Loaded:
    if world is not None and options.adaptable:
        raise UsageError(
            "adapters are not divided among ranks; leave --adapter and --admin-key-file out, or "
            "serve on one machine"
        )
    if isinstance(model, tuple):
        if any(given is not None for given in (kv, revision, options.expert_memory, world)):
            raise UsageError(
                "kv, revision, expert_memory and several ranks are for a model given by its name"
            )
        return _Loaded(*model)
    source = resolve(str(model), revision=revision)
    loaded, tokenizer = open_source(source, kv=kv, expert_memory=options.expert_memory, ranks=world)
    config = digest(loaded) + ("float16" if halvable(loaded) else "")
    if world is not None:
        world.same({"model": source.fingerprint, "KV configuration": config})
        config += f" rank {world.rank} of {world.size}"
    key = Key(source.fingerprint, config=config)
    base = Base(source.name, source.fingerprint)
    return _Loaded(loaded, tokenizer, _name(str(model), source.kind), key, base)


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


def _prefix_cache(key: Key | None, options: Options) -> PrefixCache:
    nbytes = options.prefix_bytes // 2 if options.adaptable else options.prefix_bytes
    if options.prefix_cache is None:
        return PrefixCache(key or Key(""), nbytes)
    if key is None:
        raise UsageError("a prefix cache on disk is for a model given by its name")
    return PrefixCache(key, nbytes, options.prefix_cache, options.prefix_cache_bytes)
