"""Exact scores: the model is run with one module in one format, and its output compared.

score(m, f) = mean over tokens of KL(p || q), in nats, over the full vocabulary, where p is the
next-token distribution with module m at full precision and q that with m in format f; all else is
as in the running model. Batches of sequences are the outer loop, so that after each batch all
scores are complete means, and modules in the order of the blocks the inner one: a probe in block k
resumes from the recorded output of block k - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import mlx.core as mx
import mlx.nn as nn

from ...base.progress import Progress
from ...errors import SensitivityError
from ...formats import DENSE, Format
from ...models.roles import Module, Role, is_head
from ...nn.replay import Replay, Tape
from ...ops import metal
from ..replay.logits import Output, divergences
from ..replay.streamed import Drop, keep
from .checkpoint import Totals
from .flips import flips
from .job import Job, Unit

# Bytes of the dense weights whose rounded versions are held together, for the head's logits.
HEAD_BYTES = 1 << 30


@metal.restarts
def score_by_kl(job: Job) -> None:
    """Do this rank's share of the round; a step is the modules of one block."""
    batches, steps = job.batches(), job.blocks()
    share = job.share(steps)

    def cost(units: Sequence[Unit]) -> int:
        return sum(len(batches[b]) * sum(runs(job, m) for m in steps[s]) for b, s in units)

    done = cost(job.done())
    with (
        Replay(job.model, job.modules) as replay,
        Progress(
            done + cost(share), "measuring sensitivity", done=done, enabled=job.progress
        ) as progress,
    ):
        for b, units in groupby(share, key=lambda unit: unit[0]):
            job.reference.begin()
            tapes = record(replay, job, batches[b])
            for _, s in units:
                found: Totals = {}
                for m in steps[s]:
                    found[m.path] = _probe(job, replay, tapes, m, b)
                    note = f"{m.path}, batch {b + 1} of {len(batches)}"
                    progress.step(len(tapes) * runs(job, m), note)
                job.save((b, s), found)


def record(
    replay: Replay,
    job: Job,
    batch: Sequence[int],
    after: Drop = keep,
) -> list[Tape]:
    """The running model's own run on each sequence of a batch; `after` is that of `Replay`."""
    tapes = replay.record_together([job.sequences[i] for i in batch], after=after)
    for i, tape in zip(batch, tapes, strict=True):
        if not mx.all(tape.hidden < mx.inf).item():  # a masked word is at minus infinity
            raise SensitivityError(
                f"the model itself gives NaN or infinite values on calibration sequence {i + 1}; "
                "its weights or its dtype are at fault"
            )
    return tapes


def head_groups(formats: Sequence[Format], dense: nn.Module) -> list[Sequence[Format]]:
    """The formats in groups whose rounded heads may be held together.

    Heads must be kept until their logits are compared, and one run of the teacher's serves all.
    """
    size = max(1, HEAD_BYTES // dense.weight.nbytes)
    return [formats[i : i + size] for i in range(0, len(formats), size)]


def runs(job: Job, module: Module) -> int:
    """Block runs of all formats of a module on one sequence; a head's logits count as one."""
    formats = job.rounded(module)
    models = len(formats)
    running = job.reference.running(module.path)
    if models and running != DENSE:  # the teacher runs, the running format does not
        models += 1 - (running in formats)
    if module.role is Role.HEAD:
        return models
    return models * (len(job.model.layers) - (module.block or 0) + 1)


def _probe(
    job: Job, replay: Replay, tapes: list[Tape], module: Module, batch: int
) -> dict[str, list[float]]:
    """Score one module in all its formats on one batch: by format, the total of each tape.

    The choices that a router changes are noted.
    """
    formats = job.rounded(module)
    place = replay.place(module.path)
    dense = job.reference.dense(module.path)
    running = job.reference.running(module.path)
    own_head = is_head(module)

    def outputs(layer: nn.Module, fmt: Format) -> list[Output]:
        """Of each tape, with `layer` in the module's place."""
        head = layer if own_head else None
        if fmt == running:
            return [(tape.hidden, head) for tape in tapes]
        with place.holding(layer):
            return [(replay.final(tape, module), head) for tape in tapes]

    if module.role is Role.ROUTER:
        rounded = {str(f): job.render(module, dense, f) for f in formats}
        shares = flips(replay, tapes, job.modules, module, dense, rounded)
        job.note_flips(batch, module.path, shares)
    teachers = outputs(dense, DENSE)
    found: dict[str, list[float]] = {}
    for group in head_groups(formats, dense) if own_head else [formats]:
        students = [outputs(job.render(module, dense, f), f) for f in group]
        totals = [
            divergences(replay, tape, teachers[i], [of[i] for of in students])
            for i, tape in enumerate(tapes)
        ]
        for fmt, column in zip(group, zip(*totals, strict=True), strict=True):
            found[str(fmt)] = list(column)
    return found
