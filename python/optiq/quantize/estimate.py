"""How long a conversion will take and how much memory, before it starts.

A probe of two seconds times three things on the model's own largest layer: a product with text, the
search for scales, and coordinate descent. The phases are so many of each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import mlx.core as mx

from .. import ops
from ..base.memory import available_memory
from ..base.progress import duration
from ..calibration import Sample, Texts
from ..formats import DENSE, UNIFORM4, Format
from ..models.roles import Module, Role, allowed, quantizable
from ..models.shapes import embedding_shape
from ..sources import LoadedModel
from .options import Options
from .replay.logits import LOGITS_BYTES

NARROW = Format("affine", 4, 32)

_PROBE, _RUNS = 0.6, 10  # seconds for each of the three, and runs, at most
_ROWS = 256  # tokens in a product, as long as a sequence usually is
_WEIGHTS = 1 << 21  # weights that are rounded in a probe, at most

_BACKWARD = 3.0  # a pass back costs this many passes forward, with what it keeps for them
_ATTENTION = 1.25  # a pass forward over its products alone
_PLANS = 4.5  # that are proposed and measured, on average
_CANDIDATES = 3  # roundings of a layer that are compared
_EXACT = 0.01  # exact scores of what is still open, as a share of those of all
_READING = 1e9  # bytes a second of a model that is opened once more, from the disk's cache
_PROCESS = 700_000_000  # bytes of Python, MLX and mlx-lm themselves


@dataclass(frozen=True)
class Estimate:
    """Seconds of each phase in order, and the bytes of memory at most."""

    seconds: Mapping[str, float]
    memory: int

    def __str__(self) -> str:
        return (
            f"about {duration(sum(self.seconds.values()))}, at most {self.memory / 1e9:.1f} GB of "
            f"memory ({available_memory() / 1e9:.1f} GB are free)"
        )


@dataclass(frozen=True)
class Speed:
    """Seconds of one multiplication in a product, one weight searched, one step of descent."""

    product: float
    search: float
    descent: float


def estimate(
    loaded: LoadedModel, texts: Texts, options: Options, *, dry_run: bool, refining: bool
) -> Estimate:
    """What `convert` will take with these texts."""
    modules = quantizable(loaded.model)
    speed = probe(modules, loaded)
    experts = getattr(getattr(loaded.model, "args", None), "num_experts_per_tok", None) or 1
    forward = _ATTENTION * speed.product * sum(_active(m, experts) for m in modules)
    weights = sum(prod(m.shape) for m in modules)
    descents = sum(prod(m.shape) * m.shape[-1] for m in modules if m.role is not Role.EXPERT)
    calibration, scoring = _tokens(texts.calibration.sequences), _tokens(texts.scoring.sequences)
    selection, held_out = _tokens(texts.selection), _tokens(texts.held_out.sequences)
    loading = 0.1 + weights * loaded.dtype.size / _READING
    formats = sum(prod(m.shape) * len(set(allowed(m, options.menu)) - {DENSE}) for m in modules)

    scores = 0.0
    if options.scores is None:
        exact = sum(len(allowed(m, options.menu)) - 1 for m in modules) * scoring * forward / 2
        fisher = formats * (speed.search + scoring * speed.product) + _BACKWARD * scoring * forward
        scores = {"kl": exact, "fisher": fisher}.get(options.sensitivity, fisher + _EXACT * exact)
    if options.rounding != "minmax":
        scores += calibration * forward  # the importance of columns
    seconds = {"measuring sensitivity": loading + scores}
    if not dry_run:
        judging = weights * speed.search + selection * forward
        seconds["choosing formats"] = loading + (_PLANS * judging if selection else 0.0)
        if options.rounding not in ("search", "minmax"):
            layers = descents * (speed.descent + _CANDIDATES * speed.product)
            gradients = _BACKWARD * calibration * forward
            seconds["fitting weights"] = loading + gradients + layers + judging
        if refining:
            seconds["training scales"] = _BACKWARD * 2 * calibration * forward
        seconds["writing"] = loading + 2 * weights * speed.search
        seconds["checking"] = loading + weights * speed.search + 2 * held_out * forward
    return Estimate(seconds, _memory(modules, loaded, texts, dry_run=dry_run))


def probe(modules: list[Module], loaded: LoadedModel) -> Speed:
    """Time the three on a matrix of the size that most of the model's weights have."""
    shapes = [m.shape[-2:] for m in modules if m.block is not None] or [modules[0].shape[-2:]]
    out, width = max(shapes, key=prod)
    w = mx.random.normal((out, width), key=mx.random.key(0)).astype(loaded.dtype)
    x = mx.random.normal((_ROWS, width), key=mx.random.key(1))
    dense = w.astype(mx.float32 if mx.default_device() == mx.cpu else loaded.dtype)
    mx.eval(w, x, dense)
    product = _fastest(lambda: x @ dense.T) / (_ROWS * w.size)
    fmt = next((f for f in (UNIFORM4, NARROW) if f.fits(w.shape)), None)
    if fmt is None:  # it stays as it is
        return Speed(product, 0.0, 0.0)
    fewer, ones = w[: max(1, _WEIGHTS // width)], mx.ones(width)
    start = ops.AffineWeight(*ops.quantize(fewer, fmt, ones), fmt.group_size, fmt.bits)
    hessian = mx.eye(width) + 0.01
    mx.eval(start[:3], hessian)
    search = _fastest(lambda: ops.quantize(fewer, fmt, ones)[0]) / fewer.size
    descent = _fastest(lambda: ops.descend(fewer, start, hessian).codes) / (fewer.size * width)
    return Speed(product, search, descent)


def _fastest(work: Callable[[], mx.array]) -> float:
    """Seconds of the fastest of ten runs, or of as many as fit into the time of a probe."""
    found: list[float] = []
    while len(found) < _RUNS and (len(found) < 2 or sum(found) < _PROBE):
        started = time.perf_counter()
        mx.eval(work())
        found.append(time.perf_counter() - started)
    return min(found)


def _active(module: Module, experts: int) -> int:
    """Multiplications of one token in this module; a lookup takes none."""
    if module.role is Role.EMBEDDING and not module.tied:
        return 0
    if module.role is Role.EXPERT:
        return experts * prod(module.shape[1:])
    return prod(module.shape)


def _tokens(sequences: list[Sample]) -> int:
    return sum(len(sample.tokens) for sample in sequences)


def _memory(modules: list[Module], loaded: LoadedModel, texts: Texts, *, dry_run: bool) -> int:
    """The source twice while weights are fitted, a student, and what a pass keeps of its text."""
    dense = sum(prod(m.shape) for m in modules) * loaded.dtype.size
    _, width = embedding_shape(modules)
    blocks = len({m.block for m in modules if m.block is not None})
    outputs = 4 * _tokens(texts.calibration.sequences) * (blocks + 1) * width
    models = dense if dry_run else 2 * dense + dense * 4 // (8 * loaded.dtype.size)
    return min(_PROCESS + models + outputs + 3 * LOGITS_BYTES, max(available_memory(), dense))
