"""Distillation: scales and biases of a rounded model, trained to predict what the source predicts.

Codes stay as they are; what is trained is where a group's grid lies. The loss is KL(source ||
student) in nats per token, streamed: of the source only the inputs of its head are kept, [T, d] a
sequence, and logits exist for a few rows at a time. mlx-lm's DWQ does the same with the source's
1,024 largest logits.

Two numbers a group are trained (grid.py). What the loss cannot reach stays fixed: experts, nvfp4,
and 8-bit layers, whose steps are finer than the stored scales.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from math import isfinite
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.nn.utils import checkpoint as recomputed
from mlx.utils import tree_flatten, tree_unflatten

from ... import ops
from ...base.checkpoint import Identity, check_identity, damaged
from ...base.memory import Needs, available_memory
from ...base.progress import Progress, tell
from ...base.tensors import write_tensors
from ...calibration import Calibration
from ...distributed.ranks import World
from ...errors import UsageError
from ...formats import Format
from ...models.places import place_at
from ...models.roles import is_head, quantizable
from ...models.shapes import blocks_of, dense_bytes, embedding_shape, widest_block
from ...nn.accelerate import accelerate
from ...nn.replay import Replay, Tape
from ...ops import metal
from ...planning.plan import Plan, Planned
from ...sources import Source, load
from ..replay.backward import survey
from ..replay.logits import LOGITS_BYTES
from .grid import Grid
from .render import render_model
from .weights import Rounded, Rounding

CHECKPOINT = "refine.safetensors"
TOKENS = 16384  # to train on
SAVE_EVERY = 16  # sequences
DIVERGED = 10.0  # times the mean KL so far

# Float32 arrays that exist at a time of the size of the logits, of a block's activations, and of
# the groups: turn and shift, scales and biases, what they are made of, gradients, Adam's means.
_LOGITS, _ACTIVATIONS, _GROUPS = 8, 4, 24
_HEADS = 32  # of attention, whose weights [heads, T, T] are also activations

Parameters = dict[str, mx.array]  # turn and shift of the i-th layer, [out, groups] float32


@dataclass(frozen=True)
class Training:
    """`epochs` over the text, each in another order, drawn by `seed`.

    `learning_rate` counts in steps of a group's grid, at Adam's first update; it falls to zero.
    """

    epochs: int = 1
    learning_rate: float = 0.003
    seed: int = 0


def refine(
    source: Source,
    plan: Plan,
    rounding: Rounding,
    text: Calibration,
    *,
    training: Training = Training(),
    checkpoint: Path | None = None,
    resume: bool = False,
    optional: bool = False,
    progress: bool = True,
) -> Rounding:
    """`rounding` with the scales and biases of `plan` trained on the sequences of `text`.

    A step of Adam is one sequence. The state is kept in `checkpoint`, a .safetensors file, from
    where `resume` goes on to the same result. If the KL is not finite or explodes, `rounding` comes
    back as it was.

    Raises UsageError where memory does not suffice, unless it is `optional`; CheckpointError for a
    checkpoint of another run.
    """
    needs = memory(plan, text)
    if optional and needs.total > available_memory():
        tell(f"nothing is refined: that takes {needs} of memory", enabled=progress)
        return rounding
    _check_memory(needs, progress)
    teacher = metal.restarts(_Teacher)(source, [s.tokens for s in text.sequences])
    if teacher.no_gradients:
        tell(f"nothing is refined: {teacher.no_gradients}", enabled=progress)
        return rounding
    student = _Student(source, plan, rounding, teacher)
    identity = {
        "source": source.fingerprint,
        "rounded model": student.digest(),
        "text": text.sha256,
        "epochs": training.epochs,
        "learning rate": training.learning_rate,
        "seed": training.seed,
    }
    state = _State(checkpoint, identity, student.start(), resume=resume)
    order = [
        int(i)
        for epoch in range(training.epochs)
        for i in np.random.default_rng([training.seed, epoch]).permutation(len(text.sequences))
    ]
    with (
        student.replay,
        Progress(len(order), "training scales", done=state.step, enabled=progress) as bar,
    ):
        while state.step < len(order):
            loss, gradients = student.loss_and_gradients(state.parameters, order[state.step])
            if not isfinite(loss) or loss > DIVERGED * state.mean(loss):
                bar.say(
                    f"refining diverged: KL {loss:.3g} after {state.step} sequences; the weights "
                    "are kept as they were"
                )
                return rounding
            state.update(loss, gradients, training.learning_rate * (1 - state.step / len(order)))
            if state.step % SAVE_EVERY == 0 or state.step == len(order):
                state.save()
            bar.step(note=f"KL {state.mean(loss):.4g}")
    fitted = {**rounding.fitted, **student.rounded(state.parameters)}
    return replace(rounding, method=f"{rounding.method}, refined", fitted=fitted)


def at_rank_0(
    world: World, refine: Callable[[Plan, Rounding], Rounding], plan: Plan, rounding: Rounding
) -> Rounding:
    """What `refine` makes at rank 0, at all ranks: each step follows from the one before, so they
    cannot share it.
    """
    found = refine(plan, rounding) if world.rank == 0 else rounding
    if world.size == 1:
        return found
    changed, method = world.gather([found is not rounding, found.method])[0]
    if not changed:
        return rounding
    fitted = dict(found.fitted)
    for planned in plan.modules:
        key = planned.module.path, planned.format
        if weight := world.gather(found.fitted.get(key) if world.rank == 0 else None)[0]:
            codes, scales, biases = weight
            fitted[key] = codes, scales, biases
    return replace(rounding, method=method, fitted=fitted)


def memory(plan: Plan, text: Calibration) -> Needs:
    """What `refine` takes at most, from shapes alone."""
    modules, itemsize = [m.module for m in plan.modules], plan.model.itemsize
    groups = sum(_groups(m) for m in plan.modules if _is_trained(m))
    lengths = [len(s.tokens) for s in text.sequences]
    longest, blocks = max(lengths), len(blocks_of(modules))
    _, width = embedding_shape(modules)
    activations = _ACTIVATIONS * (widest_block(modules) + _HEADS * longest)
    training = 4 * groups * _GROUPS + 4 * longest * (width * (blocks + 1) + activations)
    student = plan.nbytes + dense_bytes((m for m in modules if m.block is None), itemsize)
    return Needs(
        {
            "source or student": max(dense_bytes(modules, itemsize), student + training),
            "inputs of the head": 4 * sum(lengths) * width,
            "logits": _LOGITS * LOGITS_BYTES,
        }
    )


def _check_memory(needs: Needs, progress: bool) -> None:
    if needs.total > available_memory():
        raise UsageError(f"memory: refining takes {needs}: leave out --refine, or free memory")
    tell(f"memory: refining takes {needs}", enabled=progress)


def _is_trained(planned: Planned) -> bool:
    fmt = planned.format
    return fmt.mode == "affine" and fmt.bits < 8 and len(planned.module.shape) == 2


def _groups(planned: Planned) -> int:
    rows, columns = planned.module.shape
    return rows * columns // planned.format.group_size


class _Teacher:
    """What the source's head gets in each sequence, and that head; nothing else of the source."""

    def __init__(self, source: Source, sequences: Sequence[Sequence[int]]) -> None:
        model = load(source).model
        self.modules = quantizable(model)
        accelerate(model, exact=False)
        self.sequences = sequences
        with Replay(model, self.modules) as replay:
            _, self.no_gradients = survey(replay, sequences[0], self.modules)
            self.hidden = [replay.record(tokens).hidden for tokens in sequences]
        self.head_path = next((m.path for m in self.modules if is_head(m)), None)
        self.head = place_at(model, self.head_path).get() if self.head_path else None


