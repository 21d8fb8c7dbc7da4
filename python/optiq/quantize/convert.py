"""The main job: measure, plan, round, export, then measure what came out.

    result = convert("Qwen/Qwen3-0.6B", "out", size="uniform4")

Work in progress lies in `OUT.optiq-work` beside the output: scores as they are measured, so that
an interrupted run goes on with `resume=True`, and a failure after measuring costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .. import report
from ..base.checkpoint import check_unfinished
from ..base.command import command_line
from ..base.files import check_space, check_writable, write_json
from ..base.memory import available_memory
from ..calibration import Calibration, gather
from ..errors import ExportError
from ..nn.accelerate import accelerate
from ..planning.plan import Baseline, Plan, build, uniform_plan
from ..planning.scores import Scores
from ..quality import divergence
from ..quality.results import Measured
from ..runtime.loading import load as load_native
from ..sources import LoadedModel, Source, load, resolve
from .export import check_target, clear, export
from .options import Options
from .preflight import check_budget
from .prepare import CHECKPOINT, prepare, remove_work, texts_of, work_folder
from .rounding import distill
from .rounding.render import render_model
from .select import Refine
from .sensitivity.checkpoint import existing

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import OptionFields


@dataclass(frozen=True)
class Result:
    """What `convert` made. `kl` is measured on held-out text in nats per token, if it was."""

    plan: Plan
    scores: Scores
    path: Path | None

    @property
    def kl(self) -> float | None:
        return self.plan.measured.kl.mean if self.plan.measured else None

    @property
    def nbytes(self) -> int:
        return self.plan.nbytes


def convert(
    model: str | Path,
    out: str | Path,
    *,
    refine_tokens: int = 0,
    dry_run: bool = False,
    **options: Unpack[OptionFields],
) -> Result:
    """Write `model` to the folder `out` as a stock mlx-lm model.

    Args:
        model: A Hugging Face or mlx-lm folder, a hub id, or a .gguf file.
        out: A folder that does not exist or is empty.
        refine_tokens: Train scales and biases on at most so many calibration tokens (see
            distill.py); kept if it lowers the KL on other text. By default not done.
        dry_run: Stop at the plan; nothing is written but the work folder's scores.
        options: The fields of `Options`, such as `size="5bpw"`.

    Raises an OptiqError that says what to change; `out` then does not exist.
    """
    chosen = Options.parse(**options)
    out = Path(out).expanduser().resolve()
    work = work_folder(out)
    check_target(out)
    check_writable(out)
    if chosen.scores is None:
        check_unfinished(existing(work / CHECKPOINT), chosen.resume)
    if refine_tokens:
        check_unfinished([work / distill.CHECKPOINT], chosen.resume)
    source = resolve(str(model), revision=chosen.revision)
    loaded = load(source)
    texts = texts_of(chosen, loaded.tokenizer)
    refine = _refine(loaded, work, refine_tokens, chosen) if refine_tokens else None
    if chosen.scores is None:
        needed = check_budget(loaded, chosen.size, chosen.menu)
        if not dry_run:
            check_space(out, needed)
    ready = prepare(loaded, texts, work, chosen, unrounded=dry_run)
    del loaded  # its weights are in memory by now
    scores, command = ready.scores, command_line()
    if dry_run:
        plan = build(scores, chosen.size, chosen.formats, seed=chosen.seed, command=command)
        return Result(plan, scores, None)
    plan, rounding = ready.best(chosen.size, command, refine=refine)
    stood = out.is_dir()
    try:
        export(source, plan, out, scores=scores, rounding=rounding)
    except ExportError as error:
        kept = f"; the scores are kept, --resume uses them ({work})" if work.exists() else ""
        raise ExportError(f"{error}{kept}") from error
    try:
        plan = _measured(source, plan, out, texts.held_out, chosen.progress)
        write_json(out / "optiq" / "plan.json", plan.to_json())
        report.write(plan, scores, out / "optiq" / "report.html")
    except BaseException:  # also Ctrl-C: what is there is whole, or not there
        clear(out, keep=stood)
        raise
    remove_work(work, distill.CHECKPOINT)
    return Result(plan, scores, out)


def _refine(loaded: LoadedModel, work: Path, tokens: int, options: Options) -> Refine:
    text = gather(loaded.tokenizer, options.calibration, "calibration", tokens, options.seed)
    return partial(
        distill.refine,
        loaded.source,
        text=text,
        training=distill.Training(seed=options.seed),
        checkpoint=work / distill.CHECKPOINT,
        resume=options.resume,
        progress=options.progress,
    )


def _measured(source: Source, plan: Plan, out: Path, held_out: Calibration, progress: bool) -> Plan:
    """The plan with the KL of the exported folder, and of stock uniform 4-bit, in it."""
    baseline = uniform_plan(plan.model, [m.module for m in plan.modules])
    needed = plan.dense_nbytes + plan.nbytes + baseline.nbytes
    if needed > available_memory():
        return plan  # the report says "not measured"
    reference = load(source).model
    accelerate(reference)
    candidates = {
        "exported": load_native(str(out))[0],
        "uniform4": render_model(load(source), baseline),
    }
    found = divergence.measure(reference, candidates, held_out.sequences, progress=progress)
    ours, stock = (
        Measured.of(found[name], of.nbytes, of.bpw)
        for name, of in (("exported", plan), ("uniform4", baseline))
    )
    return replace(plan, measured=ours, uniform4=Baseline(baseline.nbytes, stock))
