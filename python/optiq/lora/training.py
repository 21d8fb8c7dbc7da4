"""Training an adapter on a model whose weights stay as they are, quantized or not."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..base.checkpoint import Identity, check_unfinished
from ..base.command import command_line
from ..base.files import check_writable
from ..base.machine import machine, versions
from ..base.memory import Needs, available_memory
from ..base.progress import Progress, peak_memory, tell
from ..distributed.ranks import World, world
from ..errors import AdapterError, UsageError
from ..nn.accelerate import accelerate
from ..ops import metal
from ..planning.plan import Plan
from ..sources import LoadedModel, Source, load, resolve
from . import start
from .adapter import Adapter, Base, write
from .data import Data, Sample, read
from .layers import LowRank, joined
from .likelihood import Likelihood
from .memory import needs
from .options import Training, default_init
from .preferences import Pair, Preferences, read_pairs
from .state import Judged, State, Update, as_vector, norm_of
from .tuned import Parameters, Tuned

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import TrainingFields

Example = Sample | Pair
E = TypeVar("E")
LOSS, GRADIENT = "loss", "gradient"  # in what ranks add up


@dataclass(frozen=True)
class Result:
    """The adapter, and how training went; under `mlx.launch` the first process has `written` it."""

    adapter: Adapter
    path: Path
    written: bool
    updates: tuple[Update, ...]
    judged: tuple[Judged, ...]
    tokens_per_second: float  # of all tokens that were trained on in this process

    @property
    def held_out_loss(self) -> float | None:
        """Of the adapter that was written, in nats per token to learn."""
        return min((j.loss for j in self.judged), default=None)


def train(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    original: str | Path | None = None,
    revision: str | None = None,
    resume: bool = False,
    restart: bool = False,
    progress: bool = True,
    **fields: Unpack[TrainingFields],
) -> Result:
    """Train an adapter for `model` on the rows of `data`, and write it to the folder `out`.

    `data` is a folder with train.jsonl and perhaps valid.jsonl, or one file. `original` is the
    model that `model` was quantized from, for init="qera" and, if given, ranks="sensitivity".
    `fields` are those of `Training`; without `init` it is `default_init`. A run that was
    interrupted goes on with `resume`, to the same bits; `restart` discards it. Under `mlx.launch`
    the processes share the passes of each batch.

    Raises UsageError for what cannot be honoured, SourceError, AdapterError for the data or a loss
    that is not finite, CheckpointError and ExportError.
    """
    fields.setdefault("init", default_init(original, fields.get("dpo", False)))
    options = Training(**fields)
    folder = Path(out).expanduser().resolve()
    checkpoint = checkpoint_of(folder)
    if folder.exists():
        raise UsageError(f"{folder} exists; name another folder, or delete it")
    check_writable(folder)
    check_unfinished([checkpoint], resume=resume, restart=restart)
    source = resolve(str(model), revision=revision)
    loaded = load(source, allow_quantized=True)
    accelerate(loaded.model, blocks=False, exact=False)
    rows = read_pairs if options.dpo else read
    samples = rows(Path(data), loaded.tokenizer, options.max_length)
    before = load(resolve(str(original))) if original is not None else None
    with world() as here:
        run = Run(
            source,
            loaded.model,
            samples,
            options,
            checkpoint,
            world=here,
            original=before,
            resume=resume,
            progress=progress and here.rank == 0,
        )
        result = metal.restarts(run.finish)(folder)
        if here.rank == 0:
            checkpoint.unlink(missing_ok=True)
    return result


def checkpoint_of(out: Path) -> Path:
    """Where the state of a run lies until the adapter `out` is written."""
    folder = out.expanduser().resolve()
    return folder.parent / f"{folder.name}.optiq-training.safetensors"


class Run:
    """One run: a model, samples, and the state of training."""

    def __init__(
        self,
        source: Source,
        model: nn.Module,
        data: Data[Any],
        options: Training,
        checkpoint: Path,
        *,
        world: World,
        original: LoadedModel | None,
        resume: bool,
        progress: bool,
    ) -> None:
        if not data.train:
            raise AdapterError("there are no rows to train on; give at least one")
        self.source, self.data, self.options = source, data, options
        self.checkpoint, self.progress, self.world = checkpoint, progress, world
        self.identity: Identity = {
            "model": source.fingerprint,
            "data": _digest([*data.train, *data.valid]),
            "original": original.source.fingerprint if original else None,
            "options": asdict(options),
        }
        world.same({**self.identity, "versions": versions()})
        modules = start.chosen(model, options.targets)
        self.blocks = len(model.layers)
        before = original.model if original else None
        self._state_memory(needs(model, modules, options, self._longest(), before))
        if resume and checkpoint.exists():
            self.state = State.read(checkpoint, self.identity, options)
        else:
            begun = start.Beginning(
                options,
                model,
                modules,
                [e.chosen if isinstance(e, Pair) else e for e in data.train],
                original=before,
                lost=lost_by_layer(source),
                progress=progress,
            ).make()
            self.state = State(
                options, parameters_of(begun.terms), parameters_of(begun.minus), begun.notes
            )
        terms, self.minus = terms_of(self.state.parameters), terms_of(self.state.minus)
        self.tuned = Tuned(
            model, terms, options.scale, minus=self.minus, recompute=options.recompute
        )
        self.objective: Any = (
            Preferences(self.tuned, options.beta, options.pack_length)
            if options.dpo
            else Likelihood(self.tuned, options.pack_length)
        )
        if data.cut:
            tell(f"{data.cut} rows were cut to {options.max_length} tokens", enabled=progress)
        if self.tuned.alone:
            tell(f"samples run one by one: {self.tuned.alone}", enabled=progress)

    def _longest(self) -> int:
        return max(len(s.tokens) for s in (*self.data.train, *self.data.valid))

    def _state_memory(self, found: Needs) -> None:
        if found.total > available_memory():
            raise UsageError(
                f"memory: training takes {found}; lower --max-length and --pack-length, or free "
                "memory"
            )
        tell(f"memory: training takes {found}", enabled=self.progress)
        self.stated = found.total

    def finish(self, folder: Path) -> Result:
        """Train to the end and write the adapter."""
        state, options = self.state, self.options
        began, tokens = time.monotonic(), 0
        with (
            self.tuned,
            Progress(options.iters, "updates", done=state.step, enabled=self.progress) as bar,
        ):
            self._prepare()
            if self.data.valid and not state.judged:
                state.judge(self._held_out_loss())
                bar.say(f"before training: held-out loss {state.best_loss:.4f}")
            while not state.over:
                update = self._update(folder)
                tokens += update.tokens
                speed = tokens / (time.monotonic() - began)
                if self.data.valid and (state.step % options.every == 0 or state.over):
                    state.judge(self._held_out_loss())
                    bar.say(
                        f"update {state.step}: loss {update.loss:.4f}, held-out loss "
                        f"{state.judged[-1].loss:.4f}"
                    )
                if state.step % options.save_every == 0:
                    self._save()
                bar.step(note=f"loss {update.loss:.4f}, {speed:.0f} tokens/s")
        seconds = time.monotonic() - began
        adapter = self._adapter()
        if self.world.rank == 0:
            write(adapter, folder)
        return Result(
            adapter,
            folder,
            self.world.rank == 0,
            tuple(state.updates),
            tuple(state.judged),
            tokens / seconds if seconds else 0.0,
        )

    def _update(self, folder: Path) -> Update:
        state = self.state
        batch = batch_of(self.data.train, self.options, state.step)
        loss, gradient = self._gradient(batch)
        if not (isfinite(loss) and isfinite(norm_of(gradient))):
            self._save()
            if self.world.rank == 0:
                write(self._adapter(), folder)
            raise AdapterError(
                f"the loss is {loss:.4g} in update {state.step + 1} and training stopped; {folder} "
                f"holds the adapter of {self._kept()}: lower --lr, or look at the rows of lines "
                f"{', '.join(str(s.line) for s in batch[:8])}"
            )
        state.update(loss, gradient, sum(len(s.tokens) for s in batch))
        return state.updates[-1]

    def _gradient(self, batch: Sequence[Example]) -> tuple[float, mx.array]:
        """Mean loss of the batch and its gradient as one vector, over all passes and ranks."""
        weight = self.objective.weight(batch)
        total, summed = 0.0, mx.zeros(sum(a.size for a in self.state.parameters.values()))
        for unit in self._mine(batch):
            loss, found = self.tuned.loss_and_gradients(
                self.state.parameters, partial(self.objective.value, unit)
            )
            total += loss
            summed = summed + as_vector(found)
            mx.eval(summed)
        sums = self.world.sum({GRADIENT: summed, LOSS: mx.array([total])})
        return float(np.asarray(sums[LOSS])[0]) / weight, sums[GRADIENT] / weight

    def _held_out_loss(self) -> float:
        self.tuned.set(self.state.parameters)
        held_out = self.data.valid[: self.options.held_out]
        total = 0.0
        for unit in self._mine(held_out):
            total += float(np.asarray(self.objective.value(unit)))
        summed = self.world.sum({LOSS: mx.array([total])})[LOSS]
        weight: int = self.objective.weight(held_out)
        return float(np.asarray(summed)[0]) / weight

    def _mine(self, examples: Sequence[Example]) -> Sequence[Any]:
        """This rank's share of the passes, which are those of a single process."""
        passes: Sequence[Any] = self.objective.passes(examples)
        return passes[self.world.rank :: self.world.size]

    def _save(self) -> None:
        if self.world.rank == 0:
            self.state.save(self.checkpoint, self.identity)

    def _kept(self) -> str:
        judged = self.state.judged
        best = min(judged, key=lambda j: j.loss) if judged else None
        return f"update {best.step}" if best else "the last update"

    def _prepare(self) -> None:
        """What the objective wants to know of the base."""
        bare = {
            name: self.state.minus.get(name, mx.zeros_like(a) if name.endswith("lora_b") else a)
            for name, a in self.state.parameters.items()
        }
        self.tuned.set(bare)
        held_out = self.data.valid[: self.options.held_out]
        self.objective.prepare([*self.data.train, *held_out])

    def _adapter(self) -> Adapter:
        state = self.state
        made = {
            "data": {"train": len(self.data.train), "held_out": len(self.data.valid)},
            "options": asdict(self.options),
            "ranks_from": list(state.notes),
            "updates": [asdict(u) for u in state.updates],
            "judged": [asdict(j) for j in state.judged],
            "stated_bytes": self.stated,
            "peak_bytes": peak_memory(),
            "command": command_line(),
            "versions": versions(),
            "machine": machine(),
        }
        terms = terms_of(state.chosen)
        return Adapter(
            {p: joined(t, self.minus[p]) if p in self.minus else t for p, t in terms.items()},
            self.options.scale,
            Base(self.source.name, self.source.fingerprint),
            self.blocks,
            made,
        )


