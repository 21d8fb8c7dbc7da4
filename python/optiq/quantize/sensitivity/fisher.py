"""Scores from one backward pass: a quadratic model of the divergence.

To second order, a small change dW of a weight moves the model's output distribution p to q with

    KL(p || q), summed over a sequence = 1/2 dW' F dW,   F = mean over labels y of g g',

where g = d/dW sum_t log p(y_t) and every label y_t is drawn from p itself, not from the text
(Amari, Information Geometry and Its Applications, 1.6.2). One draw of labels gives, from the
gradient M = g of shape (..., out, in) of one sequence and the change dW = W_f - W that format f
makes,

    score(m, f) = 1/2 sum_rows (sum_in M * dW)^2 / tokens          in nats per token.

It keeps what couples the errors within a row of W, which repeat at every token, and leaves out what
couples different rows, whose estimate from one draw is mostly noise. The spread of
log(score / exact KL) over 42 module-format pairs of SmolLM2-135M was 0.14 so; 0.16 with single
weights for rows, 0.30 with every token and output apart, 0.37 with every token apart, and 0.68 with
all of a sequence coupled.

The output head needs no such model: its divergence is computed exactly from the cached
final hidden states. That an MoE router picks another expert is not smooth, and so invisible here.

The backward pass is that of backward.py, for a batch of sequences; on top of what it holds come the
gradients of one weight for as many sequences as GRADIENT_BYTES allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from ...base.progress import Progress, tell
from ...errors import SensitivityError
from ...formats import Format
from ...models.roles import Module, Role, is_head
from ...nn.layers import dequantized
from ...nn.replay import Replay
from ...ops import metal
from ..replay.backward import Backward, survey
from ..replay.gradients import Call, looked_up, some_rows, weight_gradient
from ..replay.logits import divergences
from ..replay.shared import Calls, Shared
from ..rounding.render import render_layer
from .checkpoint import Totals
from .job import Job
from .kl import head_groups, record

# Bytes of float32 gradients of one weight, each of one sequence, that are held together.
GRADIENT_BYTES = 1 << 30

# Elements of a weight that is scored; rows evenly spread over a larger one stand for all.
SCORED_ELEMENTS = 1 << 22

# Elements of what the formats change in some rows of a weight, held together.
CHANGE_ELEMENTS = 1 << 20


def scored_elements(module: Module) -> int:
    """Elements of a module's weight, or of the rows that stand for it."""
    return min(SCORED_ELEMENTS, prod(module.shape))


@metal.restarts
def score_by_fisher(job: Job) -> None:
    """Do the round; a batch is one unit, in which ranks divide sequences and modules."""
    batches = job.batches()
    work = [m for m in job.modules if job.rounded(m)]
    layers = sum(len(job.rounded(m)) for m in work)
    waiting, done = job.waiting([work]), len(job.done())
    with (
        job.world.in_step(),
        Replay(job.model, job.modules) as replay,
        Progress(
            (done + len(waiting)) * layers,
            "measuring sensitivity",
            done=done * layers,
            enabled=job.progress,
        ) as progress,
    ):
        _, reason = survey(replay, job.sequences[0], work)
        if reason:
            raise SensitivityError(f"no Fisher scores: {reason}; use --sensitivity kl")
        for b, step in waiting:
            job.reference.begin()
            job.save((b, step), _Batch(job, replay, batches[b], work, progress).score())


def scorable(job: Job) -> set[str]:
    """Paths of the modules that have Fisher scores: a run calls them as layers, and has gradients.

    All others are to be measured.
    """
    with Replay(job.model, job.modules) as replay:
        called, reason = survey(replay, job.sequences[0], job.modules)
    if reason:
        tell(f"no Fisher scores: {reason}", enabled=job.progress)
    return set() if reason else called


