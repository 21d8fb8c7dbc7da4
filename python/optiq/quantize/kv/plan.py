"""The whole job of `optiq kv`: score, propose, let real KL decide, measure what was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...base.command import command_line
from ...base.machine import machine, versions
from ...base.progress import silenced
from ...calibration import Sample, token_hash
from ...distributed.ranks import World, world
from ...errors import UsageError
from ...kv.config import KVConfig
from ...kv.model import entries, identity
from ...kv.report import (
    ExactTokens,
    KVModel,
    KVPoint,
    KVReport,
    KVText,
    Law,
    ScoredSlot,
    SlotScores,
)
from ...nn.accelerate import accelerate
from ...quality.statistics import rank_correlation
from ...runtime.loading import check_graph
from ...sources import LoadedModel, load, resolve
from ...sources.config import holders
from ..sensitivity.checkpoint import Checkpoint
from . import choose
from .configs import measure_configs
from .contexts import CONTEXT, Contexts, gather_contexts
from .files import Files
from .measure import TAIL, Scoring, measure_slots
from .options import KVOptions
from .slots import Slot, configured, slots_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import KVFields

# Uniform pairs that the frontier shows for comparison, as far as the menu has them.
COMPARED = ("8/8", "8/4", "6/4", "4/4")


def kv_plan(model: str | Path, out: str | Path, **options: Unpack[KVFields]) -> KVReport:
    """Choose formats for the keys and values of every cache of `model`; write them to `out`.

    Args:
        model: A folder, hub id or .gguf file, quantized or not.
        out: The kv_config.json to write. Beside it go OUT.report.json and OUT.report.html.
        size: "8/4", the bytes of 8-bit keys and 4-bit values (the default), or "40%" of the 16-bit
            cache.
        context: Tokens of a context, over which sizes are also stated (default: 4096, or what the
            model allows).
        samples: How many contexts to score on, to choose on, and to judge on, at most (4).
        formats: Widths that may be chosen ("3,4,5,6,8,bf16").
        fp_recent, fp_sink: Last and first tokens that are read in full precision, which `size`
            does not count (128 and 4).
        calibration: JSON Lines of rows in place of the bundled mix.
        revision, seed, progress: As for `convert`.
        resume: Go on with an interrupted run of the same job.
        restart: Discard what an interrupted run left.
        overwrite: Replace a configuration that is there already.

    The processes that `mlx.launch` starts share the work; each returns the same, and rank 0 writes.
    Raises an OptiqError; then `out` is as it was.
    """
    with world() as ranks:
        return kv_plan_together(ranks, model, out, **options)


def kv_plan_together(
    ranks: World, model: str | Path, out: str | Path, **options: Unpack[KVFields]
) -> KVReport:
    """`kv_plan` on these ranks."""
    with silenced(ranks.rank != 0):
        return _kv_plan(ranks, str(model), Files(Path(out)), KVOptions.parse(**options))


def _kv_plan(ranks: World, model: str, files: Files, wanted: KVOptions) -> KVReport:
    if ranks.rank == 0:
        files.check(overwrite=wanted.overwrite)
    files.check_unfinished(resume=wanted.resume, restart=wanted.restart)
    job = _prepare(model, wanted, ranks)
    scores, law = _score(job, files.checkpoint)
    proposals = choose.propose(job.slots, scores, job.budget, wanted.size.text.strip())
    candidates = _measure(job, scores, proposals, job.contexts.selection)
    best = min(candidates, key=lambda c: (c.kl, c.nbytes))
    formats = proposals[best.name]
    compared = {"optiq": formats, **_uniform(job, scores)}
    points = _measure(job, scores, compared, job.contexts.held_out)
    config = configured(job.dense, formats)
    report = KVReport(
        model=KVModel(**vars(job.dense.model), model_type=job.loaded.config["model_type"]),
        context=job.length,
        asked=wanted.size.text,
        budget=job.budget,
        nbytes=config.nbytes(job.length),
        dense_nbytes=job.dense.nbytes(job.length),
        bytes_per_token=config.bytes_per_token,
        exact=ExactTokens(wanted.fp_recent, wanted.fp_sink, _exact_bytes(job.dense)),
        chosen=best.name,
        candidates=candidates,
        ratio=best.kl / best.predicted if best.predicted else None,
        rank_correlation=rank_correlation([(c.predicted, c.kl) for c in candidates if c.predicted]),
        frontier=tuple(choose.frontier(job.slots, scores)),
        points=points,
        law=law,
        scores=tuple(
            ScoredSlot(**vars(slot), format=formats[slot.name], scores=scores[slot.name])
            for slot in job.slots
        ),
        text=_describe(job),
        command=command_line(),
        versions=versions(),
        machine=machine(),
    )
    if ranks.rank == 0:
        files.write(replace(config, provenance=_provenance(report)), report)
    ranks.gather(None)  # nobody forgets before the result is safe
    files.forget()
    return report


@dataclass(frozen=True)
class Job:
    """A model with its slots, the bytes they may take after `length` tokens, and texts.

    In `dense` every cache is left as it is. Scores are made on the last `tail` tokens of contexts.
    """

    options: KVOptions
    loaded: LoadedModel
    dense: KVConfig
    slots: list[Slot]
    length: int
    budget: int
    contexts: Contexts
    ranks: World

    @property
    def tail(self) -> int:
        return min(TAIL, len(self.contexts.scoring[0].tokens) // 4)


def _prepare(model: str, options: KVOptions, ranks: World) -> Job:
    """Load the model and the texts; an OptiqError where the options do not suit them."""
    source = resolve(model, revision=options.revision)
    loaded = load(source, allow_quantized=True)
    length = _length(options.context, loaded.config)
    check_graph(loaded.model, source.name)
    dense = KVConfig(
        entries(loaded.model), options.fp_recent, options.fp_sink, model=identity(source)
    )
    slots = slots_of(dense.entries, length)
    if not slots:
        raise UsageError(f"{source.name} has no cache of keys and values that can be quantized")
    budget = options.size.budget(dense, length)
    choose.check_budget(slots, options.formats, budget)
    contexts = gather_contexts(
        loaded.tokenizer,
        options.calibration,
        length=length,
        samples=options.samples,
        seed=options.seed,
    )
    accelerate(loaded.model, exact=False)
    return Job(options, loaded, dense, slots, length, budget, contexts, ranks)


def _length(asked: int | None, config: dict[str, Any]) -> int:
    """Tokens of a context: what was asked for, or the usual number as far as the model allows."""
    said = (holder.get("max_position_embeddings") for _, holder in holders(config))
    most = next(filter(None, said), None)
    if asked is None:
        return min(CONTEXT, most or CONTEXT)
    if most and asked > most:
        raise UsageError(f"--context {asked} is longer than the {most} positions the model has")
    return asked


def _score(job: Job, checkpoint: Path) -> tuple[SlotScores, Law]:
    scoring = Scoring(
        job.loaded.model,
        KVConfig(job.dense.entries),  # a prompt is read in chunks, past whose end nothing is exact
        job.slots,
        job.options.formats,
        job.contexts.scoring,
        job.tail,
    )
    how = {
        "model": job.dense.model.fingerprint,
        "text": token_hash(job.contexts.scoring),
        "tail": job.tail,
        "formats": [str(f) for f in job.options.formats],
        "versions": versions(),
    }
    job.ranks.same({**how, "budget": job.budget})
    done = Checkpoint(checkpoint, how, resume=job.options.resume, rank=job.ranks.rank)
    return measure_slots(scoring, done, progress=job.options.progress, world=job.ranks)


def _measure(
    job: Job,
    scores: SlotScores,
    formats: Mapping[str, choose.Formats],
    contexts: Sequence[Sample],
) -> tuple[KVPoint, ...]:
    """Whole configurations by name, decoded."""
    configs = {name: configured(job.dense, of) for name, of in formats.items()}
    found = measure_configs(
        job.loaded.model, configs, contexts, progress=job.options.progress, world=job.ranks
    )
    return tuple(
        KVPoint(name, choose.size(job.slots, of), choose.predicted(scores, of), found[name])
        for name, of in formats.items()
    )


def _uniform(job: Job, scores: SlotScores) -> dict[str, choose.Formats]:
    """The uniform widths to compare with, the best within the budget among them."""
    pairs = choose.pairs(job.slots, scores)
    found = {name: pairs[name] for name in COMPARED if name in pairs}
    best = choose.uniform(job.slots, scores, job.budget)
    return found | {"uniform": best} if best and best not in found.values() else found


def _exact_bytes(dense: KVConfig) -> int:
    """Bytes of a request's exact tokens, which come on top of its records."""
    a_token = sum(e.bytes_per_token for e in dense.entries if e.kind == "full")
    return a_token * (dense.fp_recent + dense.fp_sink)


def _describe(job: Job) -> KVText:
    contexts = job.contexts
    parts = {
        "scoring": contexts.scoring,
        "selection": contexts.selection,
        "held_out": contexts.held_out,
    }
    return KVText(
        contexts.name,
        job.options.seed,
        job.tail,
        tokens={name: [len(s.tokens) for s in part] for name, part in parts.items()},
        sha256={name: token_hash(part) for name, part in parts.items()},
    )


def _provenance(report: KVReport) -> dict[str, Any]:
    """What the configuration itself says of how it was made."""
    data = report.to_json() | {"measured": report.points[0].to_json()}
    keys = ("context", "budget", "nbytes", "dense_nbytes", "chosen", "measured", "text")
    return {key: data[key] for key in (*keys, "command", "versions", "machine")}
