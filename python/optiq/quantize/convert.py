"""The main job: measure, plan, round, export, then measure what came out.

    result = convert("Qwen/Qwen3-0.6B", "out", size="uniform4")

Work in progress lies in `OUT.optiq-work` beside the output: scores as they are measured, so that
an interrupted run goes on with `resume=True`, and a failure after measuring costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
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
from ..distributed.ranks import World, world
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
from .memory import affordable
from .options import Options
from .preflight import check_budget, with_towers
from .prepare import CHECKPOINT, SCORES, given, prepare, remove_work, work_folder
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
        refine_tokens: Train gains of rows and norms on at most so many calibration tokens (see
            distill.py); kept if it lowers the KL on other text. None trains on the calibration text
            with `effort="best"`, where memory suffices, and not otherwise; 0 never does.
        dry_run: Stop at the plan; nothing is written but the work folder's scores.
        options: The fields of `Options`, such as `size="5bpw"`.

    The processes that `mlx.launch` starts share the work; each returns the same, and rank 0 writes.
    Raises an OptiqError that says what to change; `out` then does not exist.
    """
    with world() as ranks:
        return convert_together(ranks, model, out, refine_tokens, dry_run, **options)


def convert_together(
    ranks: World,
    model: str | Path,
    out: str | Path,
    refine_tokens: int | None,
    dry_run: bool,
    **options: Unpack[OptionFields],
) -> Result:
    """`convert` on these ranks."""
    chosen = Options.parse(**options)
    out = Path(out).expanduser().resolve()
    if ranks.rank != 0:
        chosen = replace(chosen, progress=False)
    with silenced(not chosen.progress), limited(chosen.memory):
        if ranks.rank != 0 or not chosen.overwrite or not out.exists():
            if ranks.rank == 0:
                check_target(out)
            return _convert(ranks, str(model), out, out, refine_tokens, dry_run, chosen)
        check_ours(out)
        with replacing(out) as fresh:
            return _convert(ranks, str(model), fresh, out, refine_tokens, dry_run, chosen)


def _convert(
    ranks: World,
    model: str,
    target: Path,
    out: Path,
    refine_tokens: int | None,
    dry_run: bool,
    options: Options,
) -> Result:
    """Write the folder `target`, which is to be `out` in the end."""
    started = time.monotonic()
    work = work_folder(out)
    if ranks.rank == 0:
        check_writable(out)
    _check_unfinished(work, refine_tokens, options)
    ranks.gather(None)  # nobody writes before all have looked
    source = with_towers(resolve(model, revision=options.revision), options.towers)
    with Job() as job, scratch(out) as folder:
        job.phase("reading")
        loaded = load(source)
        options, texts, needs = affordable(loaded, options, ranks)
        refine = _refine(loaded, texts, work, refine_tokens, options, ranks)
        known = given(options, loaded)
        if known is None:
            needed = check_budget(loaded, options.size, options.menu)
        else:
            needed = build(known, options.size, options.formats).nbytes
        if not dry_run:  # fitted weights lie beside those that are written
            check_space(out, 2 * needed + (source.towers.nbytes if source.towers else 0))
        expected = estimate(
            loaded, texts, options, needs.total, dry_run=dry_run, refining=bool(refine)
        ).shared_by(ranks.size)
        tell(f"estimate: {expected}")
        job.expect(expected.seconds)
        ready = prepare(
            loaded, texts, work, options, known, unrounded=dry_run, folder=folder, world=ranks
        )
        del loaded  # its weights are in memory by now
        scores, command = ready.scores, command_line()
        if dry_run:
            plan = build(scores, options.size, options.formats, seed=options.seed, command=command)
            return Result(plan, scores, None, *_took(started, job, needs))
        plan, rounding = ready.best(options.size, command, refine=refine)
        room = needs.total - needs.parts["process"]
        plan, answers = _write(ranks, source, plan, target, scores, rounding, texts, work, room)
        took = _took(started, job, needs)
    remove_work(work, distill.CHECKPOINT)
    return Result(plan, scores, out, *took, answers, expected.seconds)


def _took(started: float, job: Job, needs: Needs) -> tuple[float, Mapping[str, float], Memory]:
    """The figures of a `Result`."""
    return time.monotonic() - started, job.took, Memory(needs.total, peak_memory())


