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
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..base.files import check_writable
from ..base.machine import command_line, machine, versions
from ..base.memory import available_memory
from ..base.progress import Progress
from ..calibration import CALIBRATION_TOKENS, HELD_OUT_TOKENS, token_hash
from ..errors import BudgetError, OptiqError, UsageError
from ..formats import Format
from ..models import stock
from ..models.roles import Module, Role
from ..models.size import model_size
from ..nn.accelerate import accelerate
from ..planning import pareto
from ..planning.plan import build
from ..planning.scores import parse
from ..planning.size import parse_size
from ..quality import divergence as compare
from ..sources import load, resolve
from .frontier_files import JSON, Finished, check_replaceable, write
from .preflight import check_budget, check_unfinished
from .prepare import CHECKPOINT, Prepared, gather_all, prepare, read_menu, remove_work, work_folder
from .rounding.descent import TAPE_BYTES
from .rounding.render import render_model

Json = dict[str, Any]

SIZES = ("3.5bpw", "4bpw", "uniform4", "5bpw", "6bpw")
POINTS = "frontier.checkpoint.json"

# A model to measure: its name, its family, and how to make it with its bytes and more about it.
Made = tuple[nn.Module, Json]
Candidate = tuple[str, str, Callable[[], Made]]


def frontier(
    model: str | Path,
    out: str | Path,
    *,
    sizes: Sequence[str] = SIZES,
    formats: str | Sequence[Format] | None = None,
    sensitivity: str = "auto",
    reference: str = "auto",
    calibration: str | Path | None = None,
    tokens: int = CALIBRATION_TOKENS,
    held_out_tokens: int = HELD_OUT_TOKENS,
    rounding: str | None = None,
    scores: str | Path | None = None,
    revision: str | None = None,
    seed: int = 0,
    resume: bool = False,
    progress: bool = True,
) -> Json:
    """Measure the frontier of `model`; write frontier.json and frontier.html into the folder `out`.

    `sizes` are those of `convert`, as are the other options. One size after the other is planned
    and rounded as `convert` with the same scores would; what is too small for the menu, and a
    recipe that does not know the model, is left out with a note. Scores measured for the purpose
    are kept as `out`/sensitivity.json. With `resume`, what an interrupted run has measured is used.

    Returns the content of frontier.json. Raises an OptiqError; then `out` is as it was.
    """
    out = Path(out).expanduser().resolve()
    work, sizes = work_folder(out), tuple(dict.fromkeys(s.strip() for s in sizes))
    check_replaceable(out, scores=scores is None)
    check_writable(out / JSON)
    check_unfinished(work / POINTS, resume)
    if scores is None:
        check_unfinished(work / CHECKPOINT, resume)
    menu = read_menu(formats)
    for text in sizes:
        parse_size(text, params=1, uniform4=1)  # a misspelled size is refused before any work
    if not sizes:
        raise UsageError("there is no size to measure; write for example --sizes 4bpw,uniform4")
    source = resolve(str(model), revision=revision)
    loaded = load(source)
    texts = gather_all(loaded.tokenizer, calibration, seed, tokens, held_out_tokens)
    notes: list[str] = []
    if scores is None:
        sizes = _fitting(sizes, partial(check_budget, source, loaded, menu=menu), notes)
    ready = prepare(
        source,
        loaded,
        texts,
        work,
        formats=formats,
        sensitivity=sensitivity,
        reference=reference,
        rounding=rounding,
        scores=scores,
        seed=seed,
        resume=resume,
        progress=progress,
    )
    del loaded
    sizes = _fitting(sizes, partial(build, ready.scores, menu=ready.limit), notes)
    _check_memory(ready, sizes)
    finished = Finished(work / POINTS, _identity(ready), resume=resume)
    points = list(_measure(ready, sizes, finished, notes))
    result = {**_describe(ready, sizes, notes), "points": pareto.compare(points)}
    write(result, ready.scores if scores is None else None, out)
    remove_work(work, POINTS)
    return result


def _fitting(
    sizes: Sequence[str], check: Callable[[str], object], notes: list[str]
) -> tuple[str, ...]:
    """The sizes that `check` finds large enough; BudgetError where there is none."""
    kept: list[str] = []
    refusal = BudgetError("there is no size to measure")
    for text in sizes:
        try:
            check(text)
            kept.append(text)
        except BudgetError as error:
            refusal = error
            notes.append(f"optiq {text} is left out: {error}")
    if not kept:
        raise refusal
    return tuple(kept)


def _measure(
    ready: Prepared, sizes: Sequence[str], finished: Finished, notes: list[str]
) -> Iterator[Json]:
    """The points of all candidates, those that are finished from the checkpoint."""
    candidates = list(_candidates(ready, sizes))
    done = sum(name in finished.points for name, *_ in candidates)
    with Progress(
        len(candidates), "models measured", done=done, enabled=ready.progress
    ) as progress:
        for name, family, make in candidates:
            if name not in finished.points:
                try:
                    finished.add(
                        name, {"name": name, "family": family, **_point(ready, name, make)}
                    )
                except UsageError as error:  # a recipe for other kinds of models
                    if family != "recipe":
                        raise
                    notes.append(f"{name} is left out: {error}")
                    continue
                progress.step(note=name)
            yield finished.points[name]


