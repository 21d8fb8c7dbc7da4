"""Distillation: the gains of a rounded model, trained to predict what the source predicts.

Codes stay as they are; what is trained is by how much each row of a layer and each channel of a
norm is multiplied (gains.py). The loss is KL(source || student) in nats per token, streamed: of the
source only the inputs of its head are kept, [T, d] a sequence, and logits exist for a few rows at a
time. mlx-lm's DWQ trains scales and biases of groups, with the source's 1,024 largest logits.

What the loss cannot reach stays fixed: experts, nvfp4, and 8-bit layers, whose steps are finer than
the stored scales.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
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
from ...base.memory import Needs, available_memory, give_back
from ...base.modules import leaf_modules
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
from .gains import Norm, Rows, multiplied
from .render import render_model
from .weights import Rounded, Rounding

CHECKPOINT = "refine.safetensors"
TOKENS = 16384  # to train on
SAVE_EVERY = 16  # sequences
DIVERGED = 10.0  # times the mean KL so far
_MEMORY = 0.9  # of running means, a step

# Float32 arrays that exist at a time of the size of the logits, of a block's activations, and of
# scales: these and biases, as they were, changed and as stored, and their gradients.
_LOGITS, _ACTIVATIONS, _SCALES = 8, 4, 8
_HEADS = 32  # of attention, whose weights [heads, T, T] are also activations

Parameters = dict[str, mx.array]  # gains; "#3" are those of the fourth layer or norm


@dataclass(frozen=True)
class Training:
    """`epochs` over the text, each in another order, drawn by `seed`.

    An update of Adam is as long as would take the part `stride` of the KL away, if the KL were
    linear (Polyak 1987); this part falls to zero. So one stride suits all models and sizes: the
    more numbers push the same way, and the less there is to gain, the less each of them moves.
    """

    epochs: int = 1
    stride: float = 0.4
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
    """`rounding` with the scales, biases and norms of `plan` trained on the sequences of `text`.

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
        "stride": training.stride,
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
        Progress(len(order), "training gains", done=state.step, enabled=progress) as bar,
    ):
        while state.step < len(order):
            loss, gradients = student.loss_and_gradients(state.parameters, order[state.step])
            if not isfinite(loss) or loss > DIVERGED * state.mean(loss):
                bar.say(
                    f"refining diverged: KL {loss:.3g} after {state.step} sequences; the weights "
                    "are kept as they were"
                )
                return rounding
            state.update(loss, gradients, training.stride * (1 - state.step / len(order)))
            give_back()
            if state.step % SAVE_EVERY == 0 or state.step == len(order):
                state.save()
            bar.step(note=f"KL {state.mean(loss):.4g}")
    fitted, norms = student.stored(state.parameters)
    return replace(
        rounding,
        method=f"{rounding.method}, refined",
        fitted={**rounding.fitted, **fitted},
        norms=norms,
    )


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
    norms = world.gather(dict(found.norms) if world.rank == 0 else None)[0]
    return replace(rounding, method=method, fitted=fitted, norms=norms)


