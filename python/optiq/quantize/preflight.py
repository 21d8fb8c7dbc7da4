"""What can be found wrong before hours of measuring: the target, the budget, the space, weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import BudgetError, SensitivityError, UsageError
from ..formats import Format
from ..models.roles import allowed, quantizable
from ..planning.plan import uniform_plan
from ..planning.scores import read
from ..planning.size import parse_size
from ..sources import LoadedModel, Source, check_finite


def check_unfinished(checkpoint: Path, resume: bool) -> None:
    """Raise UsageError rather than overwrite what an interrupted measurement left."""
    from .sensitivity.checkpoint import existing

    files = existing(checkpoint)
    if files and not resume:
        raise UsageError(
            f"{files[0]} holds an unfinished measurement; add --resume to go on with it, or "
            "delete it"
        )


def check_replaceable(path: Path) -> None:
    """Raise UsageError unless `path` does not exist or holds scores, which may be replaced."""
    if not path.exists() and not path.is_symlink():
        return
    try:
        if not path.is_file():
            raise UsageError(f"{path} is no plain file; name a new file, such as scores.json")
        read(path)
    except SensitivityError as error:
        raise UsageError(f"{path} exists and holds no scores; name another file") from error


def check_budget(source: Source, loaded: LoadedModel, size: str, menu: Sequence[Format]) -> int:
    """Raise BudgetError if no plan is small enough; returns the bytes to expect of the best."""
    from .sensitivity.measure import describe_model

    modules = quantizable(loaded.model)
    model = describe_model(source, loaded, modules)
    uniform4 = uniform_plan(modules, model)
    params = round(8 * uniform4.nbytes / uniform4.bpw)
    header: int = model["header_bytes"]
    budget = parse_size(size, params=params, uniform4=uniform4.nbytes, header=header)
    sizes = [[f.nbytes(m.shape, model["itemsize"]) for f in allowed(m, menu)] for m in modules]
    fixed: int = model["fixed_bytes"]
    least = fixed + sum(map(min, sizes))
    if budget < least:
        raise BudgetError(
            f"--size {size} is {budget:,} bytes, but the smallest possible with these formats is "
            f"{least:,} bytes ({8 * least / params:.2f} bits per weight); raise --size or add "
            "narrower --formats (embeddings and heads take 4 bits or more, routers 8)"
        )
    return min(budget, fixed + sum(map(max, sizes)))


def check_weights(source: Source) -> None:
    """Raise SourceError naming a weight that is not finite; they are read one after the other."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.utils import load_model

    model, _ = load_model(source.path, lazy=True)
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    model.update(tree_map(lambda _: mx.array([]), model.parameters()))  # it would keep them
    while weights:
        check_finite(*weights.popitem())
    mx.clear_cache()