class _Batch:
    """Sequences that go backward through the model together, sharing each rounded layer."""

    def __init__(
        self,
        job: Job,
        replay: Replay,
        indices: Sequence[int],
        work: Sequence[Module],
        progress: Progress,
    ) -> None:
        self.job, self.replay, self.work, self.progress = job, replay, work, progress
        lengths = [len(job.sequences[i]) for i in indices]
        own = job.world.share(lengths)
        tapes = record(replay, job, [indices[n] for n in own], job.reference.drop)
        self.shared = Shared(job.world, lengths, own, tapes)
        keys = mx.random.split(mx.random.key(job.seed), len(job.sequences))
        self.keys = [keys[indices[n]] for n in own]
        self.totals: Totals = {
            m.path: {str(fmt): [0.0] * len(indices) for fmt in job.rounded(m)} for m in work
        }

    def score(self) -> Totals:
        """The totals of every module of `work`, when all ranks have their part."""
        job, drop = self.job, self.job.reference.drop
        backward = Backward(self.replay, self.shared.tapes, self.keys, drop)
        for m, calls in self.shared.calls(backward, self.work, self._cost):
            self._score_module(m, calls)
        drop(None)  # the embedding, before the head is read
        for m in self.work:
            if m.role is Role.HEAD:
                self._score_module(m, None)
        drop(None)
        job.share_errors()
        return _sum(job.world.gather(self.totals))

    def _cost(self, module: Module) -> float:
        return scored_elements(module) * len(self.job.rounded(module))

    def _score_module(self, module: Module, calls: Calls | None) -> None:
        """Add to `totals` the scores of one module; `calls` are those of all sequences, if this
        rank works on it.
        """
        job = self.job
        if calls is not None and not any(calls):
            raise SensitivityError(
                f"the model never calls {module.path} as a layer, so it has no Fisher score; "
                "use --sensitivity kl"
            )
        if calls is not None or is_head(module):
            dense = job.reference.dense(module.path)
            if calls is not None:
                self._add_smooth_part(module, *looked_up(dense, calls))
            if is_head(module):
                self._add_head_part(module, dense)
        for _ in job.rounded(module):
            self.progress.step(note=module.path)

    def _add_smooth_part(
        self, module: Module, layer: nn.Module, calls: Sequence[list[Call]]
    ) -> None:
        formats = self.job.rounded(module)
        rounding = self.job.rounding
        layer, calls, each = some_rows(layer, calls, SCORED_ELEMENTS)
        rounded = [render_layer(layer, fmt, rounding, module.path) for fmt in formats]
        together = max(1, GRADIENT_BYTES // (4 * layer.weight.size))
        for start in range(0, len(calls), together):
            group = range(start, min(start + together, len(calls)))
            gradients = np.empty((len(group), *layer.weight.shape), np.float32)
            for i, t in enumerate(group):
                gradients[i] = weight_gradient(layer, calls[t])
            found, errors = squares(layer, rounded, gradients)
            for t, scores in zip(group, found, strict=True):
                for fmt, score in zip(formats, scores, strict=True):
                    self.totals[module.path][str(fmt)][t] += 0.5 * each * float(score)
            if not isinstance(layer, nn.Embedding):  # of which there are some rows
                for fmt, error in zip(formats, errors, strict=True):
                    self.job.note_error(module.path, str(fmt), float(error))

    def _add_head_part(self, module: Module, dense: nn.Module) -> None:
        """Of this rank's sequences."""
        for group in head_groups(self.job.rounded(module), dense):
            self._add_heads(module, dense, group)

    def _add_heads(self, module: Module, dense: nn.Module, group: Sequence[Format]) -> None:
        """In formats whose heads are held until this returns."""
        heads = self.job.render_together(module, dense, group)
        for t, tape in zip(self.shared.own, self.shared.tapes, strict=True):
            students = [(tape.hidden, head) for head in heads]
            found = divergences(self.replay, tape, (tape.hidden, dense), students)
            for fmt, total in zip(group, found, strict=True):
                self.totals[module.path][str(fmt)][t] += total


def _sum(parts: Sequence[Totals]) -> Totals:
    """The totals of all ranks added up.

    A score is added by one rank, or by two where it has a smooth part and one of the head; all else
    is zero, so that the sum is the same to the bit however the ranks divide them.
    """
    return {
        path: {
            fmt: [sum(each) for each in zip(*(part[path][fmt] for part in parts), strict=True)]
            for fmt in formats
        }
        for path, formats in parts[0].items()
    }


def squares(
    layer: nn.Module, rounded: Sequence[nn.Module], gradients: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """sum_rows (sum_in M * dW)^2 for every gradient M and rounded layer: [sequences, formats].

    For each row that is a product of two small matrices; a gradient is read once for all formats.
    Also the relative squared error of each rounded layer (see weight_error.py).
    """
    weight = layer.weight
    step = max(1, CHANGE_ELEMENTS // (len(rounded) * prod(weight.shape[1:])))
    total = np.zeros((len(gradients), len(rounded)))
    errors, size = np.zeros(len(rounded)), 0.0
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        w = weight[rows].astype(mx.float32)
        changes = mx.stack([dequantized(r, rows) - w for r in rounded])
        lost = mx.sum(mx.square(changes), axis=-1), mx.sum(mx.square(w), axis=-1)
        mx.eval(changes, lost)
        # The sums of rows in float32, of these in float64.
        errors += np.asarray(lost[0]).reshape(len(rounded), -1).sum(axis=1, dtype=np.float64)
        size += float(np.asarray(lost[1]).sum(dtype=np.float64))
        d = np.asarray(changes).reshape(len(rounded), -1, w.shape[-1])  # [formats, rows, in]
        m = gradients[:, rows].reshape(len(gradients), *d.shape[1:])  # [sequences, rows, in]
        dots = np.matmul(m.transpose(1, 0, 2), d.transpose(1, 2, 0))  # [rows, sequences, formats]
        total += np.square(dots.astype(np.float64)).sum(axis=0)
    return total, errors / size if size else errors
