"""Scores of keys and values: what each cache in each format alone does to what follows.

score(slot, f) = mean over the tail of a long context of KL(p || q), in nats: p is the next-token
distribution with full-precision caches, q that with the slot's cache in f (see decoding.py). Of
a slot two formats are measured, the narrowest and a middle one: to second order KL is quadratic in
the error, which is as large as 1 / (2^bits - 1), so between and above them log KL is taken to be
linear in log(2^bits - 1). At every `CHECKED`-th slot all are measured, to say how well that holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from math import ceil, exp, isfinite, log
from statistics import median

import mlx.nn as nn

from ...base.progress import Progress
from ...calibration import Sample
from ...distributed.ranks import ALONE, World
from ...errors import KVError, SensitivityError
from ...formats import DENSE, Format
from ...kv.config import KVConfig
from ...kv.model import make_cache
from ...kv.report import Law, SlotScore, SlotScores
from ...ops import metal
from ...quality.statistics import mean_per_token
from ..replay.logits import divergences
from ..sensitivity.checkpoint import Checkpoint, Totals
from .decoding import CHUNK, Context, Decoder
from .slots import Slot, Width, configured

TAIL = 128  # tokens
CHECKED = 8
# A score below this (nats per token) is taken for this where its logarithm is; float32 noise.
LEAST = 1e-8
# What the law falls back to where it cannot be fitted, and the slopes it may have.
SLOPE, SLOPES = 2.0, (1.0, 4.0)


@dataclass(frozen=True)
class Scoring:
    """What to score: slots in formats of `menu`, at the last `tail` tokens of each context.

    `dense` has all formats DENSE, and the exact tokens to measure with.
    """

    model: nn.Module
    dense: KVConfig
    slots: Sequence[Slot]
    menu: Sequence[Width]
    contexts: Sequence[Sample]
    tail: int = TAIL

    def wanted(self) -> dict[str, list[Format]]:
        """The formats to measure, by slot."""
        return {
            slot.name: to_measure(slot, self.menu, everything=i // 2 % CHECKED == 0)
            for i, slot in enumerate(self.slots)
        }


def measure_slots(
    job: Scoring, checkpoint: Checkpoint, *, progress: bool = True, world: World = ALONE
) -> tuple[SlotScores, Law]:
    """Scores of all slots in all their formats, and how well the law held where it was checked.

    What is done is kept in `checkpoint`, context by context and cache by cache, and not done again.
    The ranks of `world` divide these.
    """
    wanted = job.wanted()
    for theirs in world.gather(checkpoint.rounds):
        checkpoint.add(theirs)
    _run(job, wanted, checkpoint, progress, world)
    for theirs in world.gather(checkpoint.rounds):
        checkpoint.add(theirs)
    done, count = checkpoint.units("kv"), len(job.contexts)

    def known(slot: Slot, fmt: Format) -> tuple[float, float | None]:
        totals = [done[f"{c}/{slot.cache}"][slot.name][str(fmt)][0] for c in range(count)]
        return mean_per_token(totals, [job.tail] * count)

    scores = {
        slot.name: complete(slot, job.menu, {fmt: known(slot, fmt) for fmt in wanted[slot.name]})
        for slot in job.slots
    }
    return scores, check_law(job.slots, job.menu, scores)


@metal.restarts
def _run(
    job: Scoring,
    wanted: Mapping[str, Sequence[Format]],
    checkpoint: Checkpoint,
    progress: bool,
    world: World,
) -> None:
    """Do this rank's stretch of the units (context, cache) that `checkpoint` lacks."""
    done = checkpoint.units("kv")
    by_cache = {cache: list(group) for cache, group in groupby(job.slots, key=lambda s: s.cache)}
    scored = {
        cache: {(s.name, str(fmt)) for s in group for fmt in wanted[s.name]}
        for cache, group in by_cache.items()
    }
    units = {
        f"{c}/{cache}": (scored[cache], 1) for c in range(len(job.contexts)) for cache in scored
    }
    checkpoint.check("kv", units)
    step = chunk(job.dense)
    with (
        Decoder(job.model) as decoder,
        Progress(
            len(done) + ceil((len(units) - len(done)) / world.size),
            "measuring sensitivity",
            done=len(done),
            enabled=progress,
        ) as bar,
    ):
        if not by_cache.keys() <= decoder.owners.keys():
            raise KVError(
                f"mlx-lm's {type(job.model).__module__} does not hand its caches to its blocks, so "
                "they cannot be measured one by one; name the widths yourself, as in --kv 8/4"
            )
        missing = [
            (c, cache)
            for c in range(len(job.contexts))
            for cache in by_cache
            if f"{c}/{cache}" not in done
        ]
        probes = {
            cache: sum(len(wanted[s.name]) for s in group) for cache, group in by_cache.items()
        }
        blocks = len(decoder.order)
        costs = [probes[cache] * (blocks - decoder.owners[cache]) for _, cache in missing]
        for c, group in groupby(stretch(missing, costs, world), key=lambda unit: unit[0]):
            context = decoder.read(job.contexts[c].tokens, job.tail, step=step)
            for _, cache in group:
                done[f"{c}/{cache}"] = _probe(decoder, context, job.dense, by_cache[cache], wanted)
                checkpoint.save()
                bar.step(note=f"cache {cache}, context {c + 1} of {len(job.contexts)}")