class _Student:
    """The rounded model, as a function of `Parameters`."""

    def __init__(self, source: Source, plan: Plan, rounding: Rounding, teacher: _Teacher) -> None:
        model = render_model(load(source), plan, rounding=rounding, blocks=False)
        model.freeze()
        self.teacher = teacher
        self.grids = [
            Grid(p, place_at(model, p.module.path).get()) for p in plan.modules if _is_trained(p)
        ]
        self.replay = Replay(model, teacher.modules, recompute=True)
        head = teacher.head_path
        self.head = place_at(model, head).get() if head else nn.Module()
        self._total = sum(map(len, teacher.sequences)) / len(teacher.sequences)

    def digest(self) -> str:
        """sha256 of what training starts from."""
        found = sha256()
        for grid in self.grids:
            for array in (grid.layer.weight, grid.scales, grid.biases):
                found.update(np.asarray(array.view(mx.uint8)).tobytes())
        return found.hexdigest()

    def start(self) -> Parameters:
        return {
            f"{i}/{what}": mx.zeros(grid.scales.shape)
            for i, grid in enumerate(self.grids)
            for what in ("turn", "shift")
        }

    @metal.restarts
    def loss_and_gradients(self, parameters: Parameters, i: int) -> tuple[float, Parameters]:
        """KL of sequence i in nats per token, and its gradient, in which all tokens count alike."""
        tokens = len(self.teacher.sequences[i])

        def loss(parameters: Parameters) -> mx.array:
            for n, grid in enumerate(self.grids):
                grid.set(parameters[f"{n}/turn"], parameters[f"{n}/shift"])
            return self._divergence(i) / self._total

        value, gradients = mx.value_and_grad(loss)(parameters)
        mx.eval(value, gradients)
        return float(np.asarray(value)) * self._total / tokens, gradients

    def rounded(self, parameters: Parameters) -> dict[tuple[str, Format], Rounded]:
        """Codes, scales and biases as they are stored."""
        return {
            (g.path, g.format): g.stored(parameters[f"{n}/turn"], parameters[f"{n}/shift"])
            for n, g in enumerate(self.grids)
        }

    def _divergence(self, i: int) -> mx.array:
        """KL of sequence i, summed over its tokens."""
        ids = mx.array([list(self.teacher.sequences[i])])
        run = self.replay.run(ids, (), range(1 << 30))
        outputs = [run.outputs[n] for n in range(len(run.outputs))]
        tape = Tape(ids, outputs, run.hidden, run.logits.shape[-1])

        def divergence(target: mx.array, rows: mx.array) -> mx.array:
            p = self.replay.logits(tape, target, self.teacher.head)
            return cast(mx.array, _kl(p, self.replay.logits(tape, rows)))

        target = self.teacher.hidden[i][0]
        total = mx.array(0.0)
        for at in tape.chunks(LOGITS_BYTES):
            part: mx.array = recomputed(self.head, divergence)(target[at], run.hidden[0, at])
            total = total + part
        return total