def _write(
    ranks: World,
    source: Source,
    plan: Plan,
    target: Path,
    scores: Scores,
    rounding: Rounding,
    texts: Texts,
    work: Path,
    room: int,
) -> tuple[Plan, list[Answers]]:
    """Export, measure what was written, and report; returns the plan as measured, and answers.

    Ranks share but the writing.
    """
    talks = ranks.gather(plan.dense_nbytes <= room)[0]
    if ranks.rank != 0:
        ranks.gather(None)
        plan = _measured(ranks, source, plan, None, rounding, texts.held_out)
        answers = _answers(ranks, source, plan, target) if talks else []
        ranks.gather(None)
        return plan, answers
    stood = target.is_dir()
    try:
        export(source, plan, target, scores=scores, rounding=rounding)
    except ExportError as error:
        kept = f"; the scores are kept, --resume uses them ({work})" if work.exists() else ""
        raise ExportError(f"{error}{kept}") from error
    try:
        ranks.gather(None)  # the others have waited for it to be written
        plan = _measured(ranks, source, plan, target, rounding, texts.held_out)
        answers = _answers(ranks, source, plan, target) if talks else []
        write_json(target / "optiq" / "plan.json", plan.to_json())
        report.write(plan, scores, target / "optiq" / "report.html", answers)
        ranks.gather(None)  # nobody forgets before the result is safe
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
    loaded: LoadedModel,
    texts: Texts,
    work: Path,
    tokens: int | None,
    options: Options,
    ranks: World,
) -> Refine | None:
    if tokens:
        text = gather(loaded.tokenizer, options.calibration, "calibration", tokens, options.seed)
    elif tokens is None and options.effort == "best" and texts.selection:
        text = texts.calibration
    else:
        return None
    refine = partial(
        distill.refine,
        loaded.source,
        text=text,
        training=distill.Training(seed=options.seed),
        checkpoint=work / distill.CHECKPOINT,
        resume=options.resume,
        optional=tokens is None,
        progress=options.progress,
    )
    return partial(distill.at_rank_0, ranks, refine)


def _measured(
    ranks: World,
    source: Source,
    plan: Plan,
    written: Path | None,
    rounding: Rounding,
    held_out: Calibration,
) -> Plan:
    """The plan with the KL of what was written, and of stock uniform 4-bit, in it.

    Ranks without the folder make the same model of the plan, for their part of the text.
    """
    baseline = _baseline(plan)
    with Progress(3, "checking") as bar, Judge(source, held_out.sequences, ranks) as judge:
        bar.step()
        model = judge.opened(written) if written else judge.rendered(plan, rounding)
        exported = judge.compare("the exported model", *model)
        del model
        bar.step()
        uniform = judge.compare("uniform 4-bit", *judge.rendered(baseline))
    ours = Measured.of(exported, plan.nbytes, plan.bpw)
    stock = Measured.of(uniform, baseline.nbytes, baseline.bpw)
    return replace(plan, measured=ours, uniform4=Baseline(baseline.nbytes, stock))


def _baseline(plan: Plan) -> Plan:
    return uniform_plan(plan.model, [m.module for m in plan.modules])


def _answers(ranks: World, source: Source, plan: Plan, out: Path) -> list[Answers]:
    """What the source, ours and stock uniform 4-bit answer; a model that cannot talk has none.

    For these whole models are in memory, one at a time. Ours is rank 0's, which wrote it.
    """
    tokenizer = load(source).tokenizer

    def original() -> nn.Module:
        model = load(source).model
        accelerate(model, exact=False)
        return model

    makers: list[Callable[[], nn.Module]] = [
        lambda: load_native(str(out))[0],
        original,
        lambda: render_model(load(source), _baseline(plan)),
    ]
    found: dict[int, list[str] | None] = {}
    for n in range(len(makers))[ranks.rank :: ranks.size]:
        try:
            model = makers[n]()
            found[n] = [answer(model, tokenizer, prompt, TOKENS) for prompt in PROMPTS]
            del model
        except Exception as error:  # whatever a template or a cache of a model file raises
            tell(f"the report has no answers of the models: {one_line(error)}")
            found[n] = None
            break
    each = ranks.join(found)
    if len(each) < len(makers) or None in each:
        return []
    ours, dense, uniform = each
    return [Answers(*of, TOKENS) for of in zip(PROMPTS, dense, ours, uniform, strict=True)]