def memory(plan: Plan, text: Calibration) -> Needs:
    """What `refine` takes at most, from shapes alone."""
    modules, itemsize = [m.module for m in plan.modules], plan.model.itemsize
    scales = sum(_groups(m) for m in plan.modules if _is_trained(m))
    scales += plan.model.fixed_bytes // itemsize  # norms are among these
    lengths = [len(s.tokens) for s in text.sequences]
    longest, blocks = max(lengths), len(blocks_of(modules))
    _, width = embedding_shape(modules)
    activations = _ACTIVATIONS * (widest_block(modules) + _HEADS * longest)
    training = 4 * scales * _SCALES + 4 * longest * (width * (blocks + 1) + activations)
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
        loaded = load(source)
        dtypes = _dtypes(loaded.model)
        model = render_model(loaded, plan, rounding=rounding, blocks=False)
        model.freeze()
        self.teacher = teacher
        self.layers = [
            Rows(p, place_at(model, p.module.path).get()) for p in plan.modules if _is_trained(p)
        ]
        self.trained: list[Rows | Norm] = [*self.layers, *_norms(model, dtypes)]
        self.replay = Replay(model, teacher.modules, recompute=True)
        head = teacher.head_path
        self.head = place_at(model, head).get() if head else nn.Module()
        self._mean_length = sum(map(len, teacher.sequences)) / len(teacher.sequences)

    def digest(self) -> str:
        """sha256 of what training starts from."""
        found = sha256()
        for rows in self.layers:
            for array in (rows.layer.weight, rows.scales, rows.biases):
                found.update(np.asarray(array.view(mx.uint8)).tobytes())
        return found.hexdigest()

    def start(self) -> Parameters:
        return {f"#{n}": of.start() for n, of in enumerate(self.trained)}

    @metal.restarts
    def loss_and_gradients(self, parameters: Parameters, i: int) -> tuple[float, Parameters]:
        """KL of sequence i, summed over its tokens, over the mean length; and its gradient."""

        def loss(parameters: Parameters) -> mx.array:
            for n, of in enumerate(self.trained):
                of.set(parameters[f"#{n}"])
            return self._divergence(i) / self._mean_length

        value, gradients = mx.value_and_grad(loss)(parameters)
        mx.eval(value, gradients)
        return float(np.asarray(value)), gradients

    def stored(
        self, parameters: Parameters
    ) -> tuple[dict[tuple[str, Format], Rounded], dict[str, mx.array]]:
        """Codes, scales and biases, and the weights of norms, as they are stored."""
        fitted, norms = {}, {}
        for n, of in enumerate(self.trained):
            gains = parameters[f"#{n}"]
            if isinstance(of, Norm):
                norms[of.path] = of.stored(gains)
            else:
                fitted[of.path, of.format] = of.stored(gains)
        return fitted, norms

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


def _dtypes(model: nn.Module) -> dict[str, mx.Dtype]:
    stored: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    return {name: array.dtype for name, array in stored.items()}


def _norms(model: nn.Module, dtypes: Mapping[str, mx.Dtype]) -> list[Norm]:
    """The norms of an accelerated model; `dtypes` are those that its parameters are stored in."""
    units = ((path, layer, multiplied(layer)) for path, layer in leaf_modules(model).items())
    return [
        Norm(path, layer, unit, dtypes[f"{path}.weight"])
        for path, layer, unit in units
        if unit is not None
    ]


@mx.custom_function
def _kl(p: mx.array, q: mx.array) -> mx.array:
    """KL of two arrays of logits [n, vocabulary], summed over rows; differentiable at q."""
    return mx.sum(ops.compare_logits(p, q).kl)


@_kl.vjp
def _kl_vjp(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
    p, q = map(ops.softmax, primals)
    return mx.zeros_like(primals[0]), (cotangent * (q - p)).astype(primals[1].dtype)


class _State:
    """Parameters, Adam's means of their gradients and the place in the order, kept in a file.

    `kl` and `slope` are running means of the loss and of the sum of its absolute gradients.
    """

    def __init__(
        self, path: Path | None, identity: Identity, start: Parameters, *, resume: bool
    ) -> None:
        self._path, self._identity = path, identity
        self.step, self.total, self.parameters = 0, 0.0, start
        self.kl = self.slope = 0.0
        self._adam = optimizers.Adam(0.0, bias_correction=True)
        self._adam.init(start)
        if resume and path is not None and path.exists():
            self._read(path)

    def mean(self, loss: float) -> float:
        """Of the losses so far; `loss` before the first."""
        return self.total / self.step if self.step else loss

    def update(self, loss: float, gradients: Parameters, stride: float) -> None:
        slope = float(np.asarray(sum(mx.abs(g).sum() for g in gradients.values())))
        old = _MEMORY if self.step else 0.0
        self.kl = old * self.kl + (1 - old) * loss
        self.slope = old * self.slope + (1 - old) * slope
        self._adam.learning_rate = stride * self.kl / self.slope if self.slope else 0.0
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
            "kl": self.kl.hex(),
            "slope": self.slope.hex(),
        }
        write_tensors(self._path, arrays, metadata)

    def _read(self, path: Path) -> None:
        try:
            found: Any = mx.load(str(path), return_metadata=True)
            arrays, metadata = found
            tree = tree_unflatten(list(arrays.items()))
            identity = json.loads(metadata["identity"])
            self.step, self.total = int(metadata["step"]), float.fromhex(metadata["total"])
            self.kl, self.slope = (float.fromhex(metadata[key]) for key in ("kl", "slope"))
            self.parameters, self._adam.state = tree["parameters"], tree["adam"]
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise damaged(path, error) from error
        check_identity(path, self._identity, identity)
