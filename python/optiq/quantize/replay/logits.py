"""Divergences of the outputs of a replayed model, some rows of logits at a time."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ... import ops
from ...nn.replay import Replay, Tape

# Bytes of float32 logits of one model at a time; a longer sequence is compared in chunks of rows.
LOGITS_BYTES = 64 << 20

# The input of the head [1, T, d] and the head that makes logits of it (None: the model's own).
Output = tuple[mx.array, nn.Module | None]


def divergences(
    replay: Replay, tape: Tape, teacher: Output, students: Sequence[Output]
) -> list[float]:
    """KL(teacher || student) in nats, summed over the tokens of `tape`, for each student."""
    totals = [0.0] * len(students)
    for rows in tape.chunks(LOGITS_BYTES):
        p = replay.logits(tape, teacher[0][0, rows], teacher[1])
        mx.eval(p)
        for i, (hidden, head) in enumerate(students):
            q = replay.logits(tape, hidden[0, rows], head)
            kl, _ = ops.kl_from_logits(p, q)
            totals[i] += float(np.asarray(kl).sum(dtype=np.float64))
    return totals