def stretch(
    units: Sequence[tuple[int, int]], costs: Sequence[float], world: World
) -> list[tuple[int, int]]:
    """This rank's part of `units`, next to each other: most need few contexts to be read."""
    total = sum(costs)
    middles = (end - cost / 2 for end, cost in zip(accumulate(costs), costs, strict=True))
    ranks = (int(world.size * middle / total) for middle in middles)
    return [unit for unit, rank in zip(units, ranks, strict=True) if rank == world.rank]


def _probe(
    decoder: Decoder,
    context: Context,
    dense: KVConfig,
    slots: Sequence[Slot],
    wanted: Mapping[str, Sequence[Format]],
) -> Totals:
    """KL in nats summed over the tail, of each slot of one cache in its formats."""
    probes = [(slot, fmt) for slot in slots for fmt in wanted[slot.name]]
    heads = []
    for slot, fmt in probes:
        cache = make_cache(decoder.model, configured(dense, {slot.name: fmt}))[slot.cache]
        heads.append(decoder.decode(context, slot.cache, cache))
    sums = [0.0] * len(probes)
    for i, tape in enumerate(context.tail):
        students = [(hidden[i], None) for hidden in heads]
        for j, total in enumerate(divergences(decoder, tape, (tape.hidden, None), students)):
            sums[j] += total
    found: Totals = {}
    for (slot, fmt), total in zip(probes, sums, strict=True):
        if not isfinite(total):
            raise SensitivityError(
                f"the model gives NaN or infinite logits with {slot.name} of its cache in {fmt}; "
                f"remove {fmt} from --formats"
            )
        found.setdefault(slot.name, {})[str(fmt)] = [total]
    return found


def chunk(config: KVConfig) -> int:
    """Tokens of a step: a query sees at least 3/4 of the recent tokens it would see when decoded
    one by one, and never more."""
    return max(1, min(CHUNK, config.fp_recent // 4)) if config.fp_recent else CHUNK


def to_measure(slot: Slot, menu: Sequence[Width], *, everything: bool) -> list[Format]:
    """The formats to measure; all others follow from these by the law."""
    formats = [f for f in slot.offered(menu) if f != DENSE]
    if everything:
        return formats
    return sorted({formats[0], formats[len(formats) // 2]})


def complete(
    slot: Slot, menu: Sequence[Width], known: Mapping[Format, tuple[float, float | None]]
) -> dict[Format, SlotScore]:
    """The scores of all formats of a slot, by the law where they are not known.

    A score never rises with the width: noise about zero does not decide.
    """
    found: dict[Format, SlotScore] = {}
    for fmt in slot.offered(menu):
        if fmt == DENSE:
            found[fmt] = SlotScore(0.0, 0.0, True)
        elif fmt in known:
            kl, se = known[fmt]
            found[fmt] = SlotScore(max(kl, 0.0), se, True)
        else:
            found[fmt] = by_law(fmt, known)
    return found


def by_law(fmt: Format, known: Mapping[Format, tuple[float, float | None]]) -> SlotScore:
    """The score of `fmt` from the nearest narrower measured format, or the narrowest of all."""
    points = sorted((log(2**f.bits - 1), max(kl, LEAST), se) for f, (kl, se) in known.items())
    slope = SLOPE
    if len(points) > 1 and points[0][0] < points[-1][0]:
        run = points[-1][0] - points[0][0]
        slope = log(points[0][1] / points[-1][1]) / run
        slope = min(max(slope, SLOPES[0]), SLOPES[1])
    x = log(2**fmt.bits - 1)
    at, kl, se = max((p for p in points if p[0] <= x), default=points[0])
    factor = exp(slope * (at - x))
    return SlotScore(kl * factor, None if se is None else se * factor, False)


def check_law(slots: Sequence[Slot], menu: Sequence[Width], scores: SlotScores) -> Law:
    """Predicted over measured KL, where more was measured than the law needs."""
    ratios: list[float] = []
    for slot in slots:
        measured = {f: (s.kl, s.se) for f, s in scores[slot.name].items() if s.measured}
        measured.pop(DENSE, None)
        base = to_measure(slot, menu, everything=False)
        known = {f: measured[f] for f in base}
        ratios += [
            by_law(f, known).kl / kl
            for f, (kl, _) in measured.items()
            if f not in known and kl > LEAST
        ]
    if not ratios:
        return Law(0, None, None, None)
    return Law(len(ratios), median(ratios), min(ratios), max(ratios))