def lost_by_layer(source: Source) -> dict[str, float] | None:
    """What each layer's format costs in nats, as the plan of a model of ours says; None without."""
    file = source.path / "optiq" / "plan.json"
    if not file.exists():
        return None
    plan = Plan.from_json(json.loads(file.read_text(encoding="utf-8")))
    return {m.module.path: m.kl for m in plan.modules if m.kl is not None}


def batch_of(samples: Sequence[E], options: Training, step: int) -> list[E]:
    """The examples of one update: epochs follow each other, each in an order of its own."""
    n, first = len(samples), step * options.batch_size
    places = range(first, first + options.batch_size)
    orders = {
        epoch: np.random.default_rng([options.seed, epoch]).permutation(n)
        for epoch in {place // n for place in places}
    }
    return [samples[int(orders[place // n][place % n])] for place in places]


def parameters_of(terms: dict[str, LowRank]) -> Parameters:
    return {
        f"{path}.{name}": array
        for path, term in terms.items()
        for name, array in zip(("lora_a", "lora_b"), term, strict=True)
    }


def terms_of(parameters: Parameters) -> dict[str, LowRank]:
    paths = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
    return {p: LowRank(parameters[f"{p}.lora_a"], parameters[f"{p}.lora_b"]) for p in paths}


def _digest(samples: Sequence[Example]) -> str:
    found = sha256()
    for sample in samples:
        found.update(np.asarray([len(sample.tokens), *sample.tokens], "<i4").tobytes())
        found.update(np.asarray([len(sample.trained), *sample.trained], "<i4").tobytes())
    return found.hexdigest()
