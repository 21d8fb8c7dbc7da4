"""How long a conversion will take and how much memory, before it starts.

A probe of two seconds times what a conversion does most: a product with text, the search for scales
and coordinate descent, on the model's own largest layer, and its attention. The phases are so many
of each. Where the system says how long the probe waited for a processor, that is taken off, so the
estimate is that of a machine with nothing else to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import ops
from ..base.machine import scheduled
from ..base.memory import available_memory
from ..base.progress import duration
from ..calibration import Sample, Texts
from ..formats import DENSE, UNIFORM4, Format
from ..models.roles import Module, Role, allowed, is_head, quantizable
from ..nn.accelerate import quantized
from ..ops import metal
from ..quality.answers import PROMPTS, TOKENS
from ..sources import LoadedModel
from .options import Options
from .prepare import metered
from .rounding.descent import FEW_SWEEPS, SWEEPS, TOGETHER_SWEEPS
from .rounding.moments import JUDGE_EVERY, few, made, paired, sampled
from .sensitivity.fisher import scored_elements, squares

NARROW = Format("affine", 4, 32)

_PROBE, _RUNS = 0.5, 10  # seconds for each, and runs, at most
_LONG_ENOUGH = 0.05  # seconds of a run
_ROWS = 256  # tokens in a product, as long as a sequence usually is
_WEIGHTS = 1 << 21  # weights that are rounded in a probe, at most
_TURN = 64  # rows of them whose errors add up

_BACKWARD = 3.0  # a pass back costs this many passes forward, with what it keeps for them
_REST = 1.15  # a pass forward over its products and attention alone
_TOUCHED = 0.8  # norms, sums and activations, in activations of all that layers read and write
_PLANS = 3.5  # that are proposed and measured, on average
_CANDIDATES = 3  # roundings of a layer that are compared
_COMPARED = 8  # formats that are compared in a probe
_FRESH = 1.6  # comparing a whole weight, in memory that is new each time, over the probe's part
_GRADIENTS = 1 << 24  # of all sequences, that are there for it
_WRITING = 3e-8  # seconds of a fitted weight that is written and read back
_STEP = 500  # columns that finding a step of a descent takes as long as
_ANSWERS = len(PROMPTS) * TOKENS  # tokens in the report, at most; as many of two small models
_DECODING = 1e10  # bytes a second of the weights that an answer reads
_READING = 1e9  # bytes a second of a model that is opened once more, from the disk's cache


@dataclass(frozen=True)
class Estimate:
    """Seconds of each phase in order, and the bytes of memory at most."""

    seconds: Mapping[str, float]
    memory: int

    def shared_by(self, ranks: int) -> Estimate:
        """With the work divided among so many ranks, each as fast as this one."""
        return replace(self, seconds={phase: s / ranks for phase, s in self.seconds.items()})

    def __str__(self) -> str:
        return (
            f"about {duration(sum(self.seconds.values()))}, at most {self.memory / 1e9:.1f} GB of "
            f"memory ({available_memory() / 1e9:.1f} GB are free)"
        )


@dataclass(frozen=True)
class Speed:
    """Seconds of one multiplication in a product, and in one of experts; of a number that goes
    through an activation, as norms, activations and sums do; of a query that sees a key in one
    head, in a pass forward and in one there and back; of one weight searched, and compared with the
    source; of one weight that descends against one column, its row alone or in a turn of rows
    together."""

    product: float
    experts: float
    elements: float
    attention: float
    attention_back: float
    search: float
    compare: float
    descent: float
    together: float


def estimate(
    loaded: LoadedModel,
    texts: Texts,
    options: Options,
    memory: int,
    *,
    dry_run: bool,
    refining: bool,
) -> Estimate:
    """What `convert` will take with these texts; `memory` is known already."""
    modules = quantizable(loaded.model)
    speed = probe(modules, loaded, len(texts.scoring.sequences))
    args = getattr(loaded.model, "args", None)
    chosen = getattr(args, "num_experts_per_tok", None) or 1
    token = sum(_seconds(m, speed, chosen) for m in modules)
    passed = sum(sum(m.shape[-2:]) for m in modules if m.block is not None)
    heads = _heads(args) * len({m.block for m in modules if m.block is not None})

    def run(sequences: list[Sample], *, native: bool = False, back: bool = False) -> float:
        """Seconds of a pass forward, or there and `back`; `native`: with accelerated blocks."""
        lengths = [len(sample.tokens) for sample in sequences]
        beside = 0.0 if native else _TOUCHED * passed * speed.elements
        layers = (_BACKWARD if back else 1.0) * sum(lengths) * (token + beside)
        attended = speed.attention_back if back else speed.attention
        return _REST * (layers + sum(n * n for n in lengths) * heads * attended)

    weights = sum(prod(m.shape) for m in modules)
    fitted = sum(len(sample.tokens) for sample in texts.calibration.sequences)
    scoring = sum(len(sample.tokens) for sample in texts.scoring.sequences)
    scored = run(texts.scoring.sequences)
    calibrated = run(texts.calibration.sequences, back=True)
    loading = 0.1 + weights * loaded.dtype.size / _READING
    formats = sum(_scored(m) * len(set(allowed(m, options.menu)) - {DENSE}) for m in modules)

    scores = 0.0
    if options.scores is None:
        runs = {m.path: len(allowed(m, options.menu)) - 1 for m in modules}
        exact = sum(runs.values()) * scored / 2
        open = sum(runs[m.path] for m in modules if m.role in (Role.EXPERT, Role.ROUTER))
        head = sum(prod(m.shape) * runs[m.path] for m in modules if is_head(m))
        fisher = formats * (speed.search + speed.compare) + head * scoring * speed.product
        fisher += run(texts.scoring.sequences, back=True)
        scores = {"kl": exact, "fisher": fisher}.get(
            options.sensitivity, fisher + open * scored / 2
        )
    if options.rounding != "minmax":
        scores += run(metered(texts, options).sequences)  # the importance of columns
    seconds = {"measuring sensitivity": loading + scores}
    if not dry_run:
        judging = loading + weights * speed.search + run(texts.selection, native=True)
        seconds["choosing formats"] = loading + (_PLANS * judging if texts.selection else 0.0)
        if options.rounding not in ("search", "minmax"):
            layers = sum(_fitting(m, speed, fitted, options.together) for m in modules)
            seconds["fitting weights"] = loading + calibrated + layers + judging
        if refining:
            seconds["training gains"] = 2 * calibrated
        writing = _WRITING if "fitting weights" in seconds else 2 * speed.search
        seconds["writing"] = loading + weights * writing
        judged = 2 * run(texts.held_out.sequences, native=True)
        nbytes = weights * loaded.dtype.size
        answers = _ANSWERS * 1.6 * nbytes / _DECODING if nbytes <= memory else 0.0
        seconds["checking"] = loading + weights * speed.search + judged + answers
    return Estimate(seconds, memory)


@metal.restarts
def probe(modules: list[Module], loaded: LoadedModel, sequences: int) -> Speed:
    """Time them on a matrix of the size that most of the model's weights have, and its heads."""
    shapes = [m.shape[-2:] for m in modules if m.block is not None] or [modules[0].shape[-2:]]
    out, width = max(shapes, key=prod)
    w = mx.random.normal((out, width), key=mx.random.key(0)).astype(loaded.dtype)
    x = mx.random.normal((_ROWS, width), key=mx.random.key(1))
    dense = w.astype(mx.float32 if mx.default_device() == mx.cpu else loaded.dtype)
    mx.eval(w, x, dense)
    product = _fastest(lambda: x @ dense.T) / (_ROWS * w.size)
    experts = _experts(modules, x.dtype) or product
    elements = _fastest(lambda: nn.silu(x) * x) / x.size
    attention = _attention(getattr(loaded.model, "args", None), x.dtype)
    fmt = next((f for f in (UNIFORM4, NARROW) if f.fits(w.shape)), None)
    if fmt is None:  # it stays as it is
        return Speed(product, experts, elements, *attention, 0.0, 0.0, 0.0, 0.0)
    fewer, ones = w[: max(1, _WEIGHTS // width)], mx.ones(width)
    start = ops.AffineWeight(*ops.quantize(fewer, fmt, ones), fmt.group_size, fmt.bits)
    hessian = mx.eye(width) + 0.01
    mx.eval(start[:3], hessian)
    search = _fastest(lambda: ops.quantize(fewer, fmt, ones)[0]) / fewer.size
    descent = _fastest(lambda: ops.descend(fewer, start, hessian).codes) / (fewer.size * width)
    few, codes, scales, biases = (array[:_TURN] for array in (fewer, *start[:3]))
    some = start._replace(codes=codes, scales=scales, biases=biases)
    both = mx.eye(len(few)) + 0.01
    taken = _fastest(lambda: ops.descend(few, some, hessian, outputs=both, sweeps=1).codes)
    together = taken / (few.size * (width + len(few)))
    compare = _comparing(fewer, start, fmt, sequences)
    return Speed(product, experts, elements, *attention, search, compare, descent, together)


def _comparing(w: mx.array, rounded: ops.AffineWeight, fmt: Format, sequences: int) -> float:
    """Seconds for a weight in one format, with the gradients of so many sequences."""
    rows = max(1, min(len(w), _GRADIENTS // (sequences * w.shape[1])))
    layer = nn.Linear(1, 1, bias=False)
    layer.weight, codes, scales, biases = (array[:rows] for array in (w, *rounded[:3]))
    layers = [quantized(layer, codes, scales, biases, fmt)] * _COMPARED
    gradient = np.zeros(layer.weight.shape, np.float32)

    def work() -> mx.array:
        gradients = np.empty((sequences, *gradient.shape), np.float32)
        gradients[:] = gradient
        return mx.array(squares(layer, layers, gradients)[0])

    return _FRESH * _fastest(work) / (_COMPARED * layer.weight.size)


def _heads(args: Any) -> int:
    return int(getattr(args, "num_attention_heads", None) or 1)


def _attention(args: Any, dtype: mx.Dtype) -> tuple[float, float]:
    """Seconds for a query that sees a key, in one head of the usual size: forward, and with the way
    back."""
    heads = min(_heads(args), 8)
    x = mx.random.normal((1, heads, _ROWS, 64), key=mx.random.key(2)).astype(dtype)
    mx.eval(x)

    def attend(x: mx.array) -> list[mx.array]:
        return [ops.causal_attention(x, x, x, scale=0.125)]

    pairs = heads * _ROWS**2
    forward, back = _fastest(lambda: attend(x)), _fastest(lambda: mx.vjp(attend, [x], [x])[1])
    return forward / pairs, back / pairs


def _experts(modules: list[Module], dtype: mx.Dtype) -> float:
    """Seconds of a multiplication where each token has experts of its own; 0 without experts."""
    shapes = [m.shape for m in modules if m.role is Role.EXPERT]
    if not shapes:
        return 0.0
    out, width = shapes[0][-2:]
    w = mx.random.normal((4, out, width), key=mx.random.key(3)).astype(dtype)
    x = mx.random.normal((_ROWS // 4, width), key=mx.random.key(4)).astype(dtype)
    which = mx.arange(_ROWS // 4, dtype=mx.uint32) // (_ROWS // 16)
    mx.eval(w, x, which)
    return _fastest(lambda: ops.linear(x, w, indices=which)) / (_ROWS // 4 * out * width)


def _fastest(work: Callable[[], mx.array | list[mx.array]]) -> float:
    """Seconds of the fastest of ten runs, or of as many as fit into the time of a probe.

    Without what its threads waited for a processor, which other programs had. The system counts
    in steps of milliseconds, so a run is as many calls as take `_LONG_ENOUGH`.
    """
    found: list[float] = []
    until = time.perf_counter() + _PROBE
    calls = 1
    while len(found) < 2 or (len(found) < _RUNS and time.perf_counter() < until):
        ran, waited = scheduled()
        started = time.perf_counter()
        for _ in range(calls):
            mx.eval(work())
        took = (time.perf_counter() - started) / calls
        ran, waited = (now - then for now, then in zip(scheduled(), (ran, waited), strict=True))
        found.append(took * ran / (ran + waited) if ran else took)
        if calls == 1 and took < _LONG_ENOUGH:
            calls, found = ceil(_LONG_ENOUGH / took), []  # the first call was warming up
    return min(found)


def _scored(module: Module) -> int:
    """Elements that are rounded in each format for a score."""
    return prod(module.shape) if is_head(module) else scored_elements(module)


def _fitting(module: Module, speed: Speed, tokens: int, together: bool) -> float:
    """Seconds of the descents of one module, and of what they are made and judged with."""
    size, (out, width) = prod(module.shape), module.shape[-2:]
    together = paired(module, together)
    if sampled(module, tokens, together):
        sweeps = (FEW_SWEEPS + 1) / (SWEEPS + 1)  # the start costs one more
        judged = tokens / JUDGE_EVERY
        reached = 2 * (tokens - judged) + _STEP
        judging = (_CANDIDATES - 1) * judged * speed.product
        return size * (sweeps * reached * speed.descent + judging)
    lookup = module.role is Role.EMBEDDING and not module.tied
    moments = 0 if lookup else tokens * made(width)
    judges = tokens / JUDGE_EVERY
    judged = judges if few(judges, width) else width  # columns that a change is multiplied with
    steps = size * (width * speed.descent + (_CANDIDATES - 1) * judged * speed.product)
    if together:
        moments += tokens * made(out)
        steps += size * (width + out) * TOGETHER_SWEEPS * speed.together
        steps += size * judged / width * (width + _CANDIDATES * out) * speed.product
    return steps + moments * speed.product


def _seconds(module: Module, speed: Speed, chosen: int) -> float:
    """Of one token in this module; a lookup takes none."""
    if module.role is Role.EMBEDDING and not module.tied:
        return 0.0
    if module.role is Role.EXPERT:
        return chosen * prod(module.shape[1:]) * speed.experts
    return prod(module.shape) * speed.product
