"""What can be found wrong before hours of measuring: target, budget, weights, the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from ..base.files import check_absent
from ..base.notice import notice
from ..base.progress import tell
from ..errors import BudgetError, SensitivityError, SourceError, UsageError
from ..formats import DENSE, Format
from ..models.places import Wrapper, place_at
from ..models.roles import Module, allowed, blocks, quantizable
from ..nn.replay import arrays
from ..planning.files import read_scores
from ..planning.plan import parameters, uniform_plan
from ..planning.size import Size
from ..runtime.loading import cannot_run, check_graph, first_run
from ..sources import LoadedModel, Source, check_finite, open_model
from ..sources.folder import mlx_lm_version
from .describe import describe_model
from .rounding.reference import choose, weight_bytes

# Tokens that a float16 model is run on: products of stock MLX in 16 bits are slow on the CPU.
OVERFLOW_TOKENS = 512


def with_towers(source: Source, choice: str) -> Source:
    """`source` with the towers that are to be exported; UsageError where that cannot be done."""
    towers = source.towers
    if choice == "drop":
        return replace(source, towers=None)
    if choice == "8bit":
        if towers is None:
            raise UsageError(
                f"{source.name} has no vision or audio weights; leave --towers 8bit out"
            )
        towers = towers.rounded()
    if towers and not towers.tensors:
        notice(
            f"the vision and audio weights of {source.name} are left out: mlx-lm would not load a "
            "folder that has them"
        )
    return replace(source, towers=towers if towers and towers.tensors else None)


def check_replaceable(path: Path, overwrite: bool) -> None:
    """Raise UsageError unless `path` does not exist, or holds scores and `overwrite` is set."""
    if not path.exists() and not path.is_symlink():
        return
    try:
        if not path.is_file():
            raise UsageError(f"{path} is not a regular file; name a new file, such as scores.json")
        read_scores(path)
    except SensitivityError as error:
        raise UsageError(f"{path} exists and holds no scores; name another file") from error
    check_absent(path, overwrite)


def budget_of(loaded: LoadedModel, size: Size) -> int:
    """The bytes of tensors that `size` stands for."""
    modules = quantizable(loaded.model)
    model = describe_model(loaded, modules)
    return size.budget(
        params=parameters(model, modules),
        uniform4=uniform_plan(model, modules).nbytes,
        beside=model.beside_bytes,
    )


def check_budget(loaded: LoadedModel, size: Size, menu: Sequence[Format]) -> int:
    """Raise BudgetError if no plan is small enough; returns the bytes to expect of the best."""
    modules = quantizable(loaded.model)
    model = describe_model(loaded, modules)
    params = parameters(model, modules)
    budget = budget_of(loaded, size)
    sizes = [[f.nbytes(m.shape, model.itemsize) for f in allowed(m, menu)] for m in modules]
    least = model.fixed_bytes + sum(map(min, sizes))
    if budget < least:
        raise BudgetError(
            f"--size {size} is {budget:,} bytes, but the smallest possible with these formats is "
            f"{least:,} bytes ({8 * least / params:.2f} bits per weight); raise --size or add "
            f"{_narrower(modules, menu)}"
        )
    most = model.fixed_bytes + sum(map(max, sizes))
    if budget >= most:
        tell(
            f"--size {size} is {budget:,} bytes and the model takes {most:,} in the widest "
            "formats, so it has them everywhere"
        )
    return min(budget, most)


def _narrower(modules: Sequence[Module], menu: Sequence[Format]) -> str:
    """The formats that a smaller model would take."""
    if undivided(modules, menu):
        return "4g32 to --formats (its rows do not divide into groups of 64)"
    return "narrower --formats (embeddings and heads take 3 bits or more, routers 8)"


def undivided(modules: Sequence[Module], menu: Sequence[Format]) -> int:
    """How many modules stay dense because their rows divide into groups of 32 but no larger."""
    return sum(
        allowed(m, menu) == (DENSE,) and Format("affine", 8, 32).fits(m.shape) for m in modules
    )


def check_runs(loaded: LoadedModel, sequences: Sequence[Sequence[int]]) -> None:
    """Raise SourceError unless mlx-lm itself runs the model; in float16, to finite numbers.

    Only float16 ends so early that a sound model leaves it. A model that does not fit the memory
    is not tried.
    """
    model, _ = open_model(loaded.source)  # of its own: a run may change weights (Gemma 3n)
    check_graph(model, loaded.source.name)
    try:
        fits = choose("auto", weight_bytes(model))[0] == "bf16"
        if loaded.dtype != mx.float16 or not fits:
            return
        where = _overflow(model, sequences)
    except Exception as error:  # whatever a model file raises
        raise cannot_run(loaded.source.name, error) from error
    if where:
        raise SourceError(
            f"{loaded.source.name} overflows float16 at {where}, where mlx-lm {mlx_lm_version()} "
            'gives infinite or NaN values; write "torch_dtype": "bfloat16" into its config.json'
        )


def _overflow(model: nn.Module, sequences: Sequence[Sequence[int]]) -> str:
    """The first layer or block that gives infinite values or NaN in the model's dtype, if any."""
    notes: list[tuple[str, mx.array]] = []
    paths = [*blocks(model), *(m.path for m in quantizable(model))]
    places = [(place_at(model, path), path) for path in paths]
    for place, path in places:
        place.set(_Watch(place.get(), path, notes))
    left = OVERFLOW_TOKENS
    try:
        for tokens in sequences:
            notes.clear()
            logits = first_run(model, tokens[:left])
            notes.append(("its logits", mx.all(logits < mx.inf)))
            mx.eval([finite for _, finite in notes])
            if wrong := [path for path, finite in notes if not finite.item()]:
                return wrong[0]
            left -= len(tokens)
            if left <= 0:
                break
    finally:
        for place, _ in places:
            place.set(place.get().inner)
    return ""


class _Watch(Wrapper):
    """Notes whether what `inner` returns is finite."""

    def __init__(self, inner: nn.Module, path: str, notes: list[tuple[str, mx.array]]) -> None:
        super().__init__(inner)
        self.__dict__.update(path=path, notes=notes)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(*args, **kwargs)
        self.notes.extend((self.path, mx.all(mx.isfinite(array))) for array in arrays(out))
        return out


def check_weights(source: Source) -> None:
    """Raise SourceError naming a weight that is not finite; they are read one after the other."""
    model, _ = open_model(source)
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    model.update(tree_map(lambda _: mx.array([]), model.parameters()))  # it would keep them
    while weights:
        check_finite(*weights.popitem())
    mx.clear_cache()
