"""How many of the budget's parameters each layer gets: ranks, under one sum for all.

The budget is what `rank` in every layer would take. A rank more in a layer costs in + out
parameters. Numbers in, numbers out: no model here.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import AdapterError, UsageError
from ..models.roles import Module
from .options import RANKS

MOST = 4  # times the uniform rank, for one layer

Gains = Mapping[str, Sequence[float]]  # by path: what the first rank is worth, the second, ...


def cost(module: Module) -> int:
    """Parameters of one rank."""
    return sum(module.shape)


def budget(modules: Sequence[Module], rank: int) -> int:
    """Parameters of all ranks together."""
    return rank * sum(map(cost, modules))


def uniform(modules: Sequence[Module], rank: int) -> dict[str, int]:
    return {m.path: min(rank, *m.shape) for m in modules}


def proportional(
    modules: Sequence[Module], rank: int, weights: Mapping[str, float]
) -> dict[str, int]:
    """Ranks in proportion to `weights`, at least 1, of the same sum of parameters as `uniform`."""
    total = sum(weights[m.path] * cost(m) for m in modules)
    factor = budget(modules, rank) / total
    exact = {m.path: max(1.0, factor * weights[m.path]) for m in modules}
    most = MOST * rank
    left = {m.path: [exact[m.path] - j for j in range(most)] for m in modules}
    return _filled(modules, rank, left)


def by_gain(modules: Sequence[Module], rank: int, gains: Gains) -> dict[str, int]:
    """Water-filling: the rank of the largest gain for each parameter it costs, again and again.

    The gains of a layer must not rise. No layer gets more than 4 times the uniform rank.
    """
    per_cost = {m.path: [g / cost(m) for g in gains[m.path][: MOST * rank]] for m in modules}
    return _filled(modules, rank, per_cost)


def _filled(modules: Sequence[Module], rank: int, values: Gains) -> dict[str, int]:
    """The ranks of largest value that the budget has room for."""
    left = budget(modules, rank)
    ranks = {m.path: 0 for m in modules}
    queue = [(-values[m.path][0], i) for i, m in enumerate(modules) if values[m.path]]
    heapq.heapify(queue)
    while queue:
        _, i = heapq.heappop(queue)
        module = modules[i]
        if cost(module) > left:
            continue
        left -= cost(module)
        ranks[module.path] += 1
        had = ranks[module.path]
        if had < min(len(values[module.path]), *module.shape):
            heapq.heappush(queue, (-values[module.path][had], i))
    return {path: found for path, found in ranks.items() if found}


def combined(parts: Sequence[Gains]) -> dict[str, list[float]]:
    """Gains of several kinds, each as a share of its own sum, added up rank by rank."""
    sums = [sum(sum(g) for g in part.values()) or 1.0 for part in parts]
    paths = dict.fromkeys(path for part in parts for path in part)
    found = {}
    for path in paths:
        longest = max(len(part.get(path, ())) for part in parts)
        found[path] = [
            sum(
                part[path][j] / total
                for part, total in zip(parts, sums, strict=True)
                if j < len(part.get(path, ()))
            )
            for j in range(longest)
        ]
    return found


def from_file(file: Path, modules: Sequence[Module]) -> dict[str, int]:
    """Ranks by path of the layer, from a JSON object. Raises AdapterError."""
    try:
        data = json.loads(file.expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"--ranks {file} is not one of {', '.join(RANKS)} and cannot be read as JSON ({error})"
        ) from error
    known = {m.path: m for m in modules}
    if not isinstance(data, dict) or not data:
        raise AdapterError(f'{file} is not a JSON object like {{"model.layers.0...": 8}}')
    for path, rank in data.items():
        if path not in known:
            raise AdapterError(f"{file} names {path}, which is not a layer that can be adapted")
        most = min(known[path].shape)
        if type(rank) is not int or not 0 <= rank <= most:
            raise AdapterError(f"{file} gives {path} the rank {rank!r}; give 0 to {most}")
    return {path: rank for path, rank in data.items() if rank}
