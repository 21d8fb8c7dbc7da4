"""What plans of every size are made from: text, scores, and the rounding these were measured with.

`convert` ships one plan of them, `frontier` compares those of several sizes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..base.machine import versions
from ..base.progress import tell
from ..calibration import (
    CALIBRATION_TOKENS,
    HELD_OUT_TOKENS,
    Calibration,
    Texts,
    gather_texts,
)
from ..distributed.ranks import ALONE, World
from ..errors import SensitivityError
from ..models.roles import quantizable
from ..nn.accelerate import accelerate
from ..planning.files import read_scores
from ..planning.plan import Plan
from ..planning.proposals import propose
from ..planning.scores import Scores
from ..planning.size import Size
from ..sources import LoadedModel, Source, load
from .describe import describe_model
from .options import Options
from .preflight import check_runs, check_weights, undivided
from .rounding import importance
from .rounding.descent import descend
from .rounding.reference import in_passes, open_reference
from .rounding.weights import MINMAX, Rounding
from .select import Refine, decide
from .sensitivity.checkpoint import existing, saved_reference
from .sensitivity.measure import measure

CHECKPOINT = "sensitivity.checkpoint.json"
SCORES = "sensitivity.json"


@dataclass(frozen=True)
class Prepared:
    """A source with its scores; `rounding` is the one that they were measured with.

    In `options` what was left open is decided. With `folder` fitted weights are kept there, and not
    in memory. `world` are the ranks that share the work.
    """

    source: Source
    texts: Texts
    scores: Scores
    rounding: Rounding
    options: Options
    folder: Path | None = None
    world: World = ALONE

    @property
    def method(self) -> str:
        """How weights are rounded: "descent", "search" or "minmax"."""
        assert self.options.rounding is not None  # decided by now
        return self.options.rounding

    def best(
        self, size: Size, command: str = "", *, refine: Refine | None = None
    ) -> tuple[Plan, Rounding]:
        """The plan to ship at `size`, and how its weights are rounded: proposed, then measured.

        `refine` is that of `select.decide`. Raises as `plan.build` does.
        """
        options, text = self.options, self.texts.calibration
        plans = propose(self.scores, size, options.formats, seed=options.seed, command=command)
        fit: Callable[[Plan], Rounding] = partial(
            descend,
            self.source,
            text=text,
            rounding=self.rounding,
            reference=options.reference,
            together=options.together,
            folder=self.folder,
            seed=options.seed,
            progress=options.progress,
            world=self.world,
        )
        plan, rounding = decide(
            self.source,
            plans,
            self.rounding,
            self.texts.selection,
            fit if self.method == "descent" else None,
            refine=refine,
            progress=options.progress,
            world=self.world,
        )
        assert plan.selection is not None
        selection = replace(
            plan.selection,
            rounding_tokens=sum(len(s.tokens) for s in text.sequences),
            rounding_sha256=text.sha256,
        )
        return replace(plan, selection=selection), rounding


def prepare(
    loaded: LoadedModel,
    texts: Texts,
    work: Path,
    options: Options,
    known: Scores | None,
    *,
    unrounded: bool = False,
    folder: Path | None = None,
    world: World = ALONE,
) -> Prepared:
    """Take the scores that are `known`, or measure them with what is in `work` already.

    With `unrounded` known scores will only be planned from. `folder` and `world` are those of
    `Prepared`.
    `loaded` is used up by a measurement. Raises an OptiqError.
    """
    source = loaded.source
    if known is not None:
        found = known
        fitting = "descent" if known.rounding == "search" else known.rounding
        options = replace(options, rounding=options.rounding or fitting)
        how = MINMAX
        if not unrounded:
            check_weights(source)
            how = choose_rounding(source, metered(texts, options), options, world)
    else:
        if options.resume and options.reference == "auto":  # free memory may have changed since
            kept = filter(None, world.gather(saved_reference(work / CHECKPOINT)))
            options = replace(options, reference=next(kept, options.reference))
        check_weights(source)
        check_runs(loaded, [s.tokens for s in texts.scoring.sequences])
        if narrow := undivided(quantizable(loaded.model), options.menu):
            tell(
                f"{narrow} modules stay unquantized: their rows do not divide into groups "
                "of 64; add for example 4g32 to --formats",
                enabled=options.progress,
            )
        options = replace(options, rounding=options.rounding or "descent")
        how = choose_rounding(source, metered(texts, options), options, world)
        checkpoint = work / CHECKPOINT
        found = measure(
            loaded, texts.scoring, options, rounding=how, checkpoint=checkpoint, world=world
        )
        if world.rank == 0:
            found.save(work / SCORES)
    return Prepared(source, texts, found, how, options, folder, world)


def texts_of(options: Options, tokenizer: Any) -> Texts:
    """The texts that `options` ask for; raises CalibrationError for too few."""
    found = gather_texts(
        tokenizer,
        options.calibration,
        options.seed,
        options.tokens or CALIBRATION_TOKENS,
        options.held_out_tokens or HELD_OUT_TOKENS,
    )
    return replace(found, selection=[]) if options.effort == "quick" else found


def metered(texts: Texts, options: Options) -> Calibration:
    """The text that gives the importance of columns: all of it where weights are rounded by that
    alone, and otherwise as much as gives the scores.
    """
    return texts.calibration if options.rounding == "search" else texts.scoring


def choose_rounding(
    source: Source, text: Calibration, options: Options, world: World = ALONE
) -> Rounding:
    """The rounding that scores are measured with: min/max, or else the search.

    For it the importance of all columns is measured, on the model that scores are measured in: the
    source's, or that in 4 bits. The ranks of `world` share the work.

    Raises DistributedError for ranks of different jobs.
    """
    world.same(
        {
            "model": source.fingerprint,
            "calibration": text.sha256,
            "rounding": options.rounding,
            "reference": options.reference,
            "seed": options.seed,
            "versions": versions(),
        }
    )
    if options.rounding == "minmax":
        return MINMAX
    model = load(source).model
    modules = quantizable(model)
    accelerate(model, blocks=False, exact=False)  # each layer is metered
    running = open_reference(in_passes(options.reference), source, model, modules, MINMAX)
    sequences = [sample.tokens for sample in text.sequences]
    columns = importance.column_squares(
        model, modules, sequences, drop=running.drop, progress=options.progress, world=world
    )
    return Rounding("search", columns)


def work_folder(out: Path) -> Path:
    """Where scores lie until the absolute `out` is complete."""
    return out.parent / f"{out.name}.optiq-work"


def remove_work(work: Path, *others: str) -> None:
    """Remove the scores and `others` of ours; anything else in the folder is somebody's."""
    for file in (*existing(work / CHECKPOINT), *(work / name for name in (SCORES, *others))):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        work.rmdir()


def given(options: Options, loaded: LoadedModel) -> Scores | None:
    """The scores of the file that `options` name, if any; raises SensitivityError unless they are
    those of this model.
    """
    path = options.scores
    if path is None:
        return None
    modules = quantizable(loaded.model)
    here = describe_model(loaded, modules)
    found = read_scores(path, model=here, modules=modules)
    if found.model.fingerprint != loaded.source.fingerprint:
        raise SensitivityError(
            f"{path} holds the scores of {found.model.name}, not of {loaded.source.name} as it is "
            "now; measure again"
        )
    model = replace(
        found.model, header_bytes=here.header_bytes, tower_bytes=here.tower_bytes
    )  # another choice of --towers may have been measured
    return replace(found, model=model)
