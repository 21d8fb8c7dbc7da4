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

The backward pass goes call by call through the blocks, from the recorded outputs of the blocks
before. What it holds at a time: the block outputs of a batch, their gradients, and the activations
of one block; then the gradients of one weight for as many sequences as GRADIENT_BYTES allow.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from ..errors import SensitivityError
from ..nn.layers import dequantized
from ..progress import Progress
from ..roles import Module, Role
from .gradients import Call, add_calls, looked_up, weight_gradient
from .job import Job, is_head
from .kl import LOGITS_BYTES, divergences, head_groups, record
from .replay import Pass, Replay, Tape, arrays
from .tally import Totals
from .taps import Taps

# Bytes of float32 gradients of one weight, each of one sequence, that are held together.
GRADIENT_BYTES = 1 << 30


def score_by_fisher(job: Job) -> None:
    """Do this rank's share of the round; a batch is one unit."""
    batches = job.batches()
    work = [m for m in job.modules if job.rounded(m)]
    layers = sum(len(job.rounded(m)) for m in work)
    share, done = job.share([work]), len(job.done())
    with (
        Replay(job.model, job.modules) as replay,
        Progress(
            (done + len(share)) * layers,
            "rounded layers",
            done=done * layers,
            enabled=job.progress,
        ) as progress,
    ):
        for b, step in share:
            job.reference.begin()
            job.save((b, step), _Batch(job, replay, batches[b], work, progress).score())


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
        self.tapes = record(replay, job, indices)
        keys = mx.random.split(mx.random.key(job.seed), len(job.sequences))
        self.keys = [keys[i] for i in indices]
        # By tape and block call: gradients of the call's floating point outputs.
        self.gradients = [
            [[mx.zeros_like(a) for a in _floats(out)] for out in tape.outputs]
            for tape in self.tapes
        ]
        self.totals: Totals = {
            m.path: {str(fmt): [0.0] * len(indices) for fmt in job.rounded(m)} for m in work
        }

    def score(self) -> Totals:
        """The totals of every module of `work`."""
        replay, tapes = self.replay, self.tapes
        outside = [m for m in self.work if m.block is None and m.role is not Role.HEAD]
        # By tape: calls of the modules outside the blocks, which any block's input may depend on.
        shared: list[dict[str, list[Call]]] = []
        for t, tape in enumerate(tapes):
            at_head = [_head_gradient(replay, tape, self.keys[t])]
            calls = self._backward(t, len(replay.order), outside, at_head)
            shared.append({m.path: calls.get(m.path, []) for m in outside})
        waiting: list[dict[str, list[Call]]] = [defaultdict(list) for _ in tapes]
        for n in reversed(range(len(replay.order))):
            block = replay.order[n]
            inside = [m for m in self.work if m.block == block]
            for t in range(len(tapes)):
                gradients, self.gradients[t][n] = self.gradients[t][n], []
                calls = self._backward(t, n, [*outside, *inside], gradients)
                for m in inside:
                    waiting[t][m.path] += calls.get(m.path, [])
                for path, earlier in shared[t].items():
                    shared[t][path] = add_calls(earlier, calls.get(path, []))
            if n == replay.order.index(block):
                for m in inside:
                    self._score_module(m, [calls.pop(m.path) for calls in waiting])
        for m in outside:
            self._score_module(m, [calls[m.path] for calls in shared])
        for m in self.work:
            if m.role is Role.HEAD:
                self._score_module(m, [[] for _ in tapes])
        return self.totals

    def _backward(
        self, t: int, n: int, modules: Sequence[Module], gradients: Sequence[mx.array]
    ) -> dict[str, list[Call]]:
        """Take `gradients`, at the floating point outputs of block call n, back through it.

        Adds what reaches earlier blocks' outputs to `self.gradients[t]`; returns the calls of
        `modules`. With n beyond the last block call, the start is the input of the head instead.
        """
        tape = self.tapes[t]
        live = range(n, min(n + 1, len(tape.outputs)))

        def target(run: Pass) -> list[mx.array]:
            return _floats(run.outputs[n] if live else run.hidden)

        with Taps(self.replay, modules) as taps:
            self.replay.run(tape.tokens, tape.outputs, live)  # for the shapes; nothing computes
            deltas = tree_map(mx.zeros_like, taps.outputs)

            def product(variables: dict[str, Any]) -> mx.array:
                taps.start(variables["deltas"])
                outputs = _with_floats(tape.outputs[:n], variables["outputs"])
                run = self.replay.run(tape.tokens, [*outputs, *tape.outputs[n:]], live)
                pairs = zip(target(run), gradients, strict=True)
                return sum((mx.sum(a * g) for a, g in pairs), mx.array(0.0))

            variables = {"outputs": _floats(tape.outputs[:n]), "deltas": deltas}
            found = mx.grad(product)(variables)
            arguments = taps.arguments
        earlier = iter(found["outputs"])
        for kept in self.gradients[t][:n]:
            kept[:] = [g + next(earlier) for g in kept]
        mx.eval(self.gradients[t][:n], found["deltas"], arrays(arguments))
        return {
            path: [
                (args, kwargs, g)
                for (args, kwargs), g in zip(arguments[path], found["deltas"][path], strict=True)
            ]
            for path in arguments
        }

    def _score_module(self, module: Module, calls: Sequence[list[Call]]) -> None:
        """Add to `totals` the scores of one module, whose `calls` are given by tape."""
        job = self.job
        if module.role is not Role.HEAD and not all(calls):
            raise SensitivityError(
                f"the model never calls {module.path} as a layer, so it has no Fisher score; "
                "use --sensitivity kl"
            )
        dense = job.reference.dense(module.path)
        if module.role is not Role.HEAD:
            self._add_smooth_part(module, *looked_up(dense, calls))
        if is_head(module):
            self._add_head_part(module, dense)
        for _ in job.rounded(module):
            self.progress.step(note=module.path)

    def _add_smooth_part(
        self, module: Module, layer: nn.Module, calls: Sequence[list[Call]]
    ) -> None:
        together = max(1, GRADIENT_BYTES // (4 * layer.weight.size))
        for start in range(0, len(calls), together):
            group = range(start, min(start + together, len(calls)))
            gradients = [weight_gradient(layer, calls[t]) for t in group]
            for fmt in self.job.rounded(module):
                rounded = self.job.render(module, layer, fmt)
                change = np.asarray(dequantized(rounded) - layer.weight.astype(mx.float32))
                for t, gradient in zip(group, gradients, strict=True):
                    rows = np.einsum("...i,...i->...", gradient, change)
                    score = 0.5 * float(np.square(rows).sum(dtype=np.float64))
                    self.totals[module.path][str(fmt)][t] += score

    def _add_head_part(self, module: Module, dense: nn.Module) -> None:
        for group in head_groups(self.job.rounded(module), dense):
            heads = [self.job.render(module, dense, fmt) for fmt in group]
            for t, tape in enumerate(self.tapes):
                students = [(tape.hidden, head) for head in heads]
                found = divergences(self.replay, tape, (tape.hidden, dense), students)
                for fmt, total in zip(group, found, strict=True):
                    self.totals[module.path][str(fmt)][t] += total


def _head_gradient(replay: Replay, tape: Tape, key: mx.array) -> mx.array:
    """Gradient [1, T, d] at the head's input of sum_t log p(y_t), y_t drawn from p."""
    rows = max(1, LOGITS_BYTES // (4 * tape.vocabulary))
    hidden = tape.hidden[0]
    parts = []
    for start in range(0, hidden.shape[0], rows):
        key, draw = mx.random.split(key)
        part = mx.grad(_likelihood(replay, tape, draw))(hidden[start : start + rows])
        mx.eval(part)
        parts.append(part)
    return mx.concatenate(parts)[None]


def _likelihood(replay: Replay, tape: Tape, key: mx.array) -> Callable[[mx.array], mx.array]:
    def likelihood(rows: mx.array) -> mx.array:
        logits = replay.logits(tape, rows).astype(mx.float32)
        labels = mx.random.categorical(mx.stop_gradient(logits), key=key)
        chosen = mx.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
        return mx.sum(chosen - mx.logsumexp(logits, axis=-1))

    return likelihood


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)


def _floats(tree: Any) -> list[mx.array]:
    """The floating point arrays among the leaves."""
    found: list[mx.array] = []
    tree_map(lambda leaf: found.append(leaf) if _is_float(leaf) else None, tree)
    return found


def _with_floats(tree: Any, floats: Sequence[mx.array]) -> Any:
    """The tree with its floating point leaves replaced by `floats`, in order."""
    rest = iter(floats)
    return tree_map(lambda leaf: next(rest) if _is_float(leaf) else leaf, tree)
