"""The main job: measure, plan, round, export, then measure what came out.

    result = convert("Qwen/Qwen3-0.6B", "out", size="uniform4")

Work in progress lies in `OUT.optiq-work` beside the output: scores as they are measured, so that
an interrupted run goes on with `resume=True`, and a failure after measuring costs nothing.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from . import calibration as cal
from .errors import BudgetError, ExportError
from .formats import DEFAULT_MENU, Format, parse_menu
from .plan import Plan, build, parse_size, uniform_plan
from .roles import allowed, quantizable
from .sources import LoadedModel, Source, load, resolve

# Enough for stable scores of a small model; the scores' error bars say whether it was.
CALIBRATION_TOKENS = 8192
HELD_OUT_TOKENS = 4096
CHECKPOINT = "sensitivity.checkpoint.json"
SCORES = "sensitivity.json"


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


@dataclass(frozen=True)
class Text:
    """Token sequences to measure with, and where they come from."""

    source: str
    calibration: cal.Calibration
    held_out: cal.Calibration


def convert(
    model: str,
    out: str | Path,
    *,
    size: str = "uniform4",
    formats: str | Sequence[Format] | None = None,
    sensitivity: str = "auto",
    reference: str = "auto",
    calibration: str | Path | None = None,
    tokens: int = CALIBRATION_TOKENS,
    held_out_tokens: int = HELD_OUT_TOKENS,
    rounding: str = "minmax",
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
        tokens, held_out_tokens: How much text to score with, and to measure the result on.
        scores: A sensitivity.json to use instead of measuring.
        resume: Go on with an interrupted measurement of the same job.
        dry_run: Stop at the plan; nothing is written but the work folder's scores.

    Raises an OptiqError that says what to change; `out` then does not exist.
    """
    out = Path(out).expanduser()
    _check_output(out)
    menu = _menu(formats)
    source = resolve(model, revision=revision)
    loaded = load(source)
    _check_budget(source, loaded, size, menu)
    text = gather_text(loaded, calibration, tokens, held_out_tokens, seed)
    work = work_folder(out)
    found = _scores(
        source, loaded, text, work, scores, menu, sensitivity, reference, rounding, seed,
        resume, progress,
    )  # fmt: skip
    plan = replace(
        build(found, size, menu if formats is not None else None, seed=seed),
        command=" ".join(["optiq", *sys.argv[1:]]) if sys.argv[0].endswith("optiq") else "",
    )
    if dry_run:
        return Result(plan, found, None)
    from .export import export

    export(source, plan, out, scores=found, rounding=rounding)
    plan = _measured(source, plan, out, text.held_out, progress)
    _finish(plan, found, out)
    shutil.rmtree(work, ignore_errors=True)
    return Result(plan, found, out)


def work_folder(out: Path) -> Path:
    """Where scores lie until `out` is complete."""
    return out.with_name(out.name + ".optiq-work")


def gather_text(
    loaded: LoadedModel, path: str | Path | None, tokens: int, held_out_tokens: int, seed: int
) -> Text:
    """Calibration and held-out sequences; no row is in both."""
    rows = cal.load_rows(Path(path) if path else None)
    fit, judge = cal.split(rows, "calibration"), cal.split(rows, "heldout")
    return Text(
        str(path) if path else cal.BUNDLED.name,
        cal.batches(fit, loaded.tokenizer, tokens=tokens, seed=seed),
        cal.batches(judge, loaded.tokenizer, tokens=held_out_tokens, seed=seed),
    )


def _menu(formats: str | Sequence[Format] | None) -> tuple[Format, ...]:
    if formats is None:
        return DEFAULT_MENU
    return parse_menu(formats) if isinstance(formats, str) else tuple(formats)


def _check_output(out: Path) -> None:
    """Find out before hours of measuring that the result could not be written."""
    from .export import check_target

    check_target(out)
    parent = next(p for p in out.absolute().parents if p.exists())
    probe = parent / f".{out.name}.optiq-probe"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ExportError(
            f"{out} cannot be written: {error.strerror}; choose another folder"
        ) from error


def _check_budget(
    source: Source, loaded: LoadedModel, size: str, menu: Sequence[Format]
) -> None:
    """Find out before measuring that the budget cannot be met."""
    from .sensitivity import describe_model

    modules = quantizable(loaded.model)
    model = describe_model(source, loaded, modules)
    itemsize = model["itemsize"]
    uniform4 = uniform_plan(modules, model)
    params = round(8 * uniform4.nbytes / uniform4.bpw)
    budget = parse_size(size, params=params, uniform4=uniform4.nbytes)
    least = model["fixed_bytes"] + sum(
        min(f.nbytes(m.shape, itemsize) for f in allowed(m, menu)) for m in modules
    )
    if budget < least:
        raise BudgetError(
            f"--size {size} is {budget:,} bytes, but the smallest possible with these formats is "
            f"{least:,} bytes ({8 * least / params:.2f} bits per weight); raise --size or add "
            "narrower --formats"
        )


def _scores(
    source: Source,
    loaded: LoadedModel,
    text: Text,
    work: Path,
    given: str | Path | None,
    menu: Sequence[Format],
    method: str,
    reference: str,
    rounding: str,
    seed: int,
    resume: bool,
    progress: bool,
) -> dict[str, Any]:
    """Scores from a file, from a finished measurement of this job, or measured now."""
    from . import sensitivity

    if given is not None:
        modules = quantizable(loaded.model)
        described = sensitivity.describe_model(source, loaded, modules)
        return sensitivity.load(Path(given), model=described, modules=modules)
    work.mkdir(parents=True, exist_ok=True)
    found = sensitivity.measure(
        source,
        loaded=loaded,
        menu=menu,
        calibration=text.calibration,
        calibration_source=text.source,
        method=method,
        reference=reference,
        rounding=rounding,
        seed=seed,
        checkpoint=work / CHECKPOINT,
        resume=resume,
        progress=progress,
    )
    sensitivity.save(found, work / SCORES)
    return found


def _measured(
    source: Source, plan: Plan, out: Path, held_out: cal.Calibration, progress: bool
) -> Plan:
    """The plan with the KL of the exported folder, and of stock uniform 4-bit, in it."""
    from .compare import measure
    from .nn import accelerate
    from .runtime import load as load_native
    from .runtime import render
    from .sensitivity.machine import available_memory

    baseline = uniform_plan([m.module for m in plan.modules], plan.model)
    dense = sum(prod(m.module.shape) for m in plan.modules) * plan.model["itemsize"]
    needed = dense + plan.nbytes + baseline.nbytes
    if needed > available_memory():
        return plan  # the report says "not measured"
    reference = load(source).model
    accelerate(reference)
    candidates = {
        "exported": load_native(str(out))[0],
        "uniform4": render(load(source), baseline),
    }
    metrics = measure(reference, candidates, held_out.sequences, progress=progress)
    return replace(
        plan,
        measured=metrics["exported"],
        uniform4={"nbytes": baseline.nbytes, "measured": metrics["uniform4"]},
    )


def _finish(plan: Plan, scores: dict[str, Any], out: Path) -> None:
    """Put the measured plan and the report into the exported folder, each in one step."""
    from . import report

    path = out / "optiq" / "plan.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(plan.to_json(), indent=1) + "\n")
    partial.replace(path)
    report.write(plan.to_json(), scores, out / "optiq" / "report.html")
