"""A whole measurement: every quantizable module of a model in every format of the menu."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from ...base.machine import machine, versions
from ...base.progress import tell
from ...calibration import Calibration
from ...distributed.ranks import ALONE, World
from ...models.roles import Module, allowed, quantizable
from ...nn.accelerate import accelerate
from ...planning.scores import Memory, Scores, TextInfo
from ...sources import LoadedModel
from ..describe import describe_model
from ..footprint import lengths_of, shapes_of
from ..options import Options
from ..rounding.reference import choose, common, open_reference, weight_bytes
from ..rounding.weights import MINMAX, Rounding
from . import memory
from .checkpoint import Checkpoint, saved_reference
from .job import Job
from .rounds import Rounds, exact, measure_auto

KEPT = "as in the checkpoint"


def measure(
    loaded: LoadedModel,
    text: Calibration,
    options: Options,
    *,
    rounding: Rounding = MINMAX,
    checkpoint: Path | None = None,
    world: World = ALONE,
) -> Scores:
    """Score every quantizable module in every format of the menu that its shape and role allow.

    `loaded` is used up: its layers become native ones, and with the reference "uniform4" its
    weights 4-bit. Progress goes to `checkpoint`, from where a run that resumes goes on to the very
    same numbers; the file is left there when all is done. The ranks of `world` share the work, and
    each returns the same.

    Raises SourceError for a weight that is not finite, DistributedError for ranks of different
    jobs, CheckpointError for a checkpoint of another measurement, and SensitivityError for a score
    that is not finite.
    """
    started = time.monotonic()
    model, source = loaded.model, loaded.source
    modules = quantizable(model)
    described = describe_model(loaded, modules)
    progress = options.progress and world.rank == 0
    nbytes = weight_bytes(model)
    reference, why = _reference(options, modules, nbytes, checkpoint, world)
    shared = f", shared by {world.size} ranks" if world.size > 1 else ""
    if (reference, shared) != ("bf16", "") or why == KEPT:
        tell(f"reference {reference}: {why}{shared}", enabled=progress)
    identity = {
        "model": source.fingerprint,
        "calibration": text.sha256,
        "menu": [str(fmt) for fmt in options.menu],
        "method": options.sensitivity,
        "reference": reference,
        "rounding": rounding.method,
        "seed": options.seed,
        "versions": versions(),
    }
    world.same(identity)
    state = Checkpoint(checkpoint, identity, resume=options.resume, rank=world.rank)
    for theirs in world.gather(state.rounds):
        state.add(theirs)
    lengths = lengths_of(text.sequences)
    needs = memory.needs(shapes_of(loaded, reference), lengths, options, world.size)
    accelerate(model, blocks=False, exact=False)  # layers are swapped, tapped and differentiated
    job = Job(
        model=model,
        modules=modules,
        formats={m.path: allowed(m, options.menu) for m in modules},
        sequences=[sample.tokens for sample in text.sequences],
        reference=open_reference(reference, source, model, modules, rounding),
        checkpoint=state,
        rounding=rounding,
        seed=options.seed,
        progress=progress,
        world=world,
    )
    method = options.sensitivity
    tell(f"memory: {needs}", enabled=progress)
    mx.reset_peak_memory()

    rounds = Rounds(job)
    found = Scores(
        model=described,
        modules=(),
        method=method,
        reference=reference,
        rounding=rounding.method,
        calibration=_text_info(text, options.seed),
        machine=machine(),
        versions=versions(),
    )
    if method == "auto":
        measure_auto(rounds)
    else:
        rounds.run(method, job.formats)
    return replace(
        rounds.fill(found),
        seconds=round(time.monotonic() - started, 1),
        # MLX counts arrays only.
        memory=Memory(needs.total - needs.parts["process"], mx.get_peak_memory()),
    )


def _reference(
    options: Options,
    modules: Sequence[Module],
    nbytes: int,
    checkpoint: Path | None,
    world: World,
) -> tuple[str, str]:
    """The reference that all ranks use, and why; that of the checkpoint that is resumed, if any.

    The memory that is free now may say otherwise than before the stop.
    """
    kept = None
    if options.resume and checkpoint and options.reference == "auto":
        kept = saved_reference(checkpoint)
    if kept:
        offer = kept, KEPT
    elif options.reference == "auto" and not exact(modules, options.sensitivity):
        offer = "bf16", "its blocks are read one by one"
    else:
        offer = choose(options.reference, nbytes)
    return common(world.gather(offer))


def _text_info(text: Calibration, seed: int) -> TextInfo:
    return TextInfo(
        source=text.source,
        tokens=sum(len(sample.tokens) for sample in text.sequences),
        sequences=len(text.sequences),
        tokens_per_domain=text.tokens_per_domain,
        sha256=text.sha256,
        seed=seed,
    )
