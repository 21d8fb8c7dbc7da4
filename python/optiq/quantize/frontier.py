"""Size against KL: what optiq would ship at several sizes, uniform widths, mlx-lm's recipes.

    frontier("Qwen/Qwen3-0.6B", "out", sizes=("4bpw", "uniform4"))

All models are measured on the same held-out text, one after the other beside the source. Those
that are finished lie in `OUT.optiq-work` until the files are written, as do the scores.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.nn as nn

from ..base.checkpoint import Identity, check_unfinished
from ..base.command import command_line
from ..base.files import check_writable
from ..base.machine import machine, versions
from ..base.memory import Needs, available_memory
from ..base.progress import Progress, silenced, tell
from ..calibration import token_hash
from ..distributed.ranks import World, world
from ..errors import BudgetError, OptiqError, UsageError
from ..formats import Format
from ..models import stock
from ..models.shapes import blocks_of, dense_bytes, embedding_shape, widest_block
from ..models.size import ModelSize, model_size
from ..nn.accelerate import accelerate
from ..planning.pareto import Frontier, Point, ScoresInfo, SelectionInfo, compare
from ..planning.plan import build
from ..planning.size import Size
from ..quality import divergence
from ..quality.results import Measured
from ..sources import load, resolve
from .frontier_files import JSON, Finished, check_replaceable, write
from .options import Options
from .preflight import check_budget, with_towers
from .prepare import CHECKPOINT, Prepared, given, prepare, remove_work, texts_of, work_folder
from .rounding.descent import TAPE_BYTES
from .rounding.render import render_model
from .select import summary_of_all
from .sensitivity.checkpoint import existing

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import OptionFields

SIZES = ("3.5bpw", "4bpw", "uniform4", "5bpw", "6bpw")
POINTS = "frontier.checkpoint.json"


@dataclass(frozen=True)
class Made:
    """A model to measure, its size, and where it comes from (see `Point`)."""

    model: nn.Module
    size: ModelSize
    asked: str | None = None
    chosen: str | None = None
    rounding: str | None = "minmax"


@dataclass(frozen=True)
class Candidate:
    """A model that can be made when its turn comes."""

    name: str
    family: str
    make: Callable[[], Made]


def frontier(
    model: str | Path,
    out: str | Path,
    *,
    sizes: Sequence[str | int] = SIZES,
    **options: Unpack[OptionFields],
) -> Frontier:
    """Measure the frontier of `model`; write frontier.json and frontier.html into the folder `out`.

    `sizes` are those of ours, `options` the fields of `Options`. One size after the other is
    planned and rounded as `convert` with the same scores would; what is too small for the menu, and
    a recipe that does not know the model, is left out with a note. Scores measured for the purpose
    are kept as `out`/sensitivity.json. With `resume`, what an interrupted run has measured is used.

    The processes that `mlx.launch` starts share the work; each returns the same, and rank 0 writes.
    Returns the content of frontier.json. Raises an OptiqError; then `out` is as it was.
    """
    with world() as ranks:
        return frontier_together(ranks, model, out, sizes, **options)


def frontier_together(
    ranks: World,
    model: str | Path,
    out: str | Path,
    sizes: Sequence[str | int],
    **options: Unpack[OptionFields],
) -> Frontier:
    """`frontier` on these ranks."""
    with silenced(ranks.rank != 0):
        return _frontier(ranks, str(model), Path(out), sizes, **options)


def _frontier(
    ranks: World,
    model: str,
    out: Path,
    sizes: Sequence[str | int],
    **options: Unpack[OptionFields],
) -> Frontier:
    chosen = Options.parse(**options)
    chosen.check_no_memory("frontier")
    out = out.expanduser().resolve()
    work = work_folder(out)
    wanted = list(dict.fromkeys(Size.parse(str(size).strip()) for size in sizes))
    if not wanted:
        raise UsageError("there is no size to measure; write for example --sizes 4bpw,uniform4")
    measured_here = chosen.scores is None
    if ranks.rank == 0:
        check_replaceable(out, scores=measured_here, overwrite=chosen.overwrite)
        check_writable(out / JSON)
    left = [work / POINTS, *(existing(work / CHECKPOINT) if measured_here else ())]
    check_unfinished(left, resume=chosen.resume, restart=chosen.restart)
    ranks.gather(None)  # nobody writes before all have looked
    source = with_towers(resolve(model, revision=chosen.revision), chosen.towers)
    loaded = load(source)
    texts = texts_of(chosen, loaded.tokenizer)
    notes: list[str] = []
    if measured_here:
        wanted = _fitting(wanted, partial(check_budget, loaded, menu=chosen.menu), notes)
    ready = prepare(loaded, texts, work, chosen, given(chosen, loaded), world=ranks)
    del loaded
    wanted = _fitting(wanted, partial(build, ready.scores, menu=chosen.formats), notes)
    _check_memory(ready, wanted)
    identity = _identity(ready)
    ranks.same({**identity, "sizes": [size.text for size in wanted]})
    finished = Finished(work / POINTS, identity, resume=chosen.resume, world=ranks)
    points = compare(list(_measure(ready, wanted, finished, notes)))
    result = _described(ready, wanted, notes, points)
    if ranks.rank == 0:
        write(result, ready.scores if measured_here else None, out)
    ranks.gather(None)  # nobody forgets before the result is safe
    remove_work(work, POINTS)
    return result


def _fitting(
    sizes: Sequence[Size], check: Callable[[Size], object], notes: list[str]
) -> list[Size]:
    """The sizes that `check` finds large enough; BudgetError where there is none."""
    kept: list[Size] = []
    refusal = BudgetError("there is no size to measure")
    for size in sizes:
        try:
            check(size)
            kept.append(size)
        except BudgetError as error:
            refusal = error
            notes.append(f"optiq {size} is left out: {error}")
    if not kept:
        raise refusal
    return kept


def _measure(
    ready: Prepared, sizes: Sequence[Size], finished: Finished, notes: list[str]
) -> Iterator[Point]:
    """The points of all candidates, those that are finished from the checkpoint."""
    candidates = list(_candidates(ready, sizes))
    done = sum(candidate.name in finished.points for candidate in candidates)
    with Progress(
        len(candidates), "measuring models", done=done, enabled=ready.options.progress
    ) as progress:
        for candidate in candidates:
            if candidate.name not in finished.points:
                try:
                    finished.add(_point(ready, candidate))
                except UsageError as error:  # a recipe for other kinds of models
                    if candidate.family != "recipe":
                        raise
                    notes.append(f"{candidate.name} is left out: {error}")
                    continue
                progress.step(note=candidate.name)
            yield finished.points[candidate.name]


def _candidates(ready: Prepared, sizes: Sequence[Size]) -> Iterator[Candidate]:
    def theirs(**how: Any) -> Made:
        model = stock.quantize(load(ready.source), **how)
        return Made(model, model_size(model))

    def ours(size: Size) -> Made:
        plan, rounding = ready.best(size)
        model = render_model(load(ready.source), plan, rounding=rounding)
        assert plan.selection is not None
        selection = plan.selection
        nbytes = ModelSize(plan.nbytes, plan.bpw)
        return Made(model, nbytes, size.text, selection.chosen, selection.rounding)

    for bits in stock.UNIFORM_WIDTHS:
        yield Candidate(f"uniform {bits}-bit", "uniform", partial(theirs, bits=bits))
    for recipe in stock.recipes():
        yield Candidate(recipe, "recipe", partial(theirs, recipe=recipe))
    for size in sizes:
        yield Candidate(f"optiq {size}", "ours", partial(ours, size))


def _point(ready: Prepared, candidate: Candidate) -> Point:
    """The candidate, measured: beside it only the source is in memory. Ranks divide the text."""
    made = candidate.make()
    formats = Counter(
        str(Format(m.mode, m.bits, m.group_size))
        for m in made.model.modules()
        if hasattr(m, "bits")
    )
    reference = load(ready.source).model
    for one in (reference, made.model):
        accelerate(one, exact=False)
    name, sequences = candidate.name, ready.texts.held_out.sequences
    own = ready.world.share([len(s.tokens) for s in sequences])
    table = divergence.tables(reference, {name: made.model}, [sequences[i] for i in own])[name]
    found = summary_of_all(ready.world, own, table, sequences)
    return Point(
        name=name,
        family=candidate.family,
        measured=Measured.of(found, *made.size),
        asked=made.asked,
        chosen=made.chosen,
        rounding=made.rounding,
        formats=dict(sorted(formats.items())),
    )


def _check_memory(ready: Prepared, sizes: Sequence[Size]) -> None:
    """State what will be held together at most; OptiqError where two models do not fit."""
    needs, available = memory(ready, sizes), available_memory()
    tell(f"memory: {needs}", enabled=ready.options.progress)
    two = needs.parts["source"] + needs.parts["model"]
    if two > available:
        raise OptiqError(
            f"the source and a model of it take {two:,} bytes but only {available:,} are "
            "available; free memory, or use a machine with more"
        )


def memory(ready: Prepared, sizes: Sequence[Size]) -> Needs:
    """What is held together at most, from shapes alone."""
    scores, texts = ready.scores, ready.texts
    modules, itemsize = [s.module for s in scores.modules], scores.model.itemsize
    fixed, blocks = scores.model.fixed_bytes, blocks_of(modules)
    dense = fixed + dense_bytes(modules, itemsize)
    widest = Format("affine", max(stock.UNIFORM_WIDTHS), 64)
    stocks = fixed + sum(widest.nbytes(m.shape, itemsize) for m in modules)
    menu = ready.options.formats
    student = max(stocks, *(build(scores, size, menu).nbytes for size in sizes))
    vocabulary, width = embedding_shape(modules)
    sequences = [*texts.held_out.sequences, *texts.selection, *texts.calibration.sequences]
    longest = max(len(s.tokens) for s in sequences)
    rows = min(longest, max(1, divergence.LOGITS_BYTES // 4 // vocabulary))
    block = widest_block(modules)
    parts = {
        "source": dense,
        "model": student,
        "at work": 4 * (5 * rows * vocabulary + 3 * longest * (block + vocabulary)),
    }
    if ready.method == "descent":  # a second source runs, and a model is rounded first
        tokens = sum(len(s.tokens) for s in texts.calibration.sequences)
        tapes = 4 * tokens * width * (len(blocks) + 1)
        squares = sum(m.shape[-1] ** 2 for m in next(iter(blocks.values()), []))
        largest = max(dense_bytes([m], 1) for m in modules)
        parts["descent"] = (
            dense
            + student
            + min(TAPE_BYTES, tapes)
            + 4 * (2 * squares + 2 * tokens * block + 6 * largest)
        )
    return Needs(parts)


def _described(
    ready: Prepared, sizes: Sequence[Size], notes: Sequence[str], points: Sequence[Point]
) -> Frontier:
    scores, texts = ready.scores, ready.texts
    return Frontier(
        model=scores.model,
        sizes=tuple(size.text for size in sizes),
        notes=tuple(notes),
        scores=ScoresInfo(scores.method, scores.reference, scores.rounding),
        rounding=ready.method,
        calibration=scores.calibration,
        selection=SelectionInfo(
            tokens=sum(len(s.tokens) for s in texts.selection),
            text_sha256=token_hash(texts.selection) if texts.selection else None,
        ),
        points=tuple(points),
        seed=ready.options.seed,
        command=command_line(),
        versions=versions(),
        machine=machine(),
    )


def _identity(ready: Prepared) -> Identity:
    """What a finished point depends on beside its own name."""
    texts, formats = ready.texts, ready.options.formats
    modules = json.dumps([scored.to_json() for scored in ready.scores.modules], sort_keys=True)
    return {
        "model": ready.source.fingerprint,
        "scores": hashlib.sha256(modules.encode()).hexdigest(),
        "formats": formats and [str(fmt) for fmt in formats],
        "rounding": ready.method,
        "text": [token_hash(t) for t in (texts.calibration.sequences, texts.selection)],
        "held-out text": token_hash(texts.held_out.sequences),
        "seed": ready.options.seed,
        "versions": versions(),
    }
