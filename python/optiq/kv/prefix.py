"""Caches of a prompt in a file, for prompts that begin with the same tokens.

A file belongs to what its contents depend on: the model, an adapter, the KV configuration and the
tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from ..base.files import whole
from ..base.text import one_line
from ..errors import KVError
from .codec import Arrays, describe, restore
from .records import Records


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
    arrays: Arrays = {"tokens": mx.array(list(tokens), dtype=mx.int32)}
    described = [describe(cache, f"{i}", arrays) for i, cache in enumerate(caches)]
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
        raise KVError(
            f"{path} is not a prompt cache of optiq ({one_line(error)}); delete it"
        ) from error
    for name, what in (("model", "model"), ("adapter", "adapter"), ("config", "KV configuration")):
        if getattr(other, name) != getattr(key, name):
            raise KVError(f"{path} was made with another {what}; name another file or delete it")
    try:
        tokens: list[int] = arrays["tokens"].tolist()
        for cache, described in zip(caches, header["caches"], strict=True):
            restore(cache, described, arrays)
            if getattr(cache, "offset", len(tokens)) != len(tokens):
                raise ValueError(f"{len(tokens)} tokens, but a cache of {cache.offset}")
            if isinstance(cache, Records) and tokens:
                cache.plain()  # raises for records of another length
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise KVError(f"{path} is damaged ({one_line(error)}); delete it") from error
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
