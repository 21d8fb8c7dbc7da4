"""The main job: measure, plan, round, export, then measure what came out.

    result = convert("Qwen/Qwen3-0.6B", "out", size="uniform4")

Work in progress lies in `OUT.optiq-work` beside the output: scores as they are measured, so that
an interrupted run goes on with `resume=True`, and a failure after measuring costs nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from .. import report
from ..base.files import check_space, check_writable, whole
from ..base.machine import command_line
from ..base.memory import available_memory
from ..calibration import CALIBRATION_TOKENS, HELD_OUT_TOKENS, Calibration, gather
from ..errors import ExportError
from ..formats import Format
from ..nn.accelerate import accelerate
from ..planning.plan import Plan, build, uniform_plan
from ..planning.size import parse_size
from ..quality import divergence as compare
from ..runtime.loading import load as load_native
from ..sources import Source, load, resolve
from .export import check_target, export
from .preflight import check_budget, check_unfinished
from .prepare import CHECKPOINT, gather_all, prepare, read_menu, remove_work, work_folder
from .rounding import distill as refining
from .rounding.render import render_model
from .rounding.weights import Rounding


@dataclass(frozen=True)
class Result:
    """What `convert` made. `kl` is measured on held-out text in nats per token, if it was."""

    plan: Plan
    scores: dict[str, Any]
    path: Path | None

    @property
    def kl(self) -> float | None:
        return self.plan.measured["kl"]["mean"] if self.plan.measured else None

    @property
    def nbytes(self) -> int:
        return self.plan.nbytes


def convert(
    model: str | Path,
    out: str | Path,
    *,
    size: str | int = "uniform4",
    formats: str | Sequence[Format] | None = None,
    sensitivity: str = "auto",
    reference: str = "auto",
    calibration: str | Path | None = None,
    tokens: int = CALIBRATION_TOKENS,
    held_out_tokens: int = HELD_OUT_TOKENS,
    rounding: str | None = None,
    refine_tokens: int = 0,
    scores: str | Path | None = None,
    revision: str | None = None,
    seed: int = 0,
    resume: bool = False,
    dry_run: bool = False,
    progress: bool = True,
) -> Result:
    """Write `model` to the folder `out` as a stock mlx-lm model of at most `size`.

    Args:
        model: A Hugging Face or mlx-lm folder, a hub id, or a .gguf file.
        out: A folder that does not exist or is empty.
        size: "uniform4" (the bytes of stock uniform 4-bit), "4.8bpw", "6.1GB" or bytes.
        formats: The menu, such as "3,4,5,6,8,bf16".
        sensitivity: "kl" (exact, slow), "fisher" (one backward pass) or "auto".
        reference: "bf16", "uniform4" (for models that do not fit memory) or "auto".
        calibration: JSON Lines of samples in place of the bundled mix.
        rounding: "descent" (fitted to what each layer's output loses; the default), "search"
            (scales fitted to what drives each column) or "minmax" (stock).
        refine_tokens: Train scales and biases on at most so many calibration tokens (see
            refine.py); kept if it lowers the KL on other text. By default not done.
        tokens, held_out_tokens: How much text to score with, and to measure the result on.
        scores: A sensitivity.json to use instead of measuring.
        resume: Go on with an interrupted measurement of the same job.
        dry_run: Stop at the plan; nothing is written but the work folder's scores.

    Raises an OptiqError that says what to change; `out` then does not exist.
    """
    model, size = str(model), str(size)
    out = Path(out).expanduser().resolve()
    work = work_folder(out)
    check_target(out)
    check_writable(out)
    if scores is None:
        check_unfinished(work / CHECKPOINT, resume)
    if refine_tokens:
        check_unfinished(work / refining.CHECKPOINT, resume)
    menu = read_menu(formats)
    parse_size(size, params=1, uniform4=1)  # a misspelled size is refused before any work
    source = resolve(model, revision=revision)
    loaded = load(source)
    texts = gather_all(loaded.tokenizer, calibration, seed, tokens, held_out_tokens)
    refine = None
    if refine_tokens:
        refine = partial(
            refining.refine,
            source,
            text=gather(loaded.tokenizer, calibration, "calibration", refine_tokens, seed),
            seed=seed,
            checkpoint=work / refining.CHECKPOINT,
            resume=resume,
            progress=progress,
        )
    if scores is None:
        needed = check_budget(source, loaded, size, menu)
        if not dry_run:
            check_space(out, needed)
    ready = prepare(
        source,
        loaded,
        texts,
        work,
        size=size,
        formats=formats,
        sensitivity=sensitivity,
        reference=reference,
        rounding=rounding,
        scores=scores,
        seed=seed,
        resume=resume,
        unrounded=dry_run,
        progress=progress,
    )
    del loaded  # its weights are in memory by now
    found = ready.scores
    if dry_run:
        return Result(
            build(found, size, ready.limit, seed=seed, command=command_line()), found, None
        )
    plan, how = ready.best(size, command_line(), refine=refine)
    plan = _written(source, plan, out, found, how, texts.held_out, progress)
    remove_work(work, refining.CHECKPOINT)
    return Result(plan, found, out)


def _written(
    source: Source,
    plan: Plan,
    out: Path,
    scores: dict[str, Any],
    rounding: Rounding,
    held_out: Calibration,
    progress: bool,
) -> Plan:
    """Export to `out` and measure it; the plan with what was measured. After a failure no `out`."""
    try:
        export(source, plan, out, scores=scores, rounding=rounding)
    except ExportError as error:
        work = work_folder(out)
        kept = f"; the scores are kept, --resume uses them ({work})" if work.exists() else ""
        raise ExportError(f"{error}{kept}") from error
    try:
        plan = _measured(source, plan, out, held_out, progress)
        _finish(plan, scores, out)
    except BaseException:  # also Ctrl-C: what is there is whole, or not there
        shutil.rmtree(out)
        raise
    return plan


def _measured(source: Source, plan: Plan, out: Path, held_out: Calibration, progress: bool) -> Plan:
    """The plan with the KL of the exported folder, and of stock uniform 4-bit, in it."""
    baseline = uniform_plan([m.module for m in plan.modules], plan.model)
    needed = plan.dense_nbytes + plan.nbytes + baseline.nbytes
    if needed > available_memory():
        return plan  # the report says "not measured"
    reference = load(source).model
    accelerate(reference)
    candidates = {
        "exported": load_native(str(out))[0],
        "uniform4": render_model(load(source), baseline),
    }
    metrics = compare.measure(reference, candidates, held_out.sequences, progress=progress)
    sizes = {"exported": plan, "uniform4": baseline}
    measured = {
        name: metrics[name] | {"nbytes": sizes[name].nbytes, "bpw": sizes[name].bpw}
        for name in candidates
    }
    return replace(
        plan,
        measured=measured["exported"],
        uniform4={"nbytes": baseline.nbytes, "measured": measured["uniform4"]},
    )


def _finish(plan: Plan, scores: dict[str, Any], out: Path) -> None:
    """Put the measured plan and the report into the exported folder, each in one step."""
    path = out / "optiq" / "plan.json"
    with whole(path) as (partial,):
        partial.write_text(json.dumps(plan.to_json(), indent=1) + "\n")
    report.write(plan.to_json(), scores, out / "optiq" / "report.html")
