"""Caches of a prompt in a file, for prompts that begin with the same tokens.

A file belongs to what its contents depend on: the model, an adapter, the KV configuration and the
tokens. mlx-lm's `load_prompt_cache` makes caches of its own classes alone, so the caches here are
those that the model makes, filled with what the file holds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import (
    CacheList,
    can_trim_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)

from ..base.files import whole
from ..errors import KVError
from ..ops.attention import Exact
from .records import Layout, Records, Vector

_TUPLES: dict[str, type] = {"Exact": Exact, "Vector": Vector, "tuple": tuple, "list": list}
_SCALARS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Key:
    """sha256 of the model (its fingerprint), of an adapter and of a KV configuration, if any."""

    model: str
    adapter: str = ""
    config: str = ""


class PrefixFile:
    """The file of one conversation: what it holds of a prompt is not read again."""

    def __init__(self, path: Path, key: Key) -> None:
        self.path, self.key = path, key
        self.reused = 0  # tokens of the prompt

    def start(self, model: nn.Module, tokens: Sequence[int]) -> list[Any]:
        """Caches of the first `reused` tokens, always fewer than all. Raises KVError."""
        caches: list[Any] = make_prompt_cache(model)
        self.reused = 0
        if self.path.exists():
            self.reused = keep_common(caches, load(self.path, caches, self.key), tokens)
        return caches if self.reused else make_prompt_cache(model)

    def store(self, caches: Sequence[Any], tokens: Sequence[int]) -> None:
        save(self.path, caches, tokens, self.key)


def save(path: str | Path, caches: Sequence[Any], tokens: Sequence[int], key: Key) -> None:
    """Write the caches of `tokens`, whole or not at all. Raises KVError, OSError."""
    path = Path(path)
    arrays = {"tokens": mx.array(list(tokens), dtype=mx.int32)}
    described = [_describe(cache, f"{i}", arrays) for i, cache in enumerate(caches)]
    header = {"format": "optiq.prefix", "version": 1, "key": vars(key), "caches": described}
    with whole(path) as (partial,), partial.open("wb") as file:  # a path would need MLX's suffix
        mx.save_safetensors(file, arrays, {"optiq": json.dumps(header)})


def load(path: str | Path, caches: Sequence[Any], key: Key) -> list[int]:
    """Fill the empty `caches` of a model from a file; returns the tokens they then hold.

    Raises KVError for a file that is damaged, or was made with another key.
    """
    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        arrays, metadata = loaded
        header = json.loads(metadata["optiq"])
        if (header["format"], header["version"]) != ("optiq.prefix", 1):
            raise ValueError("another format or version")
        other = Key(**header["key"])
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise KVError(f"{path} is no prompt cache of optiq ({_line(error)}); delete it") from error
    for name, what in (("model", "model"), ("adapter", "adapter"), ("config", "KV configuration")):
        if getattr(other, name) != getattr(key, name):
            raise KVError(f"{path} was made with another {what}; name another file or delete it")
    try:
        tokens: list[int] = arrays["tokens"].tolist()
        for cache, described in zip(caches, header["caches"], strict=True):
            _restore(cache, described, arrays)
            if getattr(cache, "offset", len(tokens)) != len(tokens):
                raise ValueError(f"{len(tokens)} tokens, but a cache of {cache.offset}")
            if isinstance(cache, Records) and tokens:
                cache.plain()  # raises for records of another length
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise KVError(f"{path} is damaged ({_line(error)}); delete it") from error
    return tokens


def keep_common(caches: Sequence[Any], held: Sequence[int], tokens: Sequence[int]) -> int:
    """Trim caches of `held` to what `tokens` begins with, leaving at least its last to be read.

    Returns how many tokens that is; 0 where caches that cannot be trimmed (states, windows that
    turned over) hold anything else, which then are of no use.
    """
    common = 0
    for a, b in zip(held, tokens[:-1], strict=False):
        if a != b:
            break
        common += 1
    surplus = len(held) - common
    if surplus and not can_trim_prompt_cache(caches):
        return 0
    if surplus:
        trim_prompt_cache(caches, surplus)
    return common


def _describe(value: Any, name: str, arrays: dict[str, mx.array]) -> Any:
    """`value` as JSON that refers to `arrays`, which get what is in it."""
    if isinstance(value, _SCALARS):
        return value
    if isinstance(value, mx.array):
        arrays[name] = value
        return {"array": name}
    if (kind := type(value).__name__) in _TUPLES and isinstance(value, list | tuple):
        items = [_describe(v, f"{name}.{i}", arrays) for i, v in enumerate(value)]
        return {"kind": kind, "items": items}
    if (
        hasattr(value, "update_and_fetch")
        or hasattr(value, "make_mask")
        or hasattr(value, "nbytes")
    ):
        inside = {
            k: _describe(v, f"{name}.{k}", arrays)
            for k, v in vars(value).items()
            if not isinstance(v, Layout)  # that of the configuration
        }
        return {"cache": kind, "holds": inside}
    raise KVError(f"a {type(value).__name__} cannot be saved as part of a prompt cache")


def _restore(cache: Any, described: Any, arrays: dict[str, mx.array]) -> None:
    if described["cache"] != type(cache).__name__:
        raise ValueError(f"a {described['cache']} for a {type(cache).__name__}")
    if isinstance(cache, CacheList):
        for inner, its in zip(cache.caches, described["holds"]["caches"]["items"], strict=True):
            _restore(inner, its, arrays)
        return
    for name, value in described["holds"].items():
        if not hasattr(cache, name):
            raise ValueError(f"{type(cache).__name__} has no {name}")
        setattr(cache, name, _value(value, arrays))


def _value(described: Any, arrays: dict[str, mx.array]) -> Any:
    if not isinstance(described, dict):
        return described
    if "array" in described:
        return arrays[described["array"]]
    items = [_value(item, arrays) for item in described["items"]]
    kind = _TUPLES[described["kind"]]
    return kind(*items) if kind in (Exact, Vector) else kind(items)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
