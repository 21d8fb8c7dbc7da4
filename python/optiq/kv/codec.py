"""What a cache holds as JSON that refers to arrays, and a cache filled from it again.

mlx-lm's `load_prompt_cache` makes caches of its own classes alone, so what is read here goes into
caches that the model made.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList

from ..errors import KVError
from ..ops.attention import Exact
from .records import Layout, Vector

Arrays = dict[str, mx.array]

_TUPLES: dict[str, type] = {"Exact": Exact, "Vector": Vector, "tuple": tuple, "list": list}
_SCALARS = (bool, int, float, str, type(None))


def describe(value: Any, name: str, arrays: Arrays, without: Collection[str] = ()) -> Any:
    """`value` as JSON that refers to `arrays`, which get what is in it under names from `name` on.

    Of a cache, attributes in `without` are left out. Raises KVError for what JSON has no form for.
    """
    if isinstance(value, _SCALARS):
        return value
    if isinstance(value, mx.array):
        arrays[name] = value
        return {"array": name}
    if (kind := type(value).__name__) in _TUPLES and isinstance(value, list | tuple):
        items = [describe(v, f"{name}.{i}", arrays) for i, v in enumerate(value)]
        return {"kind": kind, "items": items}
    if (
        hasattr(value, "update_and_fetch")
        or hasattr(value, "make_mask")
        or hasattr(value, "nbytes")
    ):
        inside = {
            k: describe(v, f"{name}.{k}", arrays)
            for k, v in vars(value).items()
            if k not in without and not isinstance(v, Layout)  # that of the configuration
        }
        return {"cache": kind, "holds": inside}
    raise KVError(f"a {type(value).__name__} cannot be saved as part of a prompt cache")


def restore(cache: Any, described: Any, arrays: Arrays) -> None:
    """Fill `cache`. Raises KeyError, TypeError, ValueError or AttributeError for anything else."""
    if described["cache"] != type(cache).__name__:
        raise ValueError(f"a {described['cache']} for a {type(cache).__name__}")
    if isinstance(cache, CacheList):
        for inner, its in zip(cache.caches, described["holds"]["caches"]["items"], strict=True):
            restore(inner, its, arrays)
        return
    for name, value in described["holds"].items():
        if not hasattr(cache, name):
            raise ValueError(f"{type(cache).__name__} has no {name}")
        setattr(cache, name, read(value, arrays))


def read(described: Any, arrays: Arrays) -> Any:
    """The value that `describe` was given, unless it was a cache."""
    if not isinstance(described, dict):
        return described
    if "array" in described:
        return arrays[described["array"]]
    items = [read(item, arrays) for item in described["items"]]
    kind = _TUPLES[described["kind"]]
    return kind(*items) if kind in (Exact, Vector) else kind(items)