def _candidates(ready: Prepared, sizes: Sequence[str]) -> Iterator[Candidate]:
    def theirs(**how: Any) -> Made:
        model = stock.quantize(load(ready.source), **how)
        return model, {**model_size(model), "asked": None, "chosen": None, "rounding": "minmax"}

    def ours(asked: str) -> Made:
        plan, rounding = ready.best(asked)
        model = render_model(load(ready.source), plan, rounding=rounding)
        selection = plan.selection or {}
        about = {key: selection.get(key) for key in ("chosen", "rounding")}
        return model, {"nbytes": plan.nbytes, "bpw": plan.bpw, "asked": asked, **about}

    for bits in stock.UNIFORM_WIDTHS:
        yield f"uniform {bits}-bit", "uniform", partial(theirs, bits=bits)
    for recipe in stock.recipes():
        yield recipe, "recipe", partial(theirs, recipe=recipe)
    for asked in sizes:
        yield f"optiq {asked}", "ours", partial(ours, asked)


def _point(ready: Prepared, name: str, make: Callable[[], Made]) -> Json:
    """What `make` makes, measured: beside it only the source is in memory."""
    model, about = make()
    formats = Counter(
        str(Format(m.mode, m.bits, m.group_size)) for m in model.modules() if hasattr(m, "bits")
    )
    reference = load(ready.source).model
    for one in (reference, model):
        accelerate(one)
    sequences = ready.texts.held_out.sequences
    metrics = compare.measure(reference, {name: model}, sequences, progress=False)[name]
    return {**about, "formats": dict(sorted(formats.items())), **metrics}


def _check_memory(ready: Prepared, sizes: Sequence[str]) -> None:
    """State what will be held together at most; OptiqError where two models do not fit."""
    needs, available = memory(ready, sizes), available_memory()
    Progress(0, "", enabled=ready.progress).say(
        f"memory: at most {sum(needs.values()) / 1e9:.2f} GB ("
        + ", ".join(f"{part} {nbytes / 1e9:.2f}" for part, nbytes in needs.items())
        + f"); {available / 1e9:.1f} GB are available"
    )
    two = needs["source"] + needs["model"]
    if two > available:
        raise OptiqError(
            f"the source and a model of it take {two:,} bytes but only {available:,} are "
            "available; free memory, or use a machine with more"
        )


def memory(ready: Prepared, sizes: Sequence[str]) -> dict[str, int]:
    """Bytes of each part when it is largest, from shapes alone; their sum bounds the peak."""
    read = parse(ready.scores)
    modules, itemsize = [s.module for s in read.modules], int(read.model["itemsize"])
    fixed = int(read.model["fixed_bytes"])
    dense = fixed + itemsize * sum(prod(m.shape) for m in modules)
    widest = Format("affine", max(stock.UNIFORM_WIDTHS), 64)
    stocks = fixed + sum(widest.nbytes(m.shape, itemsize) for m in modules)
    student = max(stocks, *(build(ready.scores, s, ready.limit).nbytes for s in sizes))
    vocabulary, width = next(m.shape for m in modules if m.role is Role.EMBEDDING)
    texts = ready.texts
    sequences = [*texts.held_out.sequences, *texts.selection, *texts.calibration.sequences]
    longest = max(len(s.tokens) for s in sequences)
    rows = min(longest, max(1, compare.LOGITS_BYTES // 4 // vocabulary))
    block = max(sum(sum(m.shape[-2:]) for m in modules if m.block == b) for b in _blocks(modules))
    needs = {
        "source": dense,
        "model": student,
        "at work": 4 * (5 * rows * vocabulary + 3 * longest * (block + vocabulary)),
    }
    if ready.descent:  # a second source runs, and a model is rounded before it is made
        tokens = sum(len(s.tokens) for s in texts.calibration.sequences)
        tapes = 4 * tokens * width * (len(_blocks(modules)) + 1)
        squares = sum(m.shape[-1] ** 2 for m in modules if m.block == min(_blocks(modules)))
        needs["descent"] = (
            dense
            + student
            + min(TAPE_BYTES, tapes)
            + 4 * (2 * squares + 2 * tokens * block + 6 * max(prod(m.shape) for m in modules))
        )
    return needs


def _blocks(modules: Sequence[Module]) -> list[int]:
    return sorted({m.block for m in modules if m.block is not None}) or [0]


def _describe(ready: Prepared, sizes: Sequence[str], notes: Sequence[str]) -> Json:
    """All of frontier.json but its points; nothing that another run would give otherwise."""
    scores, texts = ready.scores, ready.texts
    return {
        "schema": 1,
        "kind": "optiq.frontier",
        "model": scores["model"],
        "sizes": list(sizes),
        "notes": list(notes),
        "metric": "nats per token",
        "scores": {key: scores[key] for key in ("method", "reference", "rounding")},
        "rounding": ready.way,
        "calibration": scores["calibration"],
        "selection": {
            "tokens": sum(len(s.tokens) for s in texts.selection),
            "text_sha256": token_hash(texts.selection) if texts.selection else None,
        },
        "seed": ready.seed,
        "command": command_line(),
        "versions": versions(),
        "machine": machine(),
    }


def _identity(ready: Prepared) -> Json:
    """What a finished point depends on beside its own name."""
    texts = ready.texts
    modules = json.dumps(ready.scores["modules"], sort_keys=True)
    return {
        "model": ready.source.fingerprint,
        "scores": hashlib.sha256(modules.encode()).hexdigest(),
        "formats": ready.limit and [str(fmt) for fmt in ready.limit],
        "rounding": ready.way,
        "text": [token_hash(t) for t in (texts.calibration.sequences, texts.selection)],
        "held-out text": token_hash(texts.held_out.sequences),
        "seed": ready.seed,
        "versions": versions(),
    }
