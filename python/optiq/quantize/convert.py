"""The main job: measure, plan, round, export, then measure what came out.

    result = convert("Qwen/Qwen3-0.6B", "out", size="uniform4")

Work in progress lies in `OUT.optiq-work` beside the output: scores as they are measured, so that
an interrupted run goes on with `resume=True`, and a failure after measuring costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.nn as nn

from .. import report
from ..base.checkpoint import check_unfinished
from ..base.command import command_line
from ..base.files import check_space, check_writable, scratch, write_json
from ..base.memory import Needs, limited
from ..base.progress import Job, Progress, peak_memory, silenced, tell
from ..base.text import one_line
from ..calibration import Calibration, Texts, gather
from ..errors import ExportError, UsageError
from ..nn.accelerate import accelerate
from ..planning.plan import Baseline, Plan, build, uniform_plan
from ..planning.scores import Memory, Scores
from ..quality.answers import PROMPTS, TOKENS, Answers
from ..quality.results import Measured
from ..runtime.generate import answer
from ..runtime.loading import load as load_native
from ..sources import LoadedModel, Source, load, resolve
from .estimate import estimate
from .export import check_ours, check_target, clear, export, replacing
from .memory import PROCESS, affordable
from .options import Options
from .preflight import check_budget, with_towers
from .prepare import CHECKPOINT, SCORES, prepare, remove_work, work_folder
from .rounding import distill
from .rounding.render import render_model
from .rounding.weights import Rounding
from .select import Judge, Refine
from .sensitivity.checkpoint import existing

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import OptionFields


@dataclass(frozen=True, repr=False)
class Result:
    """What `convert` made, in how many seconds; without a `path` nothing was written.

    `phases` are the seconds of each phase, `memory` the bytes that were stated before the work and
    the largest that this process has had.
    `kl` is measured on held-out text in nats per token, if it was. `answers` are those of the
    source, of this model and of stock uniform 4-bit, if all were small enough to ask. `expected`
    are the seconds of each phase as they were estimated.
    """

    plan: Plan
    scores: Scores
    path: Path | None
    seconds: float
    phases: Mapping[str, float]
    memory: Memory
    answers: Sequence[Answers] = ()
    expected: Mapping[str, float] = field(default_factory=dict)

    @property
    def kl(self) -> float | None:
        return self.plan.measured.kl.mean if self.plan.measured else None

    @property
    def nbytes(self) -> int:
        return self.plan.nbytes

    def __repr__(self) -> str:
        kl = "not measured" if self.kl is None else f"{self.kl:.4g}"
        return f"Result(path={str(self.path)!r}, nbytes={self.nbytes}, kl={kl})"


def convert(
    model: str | Path,
    out: str | Path,
    *,
    refine_tokens: int | None = None,
    dry_run: bool = False,
    **options: Unpack[OptionFields],
) -> Result:
    """Write `model` to the folder `out` as a stock mlx-lm model.

    Args:
        model: A Hugging Face or mlx-lm folder, a hub id, or a .gguf file.
        out: A folder that does not exist or is empty, or with `overwrite` a model of optiq's.
        refine_tokens: Train scales and biases on at most so many calibration tokens (see
            distill.py); kept if it lowers the KL on other text. None trains on the calibration text
            with `effort="best"`, where memory suffices, and not otherwise; 0 never does.
        dry_run: Stop at the plan; nothing is written but the work folder's scores.
        options: The fields of `Options`, such as `size="5bpw"`.

    Raises an OptiqError that says what to change; `out` then does not exist.
    """
    chosen = Options.parse(**options)
    out = Path(out).expanduser().resolve()
    with silenced(not chosen.progress), limited(chosen.memory):
        if not chosen.overwrite or not out.exists():
            check_target(out)
            return _convert(str(model), out, out, refine_tokens, dry_run, chosen)
        check_ours(out)
        with replacing(out) as fresh:
            return _convert(str(model), fresh, out, refine_tokens, dry_run, chosen)


def _convert(
    model: str, target: Path, out: Path, refine_tokens: int | None, dry_run: bool, options: Options
) -> Result:
    """Write the folder `target`, which is to be `out` in the end."""
    started = time.monotonic()
    work = work_folder(out)
    check_writable(out)
    _check_unfinished(work, refine_tokens, options)
    source = with_towers(resolve(model, revision=options.revision), options.towers)
    with Job() as job, scratch(out) as folder:
        job.phase("reading")
        loaded = load(source)
        options, texts, needs = affordable(loaded, options)
        refine = _refine(loaded, texts, work, refine_tokens, options)
        if options.scores is None:
            needed = check_budget(loaded, options.size, options.menu)
            if not dry_run:  # fitted weights lie beside those that are written
                check_space(out, 2 * needed + (source.towers.nbytes if source.towers else 0))
        expected = estimate(
            loaded, texts, options, needs.total, dry_run=dry_run, refining=bool(refine)
        )
        tell(f"estimate: {expected}")
        job.expect(expected.seconds)
        ready = prepare(loaded, texts, work, options, unrounded=dry_run, folder=folder)
        del loaded  # its weights are in memory by now
        scores, command = ready.scores, command_line()
        if dry_run:
            plan = build(scores, options.size, options.formats, seed=options.seed, command=command)
            return Result(plan, scores, None, *_took(started, job, needs))
        plan, rounding = ready.best(options.size, command, refine=refine)
        room = needs.total - PROCESS
        plan, answers = _write(source, plan, target, scores, rounding, texts, work, room)
        took = _took(started, job, needs)
    remove_work(work, distill.CHECKPOINT)
    return Result(plan, scores, out, *took, answers, expected.seconds)


def _took(started: float, job: Job, needs: Needs) -> tuple[float, Mapping[str, float], Memory]:
    """The figures of a `Result`."""
    return time.monotonic() - started, job.took, Memory(needs.total, peak_memory())


def _write(
    source: Source,
    plan: Plan,
    target: Path,
    scores: Scores,
    rounding: Rounding,
    texts: Texts,
    work: Path,
    room: int,
) -> tuple[Plan, list[Answers]]:
    """Export, measure what was written, and report; returns the plan as measured, and answers."""
    stood = target.is_dir()
    try:
        export(source, plan, target, scores=scores, rounding=rounding)
    except ExportError as error:
        kept = f"; the scores are kept, --resume uses them ({work})" if work.exists() else ""
        raise ExportError(f"{error}{kept}") from error
    try:
        plan, answers = _measured(source, plan, target, texts.held_out, room)
        write_json(target / "optiq" / "plan.json", plan.to_json())
        report.write(plan, scores, target / "optiq" / "report.html", answers)
    except BaseException:  # also Ctrl-C: what is there is whole, or not there
        clear(target, keep=stood)
        raise
    return plan, answers


def _check_unfinished(work: Path, refine_tokens: int | None, options: Options) -> None:
    """Raise UsageError rather than discard what an earlier run left, unless that is wanted."""
    left = [] if refine_tokens == 0 else [work / distill.CHECKPOINT]
    if options.scores is None:
        left += existing(work / CHECKPOINT)
        scores = work / SCORES
        if left and scores.exists() and not (options.resume or options.restart):
            raise UsageError(
                f"{scores} holds unfinished work, the scores of an earlier run: --scores {scores} "
                "plans with them, --resume goes on with the same job, --restart measures again"
            )
    check_unfinished(left, resume=options.resume, restart=options.restart)


def _refine(
    loaded: LoadedModel, texts: Texts, work: Path, tokens: int | None, options: Options
) -> Refine | None:
    if tokens:
        text = gather(loaded.tokenizer, options.calibration, "calibration", tokens, options.seed)
    elif tokens is None and options.effort == "best" and texts.selection:
        text = texts.calibration
    else:
        return None
    return partial(
        distill.refine,
        loaded.source,
        text=text,
        training=distill.Training(seed=options.seed),
        checkpoint=work / distill.CHECKPOINT,
        resume=options.resume,
        optional=tokens is None,
        progress=options.progress,
    )


def _measured(
    source: Source, plan: Plan, out: Path, held_out: Calibration, room: int
) -> tuple[Plan, list[Answers]]:
    """The plan with the KL of the exported folder, and of stock uniform 4-bit, in it; answers.

    For these whole models are in memory, one at a time: only where the source fits in `room`.
    """
    baseline = uniform_plan(plan.model, [m.module for m in plan.modules])
    with Progress(3, "checking") as bar, Judge(source, held_out.sequences) as judge:
        bar.step()
        exported = judge.compare("the exported model", *judge.opened(out))
        bar.step()
        uniform = judge.compare("uniform 4-bit", *judge.rendered(baseline))
    ours = Measured.of(exported, plan.nbytes, plan.bpw)
    stock = Measured.of(uniform, baseline.nbytes, baseline.bpw)
    samples = _answers(source, baseline, out) if plan.dense_nbytes <= room else []
    return replace(plan, measured=ours, uniform4=Baseline(baseline.nbytes, stock)), samples


def _answers(source: Source, baseline: Plan, out: Path) -> list[Answers]:
    """What the source, ours and stock uniform 4-bit answer; a model that cannot talk has none.

    One of them is in memory at a time.
    """
    tokenizer = load(source).tokenizer

    def original() -> nn.Module:
        model = load(source).model
        accelerate(model, exact=False)
        return model

    found: list[list[str]] = []
    try:
        for make in (
            original,
            lambda: load_native(str(out))[0],
            lambda: render_model(load(source), baseline),
        ):
            model = make()
            found.append([answer(model, tokenizer, prompt, TOKENS) for prompt in PROMPTS])
            del model
    except Exception as error:  # whatever a template or a cache of a model file raises
        tell(f"the report has no answers of the models: {one_line(error)}")
        return []
    by_prompt = zip(PROMPTS, *found, strict=True)
    return [Answers(prompt, a, b, c, TOKENS) for prompt, a, b, c in by_prompt]
