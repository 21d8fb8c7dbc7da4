"""What a plan describes, in memory: one layer rounded, or all of a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from math import prod

import mlx.core as mx
import mlx.nn as nn

from ...base.modules import leaf_modules
from ...distributed.ranks import ALONE, World
from ...formats import DENSE, Format
from ...models.places import place_at
from ...nn.accelerate import accelerate, quantized
from ...planning.plan import Plan
from ...sources import LoadedModel, Source, load
from .weights import MINMAX, Rounding, round_weight, rounded


def render_layer(module: nn.Module, fmt: Format, rounding: Rounding, path: str) -> nn.Module:
    """The layer that `module` becomes when its weight is rounded exactly as it would be shipped.

    Raises SourceError naming `path` when the weight is not finite.
    """
    return quantized(module, *round_weight(module.weight, fmt, rounding, path), fmt)


def render_model(
    loaded: LoadedModel,
    plan: Plan,
    *,
    rounding: Rounding = MINMAX,
    blocks: bool = True,
    lazy: bool = False,
) -> nn.Module:
    """The model that `plan` describes, in memory: each weight is rounded and its source dropped.

    Takes over `loaded.model`, whose weights should still be lazy; `blocks` is that of `accelerate`.
    With `lazy` a weight is rounded when it is first used, and not checked.
    """
    leaves = leaf_modules(loaded.model)
    for planned in plan.modules:
        if planned.format != DENSE:
            path, fmt = planned.module.path, planned.format
            module = leaves.pop(path)
            if lazy:
                layer = quantized(module, *rounded(module.weight, fmt, rounding, path), fmt)
            else:
                layer = render_layer(module, fmt, rounding, path)
                mx.eval(layer.parameters())
            place_at(loaded.model, path).set(layer)
    for path, weight in rounding.norms.items():
        leaves[path].weight = weight
    accelerate(loaded.model, blocks=blocks, exact=False)
    return loaded.model


def rounded_together(
    source: Source, plans: Iterable[Plan], rounding: Rounding, world: World = ALONE
) -> Rounding:
    """`rounding` with the weights of `plans` in it, each rounded once; the ranks divide them.

    They are all in memory. Nothing is exchanged where all of them are fitted.
    """
    formats: dict[str, dict[Format, None]] = defaultdict(dict)
    sizes: dict[str, int] = {}
    for planned in chain.from_iterable(plan.modules for plan in plans):
        path, fmt = planned.module.path, planned.format
        if fmt != DENSE and (path, fmt) not in rounding.fitted:
            formats[path][fmt] = None
            sizes[path] = prod(planned.module.shape)
    if not formats:
        return rounding
    paths, model, own = list(formats), load(source).model, {}
    for n in world.share([sizes[path] * len(formats[path]) for path in paths]):
        place = place_at(model, paths[n])
        weight = place.get().weight
        own[n] = [round_weight(weight, fmt, rounding, paths[n]) for fmt in formats[paths[n]]]
        place.set(nn.Module())  # the dense weight is dropped here
    fitted = dict(rounding.fitted)
    for path, found in zip(paths, world.join(own), strict=True):
        for fmt, (codes, scales, biases) in zip(formats[path], found, strict=True):
            fitted[path, fmt] = codes, scales, biases
    return replace(rounding, fitted=fitted)
