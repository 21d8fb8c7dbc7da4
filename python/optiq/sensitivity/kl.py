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
from math import isfinite

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import SensitivityError
from ..formats import DENSE, Format
from ..progress import Progress
from ..roles import Module, Role
from .job import Job, is_head
from .replay import Replay, Tape

# Bytes of float32 logits of one model at a time; a longer sequence is compared in chunks of rows.
LOGITS_BYTES = 64 << 20

# Bytes of the dense weights whose rounded versions are held together, for the head's logits.
HEAD_BYTES = 1 << 30

# The input of the head [1, T, d] and the head that makes logits of it (None: the model's own).
Output = tuple[mx.array, nn.Module | None]


def score_by_kl(job: Job) -> None:
    """Score into `job.checkpoint`, from its place on."""
    batches = job.batches()
    steps = [list(group) for _, group in groupby(job.modules, key=lambda m: m.block)]
    blocks = len(job.model.layers)
    cost = [sum(_cost(job, m, blocks) for m in modules) for modules in steps]
    sizes = [len(batch) for batch in batches]
    first_batch, first_step = job.checkpoint.place
    with (
        Replay(job.model, job.modules) as replay,
        Progress(
            sum(sizes) * sum(cost),
            "block runs",
            done=sum(sizes[:first_batch]) * sum(cost)
            + sum(sizes[first_batch : first_batch + 1]) * sum(cost[:first_step]),
            enabled=job.progress,
        ) as progress,
    ):
        for b in range(first_batch, len(batches)):
            job.reference.begin()
            tapes = record(replay, job, batches[b])
            for s in range(first_step if b == first_batch else 0, len(steps)):
                for m in steps[s]:
                    _probe(job, replay, tapes, m)
                    note = f"{m.path}, batch {b + 1} of {len(batches)}"
                    progress.step(len(tapes) * _cost(job, m, blocks), note)
                job.checkpoint.save(b, s + 1)
            job.checkpoint.save(b + 1, 0)


def record(replay: Replay, job: Job, batch: Sequence[int]) -> list[Tape]:
    """The running model's own run on each sequence of a batch."""
    tapes = []
    for i in batch:
        tape = replay.record(job.sequences[i])
        if not mx.all(mx.isfinite(tape.hidden)).item():
            raise SensitivityError(
                f"the model itself gives NaN or infinite values on calibration sequence {i + 1}; "
                "its weights or its dtype are at fault"
            )
        tapes.append(tape)
    return tapes


def divergences(
    replay: Replay, tape: Tape, teacher: Output, students: Sequence[Output]
) -> list[float]:
    """KL(teacher || student) in nats, summed over the tokens of `tape`, for each student."""
    from .. import ops

    rows = max(1, LOGITS_BYTES // (4 * tape.vocabulary))
    totals = [0.0] * len(students)
    for start in range(0, tape.tokens.shape[1], rows):
        stop = start + rows
        p = replay.logits(tape, teacher[0][0, start:stop], teacher[1])
        mx.eval(p)
        for i, (hidden, head) in enumerate(students):
            q = replay.logits(tape, hidden[0, start:stop], head)
            kl, _ = ops.kl_from_logits(p, q)
            totals[i] += float(np.asarray(kl).sum(dtype=np.float64))
    return totals


def add(job: Job, module: Module, fmt: Format, totals: Sequence[float], tapes: list[Tape]) -> None:
    """Enter the totals of a batch's sequences into the tally."""
    for total, tape in zip(totals, tapes, strict=True):
        if not isfinite(total):
            raise SensitivityError(
                f"the score of {module.path} in {fmt} is not finite; "
                f"the model overflows with it: remove {fmt} from --formats"
            )
        job.checkpoint.tally.add(module.path, str(fmt), total, tape.tokens.shape[1])


def head_groups(formats: Sequence[Format], dense: nn.Module) -> list[Sequence[Format]]:
    """The formats in groups whose rounded heads may be held together.

    Heads must be kept until their logits are compared, and one run of the teacher's serves all.
    """
    size = max(1, HEAD_BYTES // dense.weight.nbytes)
    return [formats[i : i + size] for i in range(0, len(formats), size)]


def _probe(job: Job, replay: Replay, tapes: list[Tape], module: Module) -> None:
    """Score one module in all its formats on one batch."""
    formats = job.rounded(module)
    if not formats:
        return
    slot = replay.slot(module.path)
    dense = job.reference.dense(module.path)
    running = job.reference.running(module.path)
    own_head = is_head(module)

    def outputs(layer: nn.Module, fmt: Format) -> list[Output]:
        """Of each tape, with `layer` in the module's place."""
        head = layer if own_head else None
        if fmt == running:
            return [(tape.hidden, head) for tape in tapes]
        with slot.holding(layer):
            return [(replay.final(tape, module), head) for tape in tapes]

    teachers = outputs(dense, DENSE)
    for group in head_groups(formats, dense) if own_head else [formats]:
        students = [outputs(job.render(module, dense, f), f) for f in group]
        totals = [
            divergences(replay, tape, teachers[i], [of[i] for of in students])
            for i, tape in enumerate(tapes)
        ]
        for fmt, column in zip(group, zip(*totals, strict=True), strict=True):
            add(job, module, fmt, column, tapes)


def _cost(job: Job, module: Module, blocks: int) -> int:
    """Block runs of all formats of a module on one sequence; a head's logits count as one."""
    formats = job.rounded(module)
    runs = len(formats)
    running = job.reference.running(module.path)
    if runs and running != DENSE:  # the teacher runs, the running format does not
        runs += 1 - (running in formats)
    if module.role is Role.HEAD:
        return runs
    return runs * (blocks - (module.block or 0) + 1)
