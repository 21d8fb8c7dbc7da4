"""The caches of a model: what they hold, and quantized ones in their place."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from ..errors import KVError
from ..models.blocks import cache_readers, latent_rank
from ..nn.layers import Adopting
from ..sources import Source
from ..sources.folder import TOKENIZER_FILES
from .caches import records
from .config import UNKNOWN, Entry, Identity, KVConfig, is_widths
from .records import Layout


def entries(model: nn.Module) -> tuple[Entry, ...]:
    """The caches of an mlx-lm model, all formats DENSE.

    Shapes come from a graph of one token that is not evaluated.
    """
    caches = _stock_caches(model)
    model(mx.array([[0]]), cache=caches)
    readers = cache_readers(model, len(caches))
    found = []
    for cache, layers in zip(caches, readers, strict=True):
        if type(cache) not in (KVCache, RotatingKVCache) or cache.keys is None:
            found.append(Entry(layers, "recurrent"))
            continue
        heads, k_dim, v_dim = cache.keys.shape[1], cache.keys.shape[3], cache.values.shape[3]
        kind, window = "full", 0
        if isinstance(cache, RotatingKVCache):
            kind, window = "sliding", cache.max_size
        elif heads == 1 and latent_rank(model, layers) == k_dim:
            kind = "mla"
        found.append(Entry(layers, kind, kv_heads=heads, k_dim=k_dim, v_dim=v_dim, window=window))
    return tuple(found)


def make_cache(model: nn.Module, config: KVConfig) -> list[Any]:
    """What mlx-lm's `make_prompt_cache` gives, quantized where `config` says so.

    Raises KVError for another number of caches than `config` has.
    """
    caches = _stock_caches(model)
    if len(caches) != len(config.entries):
        raise KVError(
            f"this KV configuration has {len(config.entries)} caches and the model {len(caches)}; "
            "make one for this model with optiq kv"
        )
    for i, entry in enumerate(config.entries):
        exact = entry.kind == "full"
        if entry.quantized:
            sink, recent = (config.fp_sink, config.fp_recent) if exact else (0, 0)
            caches[i] = records(caches[i], Layout(entry.k, entry.v, sink, recent))
    return caches


def read(kv: KVConfig | Path | str, found: tuple[Entry, ...]) -> KVConfig:
    """The configuration for the caches `found`: itself, a file, or widths for all such as "8/4".

    Raises KVError or UsageError.
    """
    if isinstance(kv, KVConfig):
        return kv
    if isinstance(kv, str) and is_widths(kv):
        return KVConfig.uniform(found, kv)
    return KVConfig.load(kv, found)


def attach(model: nn.Module, kv: KVConfig | Path | str, identity: Identity = UNKNOWN) -> nn.Module:
    """The same model, but `make_prompt_cache` of it gives caches as `kv` says (see `read`).

    It shares all its layers with `model`. Raises KVError when the two do not fit together, the
    model's code needs other caches, or `kv` names another model than `identity`.
    """
    found = entries(model)
    config = read(kv, found)
    config.check(found, identity)
    cls = type(model)
    if not isinstance(model, WithCache):
        cls = type(cls.__name__, (WithCache, cls), {})
    made = cls.adopt(model)  # type: ignore[attr-defined]
    made.__dict__["kv_config"] = config
    try:
        made(mx.array([[0]]), cache=made.make_cache())  # a graph that is not evaluated
    except Exception as error:  # whatever a model file raises
        raise KVError(
            f"mlx-lm's {type(model).__module__} cannot run with quantized caches "
            f"({type(error).__name__}); leave --kv out"
        ) from error
    return made  # type: ignore[no-any-return]


def digest(model: nn.Module) -> str:
    """That of the configuration attached to a model, empty for none."""
    return model.kv_config.digest if isinstance(model, WithCache) else ""


def identity(source: Source) -> Identity:
    """What tells a model apart: its name, fingerprint, and the sha256 of its tokenizer's files."""
    digest = hashlib.sha256()
    for pattern in TOKENIZER_FILES:
        for file in sorted(source.path.glob(pattern)):
            digest.update(file.name.encode() + file.read_bytes())
    return Identity(source.name, source.fingerprint, digest.hexdigest())


class WithCache(Adopting):
    """Mixed into the class of a model."""

    kv_config: KVConfig

    def make_cache(self) -> list[Any]:
        return make_cache(self, self.kv_config)

    def stock_caches(self) -> list[Any]:
        inherited = getattr(super(), "make_cache", None)
        return inherited() if inherited else [KVCache() for _ in self.layers]


def _stock_caches(model: nn.Module) -> list[Any]:
    if isinstance(model, WithCache):
        return model.stock_caches()
    caches: list[Any] = make_prompt_cache(model)
    return caches
