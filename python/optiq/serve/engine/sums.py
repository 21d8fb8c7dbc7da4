"""Weighted sums of adapters, as requests name them: `one=0.5+two=0.25`."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite

from ...errors import RequestError

MOST = 100.0  # weight of an adapter in a sum

Weights = dict[str, float]  # by name; an adapter alone has the weight 1


def parse(text: str) -> Weights:
    """A name alone counts once. Raises RequestError."""
    return weights(part.partition("=")[::2] for part in text.split("+"))


def weights(parts: Iterable[tuple[str, str | float]]) -> Weights:
    """Names and numbers, in the order of the names; what counts nothing is left out."""
    found: Weights = {}
    for name, number in parts:
        try:
            weight = float(number) if number != "" else 1.0
        except ValueError:
            weight = float("nan")
        if not name or name in found or not (isfinite(weight) and abs(weight) <= MOST):
            raise RequestError(
                f"a sum of adapters has {name[:80]!r} with {str(number)[:20]!r}; name each once, "
                f"with a number from {-MOST:g} to {MOST:g}, such as one=0.5+two=0.25",
                "adapter",
            )
        found[name] = weight
    return {name: found[name] for name in sorted(found) if found[name]}


def written(parts: Weights) -> str:
    """The text that `parse` reads; empty for no adapters."""
    return "+".join(name if w == 1 else f"{name}={w!r}" for name, w in parts.items())
