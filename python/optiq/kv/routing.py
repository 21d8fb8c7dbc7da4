"""Attention that reads records, in models whose blocks run as mlx-lm wrote them.

An attention module of mlx-lm writes to its cache and then calls `scaled_dot_product_attention`, a
name of its model file. A routed module runs the same code with the same names but this one, which
lets the cache attend. mlx-lm and the module's class stay as they are.

Every module is first tried beside its original. One that does more with keys and values than pass
them on (latent attention, scores of its own) raises then, and goes on reading dequantized vectors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ..models.places import Wrapper, place_at
from ..nn.layers import Adopting
from ..nn.whole_text import attention_of, rerouted
from .records import Handle, handing

TRIAL = ((0, 1, 2, 3, 4), (5,), (6,))  # tokens: a prompt and two steps
_routed_classes: dict[type[nn.Module], type[nn.Module] | None] = {}


class Routed(Adopting):
    """Mixed into the class of an attention module; `rerouted` is its code with another name."""

    rerouted: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with handing():
            return self.rerouted(*args, **kwargs)


def route(model: nn.Module) -> dict[str, str]:
    """Route the attention of a model that makes caches of records (see `attach`), in place.

    Returns why modules were left as they are, by path.
    """
    taps = {
        path: Tap(module, made)
        for path, module in model.named_modules()
        if (made := routed(module)) is not None
    }
    places = {path: place_at(model, path) for path in taps}
    for path, tap in taps.items():
        places[path].set(tap)
    try:
        _run(model)
    finally:
        for path, tap in taps.items():
            places[path].set(tap.inner)
    left = {path: reason for path, tap in taps.items() if (reason := tap.disagreement())}
    chosen = {path: tap.routed for path, tap in taps.items() if path not in left}
    for path, module in chosen.items():
        places[path].set(module)
    try:
        _run(model)  # once more, as modules may hand each other what they read
    except Exception as error:
        for path in chosen:
            places[path].set(taps[path].inner)
        return left | dict.fromkeys(chosen, f"routed together they raise {type(error).__name__}")
    return left


def routed(module: nn.Module) -> nn.Module | None:
    """The routed module that has taken over what `module` holds; None if it calls no attention."""
    cls = type(module)
    if issubclass(cls, Routed):
        return None
    if cls not in _routed_classes:
        made = None
        if attention_of(cls.__call__) is not None:
            code = {"rerouted": rerouted(cls.__call__, _attend)}
            made = type(f"Routed{cls.__name__}", (Routed, cls), code)
        _routed_classes[cls] = made
    made = _routed_classes[cls]
    return None if made is None else made.adopt(module)  # type: ignore[attr-defined]


def _attend(
    q: mx.array, k: Any, v: Any, cache: Any, scale: float, mask: Any, sinks: mx.array | None
) -> mx.array | None:
    if not isinstance(k, Handle):
        return None
    of_one = isinstance(v, Handle) and v.cache is k.cache
    if not (of_one and k.of_keys and not v.of_keys):
        raise TypeError("keys and values are not those of one cache")
    y: mx.array = k.cache.attend(q, scale=scale, mask=mask, sinks=sinks)
    return y


class Tap(Wrapper):
    """An attention module that is called twice, the second time routed and with copied caches."""

    def __init__(self, inner: nn.Module, routed: nn.Module) -> None:
        super().__init__(inner)
        self.__dict__.update(routed=routed, pairs=[], raised="")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        again = copy.deepcopy((args, kwargs))
        expected = self.inner(*args, **kwargs)
        try:
            got = self.routed(*again[0], **again[1])
            self.pairs.append([y[0] if isinstance(y, tuple) else y for y in (expected, got)])
        except Exception as error:  # whatever a foreign module raises
            self.__dict__["raised"] = f"routed, it raises {type(error).__name__}"
        return expected

    def disagreement(self) -> str:
        if self.raised or not self.pairs:
            return self.raised or "its block does not call it"
        for expected, got in self.pairs:
            tolerance = max(2.0**-11, 4 * mx.finfo(expected.dtype).eps)
            error: Any = (mx.abs(got - expected).max() / mx.abs(expected).max()).item()
            if not error <= tolerance:  # or not a number
                return f"routed, it differs from the original by {error:.1e} of the largest value"
        return ""


def _run(model: nn.Module) -> None:
    """Build the graph of the trial."""
    caches = make_prompt_cache(model)
    for tokens in TRIAL:
        model(mx.array([tokens]), cache=caches)
