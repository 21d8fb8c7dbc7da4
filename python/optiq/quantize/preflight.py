"""What can be found wrong before hours of measuring: the target, the budget, the space, weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from ..errors import BudgetError, SensitivityError, UsageError
from ..formats import Format
from ..models.roles import allowed, quantizable
from ..planning.files import read_scores
from ..planning.plan import parameters, uniform_plan
from ..planning.size import Size
from ..sources import LoadedModel, Source, check_finite, open_model
from .describe import describe_model


def check_replaceable(path: Path) -> None:
    """Raise UsageError unless `path` does not exist or holds scores, which may be replaced."""
    if not path.exists() and not path.is_symlink():
        return
    try:
        if not path.is_file():
            raise UsageError(f"{path} is not a regular file; name a new file, such as scores.json")
        read_scores(path)
    except SensitivityError as error:
        raise UsageError(f"{path} exists and holds no scores; name another file") from error


def check_budget(loaded: LoadedModel, size: Size, menu: Sequence[Format]) -> int:
    """Raise BudgetError if no plan is small enough; returns the bytes to expect of the best."""
    modules = quantizable(loaded.model)
    model = describe_model(loaded, modules)
    params = parameters(model, modules)
    budget = size.budget(
        params=params,
        uniform4=uniform_plan(model, modules).nbytes,
        header=model.header_bytes,
    )
    sizes = [[f.nbytes(m.shape, model.itemsize) for f in allowed(m, menu)] for m in modules]
    least = model.fixed_bytes + sum(map(min, sizes))
    if budget < least:
        raise BudgetError(
            f"--size {size} is {budget:,} bytes, but the smallest possible with these formats is "
            f"{least:,} bytes ({8 * least / params:.2f} bits per weight); raise --size or add "
            "narrower --formats (embeddings and heads take 4 bits or more, routers 8)"
        )
    return min(budget, model.fixed_bytes + sum(map(max, sizes)))


def check_weights(source: Source) -> None:
    """Raise SourceError naming a weight that is not finite; they are read one after the other."""
    model, _ = open_model(source)
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    model.update(tree_map(lambda _: mx.array([]), model.parameters()))  # it would keep them
    while weights:
        check_finite(*weights.popitem())
    mx.clear_cache()
