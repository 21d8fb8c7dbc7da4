"""Attention over a whole text by our op, with a native gradient, in blocks that run layer by layer.

An attention module of mlx-lm calls `scaled_dot_product_attention`, a name of its model file. A
module that is swapped runs the same code, in which this name is ours. mlx-lm and the module's class
stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base

from .. import ops
from ..models.places import place_at
from ..ops import native
from .layers import Adopting

ATTENTION = "scaled_dot_product_attention"
STOCK = base.scaled_dot_product_attention

_classes: dict[type[nn.Module], type[nn.Module]] = {}


class WholeText(Adopting):
    """Mixed into the class of an attention module; `__call__` is its code with another name."""


def attend_whole_texts(model: nn.Module) -> None:
    """Let attention without a cache, over all tokens before, be native, in place."""
    if not native.active():
        return
    for path, module in model.named_modules():
        call = type(module).__call__
        if isinstance(module, WholeText) or attention_of(call) is not STOCK:
            continue
        place_at(model, path).set(_class_of(type(module), call).adopt(module))  # type: ignore[attr-defined]


def attention_of(call: Any) -> Any:
    """What the code of `call` has under the name of attention; None if it does not call it."""
    if isinstance(call, FunctionType) and ATTENTION in call.__code__.co_names:
        return call.__globals__.get(ATTENTION)  # some files call an attribute of that name
    return None


def rerouted(call: Any, own: Callable[..., mx.array | None]) -> FunctionType:
    """The same code, whose `scaled_dot_product_attention` is `own`, and where that gives None the
    one that it has."""
    stock = attention_of(call)

    def attend(
        queries: mx.array,
        keys: Any,
        values: Any,
        cache: Any,
        scale: float,
        mask: Any,
        sinks: mx.array | None = None,
    ) -> mx.array:
        y: mx.array | None = own(queries, keys, values, cache, scale, mask, sinks)
        if y is None:
            y = stock(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
        return y

    names = {**call.__globals__, ATTENTION: attend}
    made = FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)
    made.__kwdefaults__ = call.__kwdefaults__
    return made


def _class_of(cls: type[nn.Module], call: Any) -> type[nn.Module]:
    if cls not in _classes:
        body = {"__call__": rerouted(call, _attend)}
        _classes[cls] = type(f"WholeText{cls.__name__}", (WholeText, cls), body)
    return _classes[cls]


def _attend(
    q: mx.array, k: Any, v: Any, cache: Any, scale: float, mask: Any, sinks: mx.array | None
) -> mx.array | None:
    if cache is None and isinstance(mask, str) and q.shape[2] == k.shape[2]:
        return ops.causal_attention(q, k, v, scale=scale, sinks=sinks)
    return None
