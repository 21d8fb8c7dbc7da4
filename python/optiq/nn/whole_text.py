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


def rerouted(call: FunctionType, attention: Callable[..., mx.array]) -> FunctionType:
    """The same code, for which `scaled_dot_product_attention` is `attention`."""
    names = {**call.__globals__, ATTENTION: attention}
    made = FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)
    made.__kwdefaults__ = call.__kwdefaults__
    return made


def _class_of(cls: type[nn.Module], call: Any) -> type[nn.Module]:
    if cls not in _classes:
        body = {"__call__": rerouted(call, _attend)}
        _classes[cls] = type(f"WholeText{cls.__name__}", (WholeText, cls), body)
    return _classes[cls]


def _attend(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> mx.array:
    if cache is None and isinstance(mask, str) and queries.shape[2] == keys.shape[2]:
        return ops.causal_attention(queries, keys, values, scale=scale, sinks=sinks)
    y: mx.array = STOCK(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
    return y
