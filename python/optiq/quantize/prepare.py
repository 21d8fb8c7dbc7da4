"""What plans of every size are made from: text, scores, and the rounding these were measured with.

`convert` ships one plan of them, `frontier` compares those of several sizes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..calibration import (
    CALIBRATION_TOKENS,
    HELD_OUT_TOKENS,
    SCORING_TOKENS,
    Calibration,
    Sample,
    gather,
    gather_selection,
    text_name,
)
from ..errors import SensitivityError, UsageError
from ..formats import DEFAULT_MENU, Format, parse_menu
from ..models.roles import quantizable
from ..nn.accelerate import accelerate
from ..planning.plan import Plan
from ..planning.proposals import propose
from ..sources import LoadedModel, Source, load
from .preflight import check_weights
from .rounding import importance
from .rounding.descent import descend
from .rounding.weights import MINMAX, Rounding
from .select import decide
from .sensitivity import measure as scoring
from .sensitivity.checkpoint import saved_reference
from .sensitivity.reference import choose, open_reference, weight_bytes

Json = dict[str, Any]

CHECKPOINT = "sensitivity.checkpoint.json"
SCORES = "sensitivity.json"
SEARCH, DESCENT = "search", "descent"


@dataclass(frozen=True)
class Texts:
    """Sequences to score with, to round with, to choose a plan by (maybe none), and to judge it on.

    Those to score with come from the same rows as those to round with.
    """

    name: str
    scoring: Calibration
    calibration: Calibration
    selection: list[Sample]
    held_out: Calibration


@dataclass(frozen=True)
class Prepared:
    """A source with its scores; `rounding` is the one that they were measured with.

    `limit` is the menu where the user gave one, else all that has scores may be chosen. With
    `descent` the weights of the chosen plan are fitted to what each layer's output loses.
    """

    source: Source
    texts: Texts
    scores: Json
    rounding: Rounding
    descent: bool
    limit: Sequence[Format] | None
    reference: str
    seed: int
    progress: bool

    @property
    def way(self) -> str:
        """How weights are rounded: "descent", "search" or "minmax"."""
        return DESCENT if self.descent else self.rounding.name

    def best(
        self,
        size: str,
        command: str = "",
        *,
        refine: Callable[[Plan, Rounding], Rounding] | None = None,
    ) -> tuple[Plan, Rounding]:
        """The plan to ship at `size`, and how its weights are rounded: proposed, then measured.

        `refine` is that of `selection.decide`.
        Raises as `plan.build` does.
        """
        plans = propose(self.scores, size, self.limit, seed=self.seed, command=command)
        fit = partial(
            descend,
            self.source,
            text=self.texts.calibration,
            rounding=self.rounding,
            reference=self.reference,
            seed=self.seed,
            progress=self.progress,
        )
        plan, rounding = decide(
            self.source,
            plans,
            self.rounding,
            self.texts.selection,
            fit if self.descent else None,
            refine=refine,
            progress=self.progress,
        )
        fitted_on = {
            "rounding_tokens": sum(len(s.tokens) for s in self.texts.calibration.sequences),
            "rounding_sha256": self.texts.calibration.sha256,
        }
        return replace(plan, selection=(plan.selection or {}) | fitted_on), rounding


def prepare(
    source: Source,
    loaded: LoadedModel,
    texts: Texts,
    work: Path,
    *,
    size: str = "uniform4",
    formats: str | Sequence[Format] | None = None,
    sensitivity: str = "auto",
    reference: str = "auto",
    rounding: str | None = None,
    scores: str | Path | None = None,
    seed: int = 0,
    resume: bool = False,
    unrounded: bool = False,
    progress: bool = True,
) -> Prepared:
    """Read the scores of the file `scores`, or measure them with what is known of them in `work`.

    The options are those of `convert`; with `unrounded` given scores will only be planned from.
    `loaded` is used up by a measurement. Raises an OptiqError.
    """
    limit = read_menu(formats) if formats is not None else None
    text = texts.calibration
    if scores is not None:
        found = _given(Path(scores), source, loaded)
        rounding = rounding or (DESCENT if found["rounding"] == SEARCH else found["rounding"])
        name = MINMAX.name if unrounded else rounding
        how = choose_rounding(name, source, text, reference, progress)
    else:
        if resume and reference == "auto":  # free memory may have changed since
            reference = saved_reference(work / CHECKPOINT) or reference
        check_weights(source)
        rounding = rounding or DESCENT
        how = choose_rounding(rounding, source, text, reference, progress)
        found = scoring.measure(
            source,
            loaded=loaded,
            menu=read_menu(formats),
            calibration=texts.scoring,
            calibration_source=texts.name,
            method=sensitivity,
            size=size,
            reference=reference,
            rounding=how,
            seed=seed,
            checkpoint=work / CHECKPOINT,
            resume=resume,
            progress=progress,
        )
        scoring.save(found, work / SCORES)
    return Prepared(
        source, texts, found, how, rounding == DESCENT, limit, reference, seed, progress
    )


def work_folder(out: str | Path) -> Path:
    """Where scores lie until `out` is complete."""
    out = Path(out).expanduser().resolve()
    return out.parent / f"{out.name}.optiq-work"


def remove_work(work: Path, *others: str) -> None:
    """Remove the scores and `others` of ours; anything else in the folder is somebody's."""
    for name in (CHECKPOINT, SCORES, *others):
        (work / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        work.rmdir()


def gather_all(
    tokenizer: Any,
    path: str | Path | None,
    seed: int,
    tokens: int = CALIBRATION_TOKENS,
    held_out_tokens: int = HELD_OUT_TOKENS,
) -> Texts:
    """The texts from the rows at `path`; raises CalibrationError for too few."""
    calibration = gather(tokenizer, path, "calibration", tokens, seed)
    scoring = calibration
    if tokens > SCORING_TOKENS:
        scoring = gather(tokenizer, path, "calibration", SCORING_TOKENS, seed)
    return Texts(
        text_name(path),
        held_out=gather(tokenizer, path, "heldout", held_out_tokens, seed),
        selection=gather_selection(tokenizer, path, seed),
        scoring=scoring,
        calibration=calibration,
    )


def choose_rounding(
    name: str, source: Source, text: Calibration, reference: str, progress: bool = True
) -> Rounding:
    """The rounding that scores are measured with: for "search" and "descent" the search.

    For it the importance of all columns is measured, on the model that scores are measured in: the
    source's, or that in 4 bits.
    """
    if name == MINMAX.name:
        return MINMAX
    if name not in (SEARCH, DESCENT):
        raise UsageError(f"unknown rounding {name!r}; use {DESCENT}, {SEARCH} or {MINMAX.name}")
    model = load(source).model
    modules = quantizable(model)
    chosen, _ = choose(reference, weight_bytes(model))
    open_reference(chosen, source, model, modules, MINMAX)
    accelerate(model, blocks=False)  # each layer is metered
    sequences = [sample.tokens for sample in text.sequences]
    return Rounding(SEARCH, importance.measure(model, modules, sequences, progress=progress))


def read_menu(formats: str | Sequence[Format] | None) -> tuple[Format, ...]:
    """The formats to measure: those given, or the usual ones."""
    if formats is None:
        return DEFAULT_MENU
    return parse_menu(formats if isinstance(formats, str) else map(str, formats))


def _given(path: Path, source: Source, loaded: LoadedModel) -> Json:
    """The scores of a file, if they are those of this model."""
    modules = quantizable(loaded.model)
    described = scoring.describe_model(source, loaded, modules)
    found = scoring.load(path, model=described, modules=modules)
    if found["model"]["fingerprint"] != source.fingerprint:
        raise SensitivityError(
            f"{path} holds the scores of {found['model']['name']}, not of {source.name} as it is "
            "now; measure again"
        )
    return found