@mx.custom_function
def _kl(p: mx.array, q: mx.array) -> mx.array:
    """KL of two arrays of logits [n, vocabulary], summed over rows; differentiable at q."""
    return mx.sum(ops.compare_logits(p, q).kl)


@_kl.vjp
def _kl_vjp(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
    p, q = (mx.softmax(x.astype(mx.float32), axis=-1) for x in primals)
    return mx.zeros_like(primals[0]), (cotangent * (q - p)).astype(primals[1].dtype)


class _State:
    """Parameters, Adam's means of their gradients and the place in the order, kept in a file."""

    def __init__(
        self, path: Path | None, identity: Identity, start: Parameters, *, resume: bool
    ) -> None:
        self._path, self._identity = path, identity
        self.step, self.total, self.parameters = 0, 0.0, start
        self._adam = optimizers.Adam(0.0, bias_correction=True)
        self._adam.init(start)
        if resume and path is not None and path.exists():
            self._read(path)

    def mean(self, loss: float) -> float:
        """Of the losses so far; `loss` before the first."""
        return self.total / self.step if self.step else loss

    def update(self, loss: float, gradients: Parameters, rate: float) -> None:
        self._adam.learning_rate = rate
        self.parameters = self._adam.apply_gradients(gradients, self.parameters)
        mx.eval(self.parameters, self._adam.state)
        self.step, self.total = self.step + 1, self.total + loss

    def save(self) -> None:
        """Replace the file in one step: a reader finds the old state or the new, never a part."""
        if self._path is None:
            return
        arrays = dict(tree_flatten({"parameters": self.parameters, "adam": self._adam.state}))
        metadata = {
            "identity": json.dumps(self._identity, sort_keys=True),
            "step": str(self.step),
            "total": self.total.hex(),
        }
        write_tensors(self._path, arrays, metadata)

    def _read(self, path: Path) -> None:
        try:
            found: Any = mx.load(str(path), return_metadata=True)
            arrays, metadata = found
            tree = tree_unflatten(list(arrays.items()))
            identity = json.loads(metadata["identity"])
            self.step, self.total = int(metadata["step"]), float.fromhex(metadata["total"])
            self.parameters, self._adam.state = tree["parameters"], tree["adam"]
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise damaged(path, error) from error
        check_identity(path, self._identity, identity)
